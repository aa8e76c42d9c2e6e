"""Named model configurations."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from moe_engine.config import ModelConfig


def tiny() -> ModelConfig:
    """Trains on two CPU cores in minutes: vocabulary `o200k_base:4096`, context of a few hundred tokens."""
    return ModelConfig(
        vocab_size=4160,
        num_layers=4,
        d_model=192,
        num_heads=6,
        num_kv_heads=2,
        head_dim=32,
        d_ff=384,
        rope_theta=10_000.0,
        rope_factor=1.0,
    )


def small() -> ModelConfig:
    """About 100 M parameters, 40 M of them active: a first run on one GPU, or a patient CPU."""
    return ModelConfig(
        vocab_size=16_448,
        num_layers=8,
        d_model=512,
        num_heads=8,
        num_kv_heads=2,
        head_dim=64,
        d_ff=768,
        rope_theta=10_000.0,
        rope_factor=1.0,
    )


def gpt_oss_6b() -> ModelConfig:
    """6.58 B parameters: the width, attention and vocabulary of gpt-oss, 8 experts of hidden width 2880."""
    return ModelConfig(
        vocab_size=201_088, num_layers=24, d_model=2880, num_heads=64, num_kv_heads=8, head_dim=64, d_ff=2880
    )


def gpt_oss_8b() -> ModelConfig:
    """8.17 B parameters, 2.23 B active per token without the embedding tables: `6b` with hidden width 3840."""
    return replace(gpt_oss_6b(), d_ff=3840)


PRESETS = {"tiny": tiny, "small": small, "6b": gpt_oss_6b, "8b": gpt_oss_8b}


def preset(name: str, **overrides: Any) -> ModelConfig:
    """A named configuration, with fields replaced.

    Args:
        name: `tiny`, `small`, `6b` or `8b`.
        overrides: fields of `ModelConfig`.
    Raises:
        ValueError: no such preset, or an override is out of range.
        TypeError: no such field.
    """
    if name not in PRESETS:
        raise ValueError(f"preset: expected one of {', '.join(PRESETS)}, got {name!r}")
    return replace(PRESETS[name](), **overrides)

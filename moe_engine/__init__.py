"""Sparse mixture-of-experts language models: configurations, layer, model and reference."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_engine.config import ModelConfig, MoEConfig
    from moe_engine.model import Transformer
    from moe_engine.moe import MoELayer
    from moe_engine.presets import preset

__all__ = ["MoEConfig", "MoELayer", "ModelConfig", "Transformer", "preset"]

# Imported at first use: `moe-prepare` and its worker processes must not pay for torch (seconds, 500 MB each).
_HOMES = {
    "MoEConfig": "config",
    "ModelConfig": "config",
    "Transformer": "model",
    "MoELayer": "moe",
    "preset": "presets",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"moe_engine.{_HOMES[name]}"), name)

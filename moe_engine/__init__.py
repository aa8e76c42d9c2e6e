"""Sparse mixture-of-experts language models: configurations, layer, model and reference."""

from moe_engine.config import ModelConfig, MoEConfig
from moe_engine.model import Transformer
from moe_engine.moe import MoELayer
from moe_engine.presets import preset

__all__ = ["MoEConfig", "MoELayer", "ModelConfig", "Transformer", "preset"]

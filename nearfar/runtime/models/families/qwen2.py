"""Qwen2 and 2.5 (Yang et al., arXiv 2407.10671): Llama's layers with biases of q, k and v.

The last layers slide where `use_sliding_window` is on.
"""

from __future__ import annotations

from nearfar.runtime.models.config_fields import Fields
from nearfar.runtime.models.families.base import (
    Family,
    Gguf,
    attention_plan,
    dense_plan,
    equal_layers,
    first_window_layer,
    model_plan,
    window_of_some,
)
from nearfar.runtime.models.plan import ModelPlan


class Qwen2(Family):
    """model_type qwen2."""

    examples = "Qwen2 and 2.5"
    gguf = Gguf("qwen2")

    def plan(self, fields: Fields, family: str) -> ModelPlan:
        """Every layer alike."""
        layers = equal_layers(fields, attention_plan(fields, qkv_bias=True), dense_plan(fields))
        window = window_of_some(fields, 4096, slides=first_window_layer(fields))
        return model_plan(fields, family, layers, window_tokens=window)

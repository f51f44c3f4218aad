"""Qwen3 (Yang et al., arXiv 2505.09388): Llama's layers with an RMSNorm of each query and key.

Heads have 128 dimensions whatever the hidden size; the last layers slide where
`use_sliding_window` is on.
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


class Qwen3(Family):
    """model_type qwen3."""

    examples = "Qwen3"
    gguf = Gguf("qwen3")

    def plan(self, fields: Fields, family: str) -> ModelPlan:
        """Every layer alike."""
        biased = fields.flag("attention_bias")
        mixer = attention_plan(
            fields, head_dim=128, qkv_bias=biased, output_bias=biased, qk_norm=True
        )
        dense = dense_plan(fields, bias=fields.flag("mlp_bias"))
        window = window_of_some(fields, 4096, slides=first_window_layer(fields))
        layers = equal_layers(fields, mixer, dense)
        return model_plan(fields, family, layers, window_tokens=window)

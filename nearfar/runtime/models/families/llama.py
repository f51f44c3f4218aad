"""Llama 2 and 3 (Touvron et al. 2023; Grattafiori et al. 2024), and what shares their layers.

A layer is RMSNorm, grouped-query attention with rotary embedding, RMSNorm, SwiGLU. Biases are
there where `attention_bias` and `mlp_bias` say so.
"""

from __future__ import annotations

from nearfar.runtime.models.config_fields import Fields
from nearfar.runtime.models.families.base import (
    Family,
    Gguf,
    attention_plan,
    dense_plan,
    equal_layers,
    model_plan,
)
from nearfar.runtime.models.plan import ModelPlan


class Llama(Family):
    """model_type llama."""

    examples = "Llama 2 and 3, SmolLM2"
    gguf = Gguf("llama", neighbour_rotary=True)

    def plan(self, fields: Fields, family: str) -> ModelPlan:
        """Every layer alike."""
        biased = fields.flag("attention_bias")
        mixer = attention_plan(fields, qkv_bias=biased, output_bias=biased)
        dense = dense_plan(fields, bias=fields.flag("mlp_bias"))
        return model_plan(fields, family, equal_layers(fields, mixer, dense))

"""SmolLM3 (Bakouch et al. 2025): Llama's layers, of which every fourth has no position embedding.

Which ones, says `no_rope_layers`, where 1 means that a layer rotates. Where `use_sliding_window` is
on, the layers without rotary embedding are those that do not slide.
"""

from __future__ import annotations

from nearfar.errors import CheckpointError
from nearfar.runtime.models.config_fields import Fields
from nearfar.runtime.models.families.base import (
    Family,
    Gguf,
    attention_plan,
    dense_plan,
    model_plan,
    unrotated,
    window_of_some,
)
from nearfar.runtime.models.plan import LayerPlan, ModelPlan


class SmolLM3(Family):
    """model_type smollm3."""

    examples = "SmolLM3"
    gguf = Gguf("smollm3", neighbour_rotary=True)

    def plan(self, fields: Fields, family: str) -> ModelPlan:
        """Layers that rotate and layers that do not."""
        biased = fields.flag("attention_bias")
        mixer = attention_plan(fields, rope_base=2e6, qkv_bias=biased, output_bias=biased)
        dense = dense_plan(fields, bias=fields.flag("mlp_bias"))
        rotates = _rotating(fields)
        plain = unrotated(mixer)
        window = window_of_some(fields, None, slides=not all(rotates))
        layers = [LayerPlan(mixer if each else plain, dense) for each in rotates]
        return model_plan(fields, family, layers, window_tokens=window, tied=True)


def _rotating(fields: Fields) -> list[bool]:
    """True where a layer has rotary embedding."""
    layers, interval = fields.count("num_hidden_layers"), fields.count("no_rope_layer_interval", 4)
    given = fields.items("no_rope_layers", [(i + 1) % interval for i in range(layers)])
    if len(given) < layers:
        raise CheckpointError(
            f"'no_rope_layers' in {fields.where} must have an entry for each of {layers} layers. "
            f"Got {len(given)}."
        )
    return [bool(value) for value in given[:layers]]

"""Mistral (Jiang et al., arXiv 2310.06825): Llama's layers; all slide where there is a window."""

from __future__ import annotations

from nearfar.runtime.models.config_fields import Fields
from nearfar.runtime.models.families.base import (
    Family,
    attention_plan,
    dense_plan,
    equal_layers,
    model_plan,
)
from nearfar.runtime.models.plan import ModelPlan


class Mistral(Family):
    """model_type mistral. Its GGUF files say llama."""

    examples = "Mistral"

    def plan(self, fields: Fields, family: str) -> ModelPlan:
        """Every layer alike; the context ends at the window."""
        layers = equal_layers(fields, attention_plan(fields), dense_plan(fields))
        window = fields.values.get("sliding_window", 4096)
        if window is not None:
            window = fields.count("sliding_window", window)
        return model_plan(fields, family, layers, window_tokens=window)

"""The plan of a model, read from the `config.json` of a Hugging Face checkpoint.

It makes the checks of every family: weights that other tools quantised, the activation, keys that
would change the computation and are not implemented. Each is an error, never ignored. The family
describes the parts of a model (`models.families`). This module reads no files and no weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from nearfar.errors import CheckpointError
from nearfar.runtime.checkpoints.foreign_quantisation import quantisation_of
from nearfar.runtime.models.config_fields import Fields
from nearfar.runtime.models.config_keys import SILU, check_keys
from nearfar.runtime.models.families.base import Family, token_ids
from nearfar.runtime.models.families.registry import family_named, family_names
from nearfar.runtime.models.plan import ModelPlan

_MOST_LAYERS = 10_000

ModelConfig = ModelPlan  # its earlier name, for programs that import it from here


def parse_config(
    config: Mapping[str, Any], where: str, generation: Mapping[str, Any] | None = None
) -> ModelPlan:
    """The model that ``config`` describes; ``where`` names its file in errors.

    ``generation`` is the content of generation_config.json, whose stop tokens win. Raises
    UnsupportedModelError for what is not implemented, CheckpointError for what is missing.
    """
    fields = Fields(config, where)
    family = _family(fields)
    _reject_unsupported(fields)
    if fields.count("num_hidden_layers") > _MOST_LAYERS:  # before a plan of each is made
        layers = fields.values["num_hidden_layers"]
        raise CheckpointError(
            f"'num_hidden_layers' in {where} is {layers:,}, more than any model has "
            f"({_MOST_LAYERS:,}). Download the file again."
        )
    plan = family.plan(fields, str(config["model_type"]))
    eos = (generation or {}).get("eos_token_id")
    return plan if eos is None else replace(plan, eos_token_ids=token_ids(eos, where))


def _family(fields: Fields) -> Family:
    name, names = str(fields.require("model_type")), family_names()
    if name not in names:
        known = ", ".join(f"{each} ({family_named(each).examples})" for each in names)
        raise fields.unsupported(f"the model type {name!r}", known)
    return family_named(name)


def _reject_unsupported(fields: Fields) -> None:
    if method := quantisation_of(fields.values):
        raise fields.unsupported(
            f"quantized weights ({method})", "float32, bfloat16 and float16 weights"
        )
    activation = fields.get("hidden_act", "silu")
    if activation not in SILU:
        raise fields.unsupported(f"the activation {activation!r}", "silu")
    types = set(fields.items("layer_types", []))
    if types - {"full_attention", "sliding_attention"}:
        raise fields.unsupported(
            f"layers of the types {sorted(types)}", "full_attention, sliding_attention"
        )
    check_keys(fields.values, fields.where)

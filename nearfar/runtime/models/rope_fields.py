"""The rotary embedding that a config.json asks for, in the spellings of all its versions.

Since transformers 5 there is one object, `rope_parameters`; before there were `rope_theta` and
`rope_scaling`. A `rope_scaling` beside the new object replaces it, as in transformers 5, because
people add it by hand to extend a model; only the base, which such an addition seldom repeats, is
still taken from where the model's own is. A setting that its type does not read is an error.
"""

from __future__ import annotations

import math
from typing import Any

from nearfar.runtime.models.config_fields import Fields
from nearfar.runtime.models.config_keys import OFF, ROPE_NO_EFFECT, ROPE_USED
from nearfar.runtime.models.rope import RopeConfig, yarn_magnitude

ROPE_KINDS = ("default", "linear", "llama3", "yarn")


def read_context(fields: Fields) -> int:
    """Tokens that the rotary embedding is good for.

    They are max_position_embeddings, but yarn's files often keep the trained length there and leave
    the extended one, factor times that, to the reader.
    """
    context, rope = fields.count("max_position_embeddings"), read_rope(fields, 1.0)
    if rope.kind != "yarn":
        return context
    return max(context, math.floor(rope.factor * rope.trained_context_tokens))


def read_rope(fields: Fields, default_base: float) -> RopeConfig:
    """Rotary embedding, with ``default_base`` where the file names none."""
    context = fields.count("max_position_embeddings")
    new, old = fields.nested("rope_parameters"), fields.nested("rope_scaling")
    rope = old if old.values else new
    kind = _kind(rope)
    _check_keys(rope, kind)
    _check_partial(rope, fields)
    base = rope.number(
        "rope_theta", new.get("rope_theta", fields.number("rope_theta", default_base))
    )
    if kind == "default":
        return RopeConfig(base)
    factor = rope.number("factor")
    if kind == "linear":
        return RopeConfig(base, kind, factor)
    key = "original_max_position_embeddings"
    trained = fields.count(key, rope.count(key, context))
    if kind == "llama3":
        low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
        return RopeConfig(base, kind, factor, trained, low, high)
    return _yarn(rope, base, factor, trained)


def _kind(rope: Fields) -> Any:
    if any(isinstance(value, dict) for value in rope.values.values()):
        raise rope.unsupported("rotary embeddings that differ by layer type", "one for all")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if rope.get("type", kind) != kind:
        raise rope.unsupported(
            f"rotary embedding of type {kind!r} (rope_type) and {rope.get('type')!r} (type) at "
            "once",
            "one type",
        )
    if kind not in ROPE_KINDS:
        raise rope.unsupported(f"rotary embedding of type {kind!r}", ", ".join(ROPE_KINDS))
    return kind


def _check_keys(rope: Fields, kind: str) -> None:
    for key, value in rope.values.items():
        if value in OFF or key in ROPE_NO_EFFECT or kind in ROPE_USED.get(key, ()):
            continue
        if key == "factor" and value == 1:
            continue
        if key == "factor" and rope.get("rope_type", rope.get("type")) is None:
            raise rope.unsupported(
                f"rotary embedding with a factor of {value!r} and no rope_type",
                "a factor with one of linear, llama3, yarn",
            )
        raise rope.unsupported(
            f"{key!r} in rotary embedding of type {kind!r}",
            ", ".join(name for name, kinds in ROPE_USED.items() if kind in kinds),
        )


def _check_partial(rope: Fields, fields: Fields) -> None:
    partial = rope.get("partial_rotary_factor", fields.get("partial_rotary_factor", 1.0))
    if partial != 1.0:
        raise fields.unsupported(f"rotary embedding of {partial} of a head", "all of it")


def _yarn(rope: Fields, base: float, factor: float, trained: int) -> RopeConfig:
    attention = None
    if rope.get("attention_factor") is not None:
        attention = rope.number("attention_factor")
    elif rope.get("mscale") and rope.get("mscale_all_dim"):
        attention = yarn_magnitude(factor, rope.number("mscale"))
        attention /= yarn_magnitude(factor, rope.number("mscale_all_dim"))
    return RopeConfig(
        base,
        "yarn",
        factor,
        trained,
        beta_fast=rope.number("beta_fast", 32.0),
        beta_slow=rope.number("beta_slow", 1.0),
        whole_dimensions=rope.flag("truncate", True),
        attention_factor=attention,
    )

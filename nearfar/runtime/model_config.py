"""What a model is made of, read from the `config.json` of a Hugging Face checkpoint.

Models here are decoders of one shape: RMSNorm, grouped-query attention with rotary embedding,
SwiGLU. Families differ in what the table below says. Keys that a file leaves out have the value
that transformers gives them. Whatever would change the computation and is not implemented is an
error, never ignored. This module reads no files and no weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from nearfar.errors import CheckpointError
from nearfar.runtime.config_fields import Fields
from nearfar.runtime.config_keys import check_keys
from nearfar.runtime.foreign_quantisation import quantisation_of
from nearfar.runtime.models.plan import AttentionPlan, DensePlan, LayerPlan, ModelPlan
from nearfar.runtime.rope_fields import read_rope


@dataclass(frozen=True)
class _Family:
    """What distinguishes a family: fixed features, and defaults of keys that a file leaves out."""

    examples: str
    qkv_bias: bool = False  # always; attention_bias may ask for it where that is read
    reads_biases: bool = False  # attention_bias (of q, k, v and output) and mlp_bias
    qk_norm: bool = False
    nope_layers: bool = False  # some layers have no rotary embedding
    window: Literal["none", "all", "some"] = "none"  # layers that can have sliding-window attention
    default_window_tokens: int | None = 4096
    default_head_dim: int | None = None  # None: hidden size / query heads
    default_rope_base: float = 10_000.0
    default_tied: bool = False


FAMILIES = {
    "llama": _Family("Llama 2 and 3, SmolLM2", reads_biases=True),
    "mistral": _Family("Mistral", window="all"),
    "qwen2": _Family("Qwen2 and 2.5", qkv_bias=True, window="some"),
    "qwen3": _Family("Qwen3", reads_biases=True, qk_norm=True, window="some", default_head_dim=128),
    "smollm3": _Family(
        "SmolLM3",
        reads_biases=True,
        nope_layers=True,
        window="some",
        default_window_tokens=None,
        default_rope_base=2_000_000.0,
        default_tied=True,
    ),
}


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
    layers, query_heads = fields.count("num_hidden_layers"), fields.count("num_attention_heads")
    hidden = fields.count("hidden_size")
    rope_layers = _rope_layers(fields, family, layers)
    rope, context = read_rope(fields, family.default_rope_base)
    window = _window_tokens(fields, family, rope_layers)
    head_dim = fields.count("head_dim", family.default_head_dim or hidden // query_heads)
    kv_heads = fields.count("num_key_value_heads", query_heads)
    if query_heads % kv_heads or head_dim % 2:
        raise CheckpointError(
            f"{where} must have a multiple of KV heads as query heads, and an even head_dim. Got "
            f"{query_heads} query heads, {kv_heads} KV heads, head_dim {head_dim}."
        )
    attention_bias = family.reads_biases and fields.flag("attention_bias")
    attention = AttentionPlan(
        query_heads,
        kv_heads,
        head_dim,
        rope,
        qkv_bias=family.qkv_bias or attention_bias,
        output_bias=attention_bias,
        qk_norm=family.qk_norm,
    )
    feed_forward = DensePlan(
        fields.count("intermediate_size"), family.reads_biases and fields.flag("mlp_bias")
    )
    unrotated = replace(attention, rope=None)
    eos = Fields(generation or {}, where).get("eos_token_id", fields.get("eos_token_id"))
    return ModelPlan(
        family=config["model_type"],
        vocab_size=fields.count("vocab_size"),
        hidden_size=hidden,
        norm_eps=fields.number("rms_norm_eps"),
        max_context_tokens=min(context, window or context),
        layers=tuple(
            LayerPlan(attention if rotates else unrotated, feed_forward) for rotates in rope_layers
        ),
        tied_embeddings=fields.flag("tie_word_embeddings", family.default_tied),
        eos_token_ids=_token_ids(eos, where),
    )


def _family(fields: Fields) -> _Family:
    name = str(fields.require("model_type"))
    if name not in FAMILIES:
        known = ", ".join(f"{key} ({family.examples})" for key, family in FAMILIES.items())
        raise fields.unsupported(f"the model type {name!r}", known)
    return FAMILIES[name]


def _reject_unsupported(fields: Fields) -> None:
    if method := quantisation_of(fields.values):
        raise fields.unsupported(
            f"quantized weights ({method})", "float32, bfloat16 and float16 weights"
        )
    activation = fields.get("hidden_act", "silu")
    if activation != "silu":
        raise fields.unsupported(f"the activation {activation!r}", "silu")
    check_keys(fields.values, fields.where)


def _rope_layers(fields: Fields, family: _Family, layers: int) -> tuple[bool, ...]:
    """True where a layer has rotary embedding; SmolLM3's no_rope_layers means the same by 1."""
    if not family.nope_layers:
        return (True,) * layers
    interval = fields.count("no_rope_layer_interval", 4)
    given = fields.items("no_rope_layers", [(i + 1) % interval for i in range(layers)])
    if len(given) < layers:
        raise CheckpointError(
            f"'no_rope_layers' in {fields.where} must have an entry for each of {layers} layers. "
            f"Got {len(given)}."
        )
    return tuple(bool(value) for value in given[:layers])


def _window_tokens(fields: Fields, family: _Family, rope_layers: tuple[bool, ...]) -> int | None:
    """The window of sliding-window attention, or None where no layer has one."""
    types = set(fields.items("layer_types", []))
    if types - {"full_attention", "sliding_attention"}:
        raise fields.unsupported(
            f"layers of the types {sorted(types)}", "full_attention, sliding_attention"
        )
    window = fields.values.get("sliding_window", family.default_window_tokens)
    if window is None or not _slides(fields, family, rope_layers):
        return None
    return fields.count("sliding_window", window)


def _slides(fields: Fields, family: _Family, rope_layers: tuple[bool, ...]) -> bool:
    """Whether any layer has sliding-window attention if there is a window."""
    if family.window != "some":
        return family.window == "all"
    if not fields.flag("use_sliding_window"):
        return False
    layers = len(rope_layers)
    if types := fields.items("layer_types", [])[:layers]:
        return "sliding_attention" in types
    if family.nope_layers:
        return not all(rope_layers)
    return layers > fields.count("max_window_layers", 28, least=0)


def _token_ids(value: object, where: str) -> tuple[int, ...]:
    """Ids of tokens that end an answer: none, one or a list."""
    if value is None:
        return ()
    ids = value if isinstance(value, list) else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
        raise CheckpointError(
            f"'eos_token_id' of {where}, or of the generation_config.json beside it, must be the "
            f"id of a token or a list of ids. Got {value!r}."
        )
    return tuple(ids)

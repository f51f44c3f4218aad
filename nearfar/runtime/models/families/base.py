"""The interface of a family of models, and the defaults that most families share.

A family reads a `config.json` into a `ModelPlan`. Keys that a file leaves out have the value that
transformers gives them. What would change the computation and is not implemented is an error, never
ignored: `nearfar.runtime.checkpoints.model_config` checks every key before a family sees them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, replace

from nearfar.errors import CheckpointError
from nearfar.runtime.models.config_fields import Fields
from nearfar.runtime.models.plan import AttentionPlan, DensePlan, LayerPlan, ModelPlan
from nearfar.runtime.models.rope_fields import read_context, read_rope

Names = tuple[str, ...]


@dataclass(frozen=True)
class TensorNames:
    """A checkpoint's names for the tensors of a layer and of the model, without `.weight`, `.bias`.

    A fused weight is made of the tensors named, one after another; one name: it is stored fused.
    """

    input_norm: str = "input_layernorm"
    qkv: Names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    q_norm: str = "self_attn.q_norm"
    k_norm: str = "self_attn.k_norm"
    output: str = "self_attn.o_proj"
    post_norm: str = "post_attention_layernorm"
    gate_up: Names = ("mlp.gate_proj", "mlp.up_proj")
    down: str = "mlp.down_proj"
    layer: str = "model.layers.{}."
    embedding: str = "model.embed_tokens"
    norm: str = "model.norm"
    head: str = "lm_head"


@dataclass(frozen=True)
class Gguf:
    """How a family's GGUF files differ from its folders."""

    architecture: str
    # llama.cpp turns neighbours together; rows of q and k are stored in that order
    neighbour_rotary: bool = False


class Family(ABC):
    """One family, without state."""

    examples: str  # its best-known models
    names = TensorNames()
    gguf: Gguf | None = None  # None: its GGUF files say another family's architecture, or are none

    @abstractmethod
    def plan(self, fields: Fields, family: str) -> ModelPlan:
        """The model that a config.json describes; ``family`` is its model type.

        Raises UnsupportedModelError for what is not implemented, CheckpointError for what is
        missing.
        """


def attention_plan(
    fields: Fields,
    *,
    head_dim: int | None = None,
    rope_base: float = 10_000.0,
    qkv_bias: bool = False,
    output_bias: bool = False,
    qk_norm: bool = False,
) -> AttentionPlan:
    """Attention with rotary embedding; ``head_dim`` and ``rope_base`` where the file is silent."""
    query_heads = fields.count("num_attention_heads")
    kv_heads = fields.count("num_key_value_heads", query_heads)
    head_dim = head_dim or fields.count("hidden_size") // query_heads
    head_dim = fields.count("head_dim", head_dim)
    if query_heads % kv_heads or head_dim % 2:
        raise CheckpointError(
            f"{fields.where} must have a multiple of KV heads as query heads, and an even "
            f"head_dim. Got {query_heads} query heads, {kv_heads} KV heads, head_dim {head_dim}."
        )
    rope = read_rope(fields, rope_base)
    return AttentionPlan(query_heads, kv_heads, head_dim, rope, qkv_bias, output_bias, qk_norm)


def dense_plan(fields: Fields, *, bias: bool = False) -> DensePlan:
    """A gated feed-forward."""
    return DensePlan(fields.count("intermediate_size"), bias)


def model_plan(
    fields: Fields,
    family: str,
    layers: Iterable[LayerPlan],
    *,
    window_tokens: int | None = None,
    tied: bool = False,
) -> ModelPlan:
    """The model of ``layers``; ``tied`` where the file is silent.

    A context ends at ``window_tokens``, up to which sliding-window attention is attention.
    """
    context = read_context(fields)
    return ModelPlan(
        family=family,
        vocab_size=fields.count("vocab_size"),
        hidden_size=fields.count("hidden_size"),
        norm_eps=fields.number("rms_norm_eps"),
        max_context_tokens=min(context, window_tokens or context),
        layers=tuple(layers),
        tied_embeddings=fields.flag("tie_word_embeddings", tied),
        eos_token_ids=token_ids(fields.get("eos_token_id"), fields.where),
    )


def token_ids(value: object, where: str) -> tuple[int, ...]:
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


def equal_layers(fields: Fields, mixer: AttentionPlan, dense: DensePlan) -> list[LayerPlan]:
    """As many layers as the file says, all alike."""
    return [LayerPlan(mixer, dense)] * fields.count("num_hidden_layers")


def unrotated(mixer: AttentionPlan) -> AttentionPlan:
    """The same without position embedding."""
    return replace(mixer, rope=None)


def window_of_some(fields: Fields, default_tokens: int | None, *, slides: bool) -> int | None:
    """The window where ``use_sliding_window`` is on and a layer has it, else None.

    ``slides`` says whether a layer has it where the file names no types of layers.
    """
    window = fields.values.get("sliding_window", default_tokens)
    if window is None or not fields.flag("use_sliding_window"):
        return None
    layers = fields.count("num_hidden_layers")
    types = fields.items("layer_types", [])[:layers]
    if not ("sliding_attention" in types if types else slides):
        return None
    return fields.count("sliding_window", window)


def first_window_layer(fields: Fields) -> bool:
    """Whether Qwen's ``max_window_layers`` leaves a layer to slide."""
    return fields.count("num_hidden_layers") > fields.count("max_window_layers", 28, least=0)

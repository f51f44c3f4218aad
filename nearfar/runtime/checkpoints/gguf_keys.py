"""Every metadata key that a GGUF keeps under its architecture's name: read, refused or unneeded.

An unknown key is refused unless its value turns it off, because keys under an architecture's name
describe the computation. Keys under other names (`general.`, `tokenizer.`, notes of a quantiser) do
not. The lists are the source; docs/models.md repeats them. Names leave out the architecture.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nearfar.runtime.models.config_keys import OFF, Effect, effect_in

USED = frozenset(
    """
    attention.head_count attention.head_count_kv attention.key_length
    attention.layer_norm_rms_epsilon attention.sliding_window attention.value_length block_count
    context_length embedding_length expert_count feed_forward_length rope.dimension_count
    rope.freq_base rope.scale_linear rope.scaling.factor rope.scaling.original_context_length
    rope.scaling.type rope.scaling.yarn_beta_fast rope.scaling.yarn_beta_slow
    """.split()  # noqa: SIM905  a list to be read
)

# Refused unless the value is one of those given, which change nothing, or turns the setting off.
REFUSED: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (),
    "attention.max_alibi_bias": (),
    "attention.output_scale": (1.0,),
    "attention.scale": (),  # except 1 / sqrt(head dimension), the scale that nearfar uses
    "attention.shared_kv_layers": (),
    "attention.sliding_window_pattern": (),
    "attention.temperature_length": (),
    "attention.temperature_scale": (),
    "attn_logit_softcapping": (),
    "embedding_scale": (1.0,),
    "expert_shared_count": (),
    "expert_used_count": (),
    "final_logit_softcapping": (),
    "leading_dense_block_count": (),
    "logit_scale": (1.0,),
    "nextn_predict_layers": (),
    "pooling_type": (),
    "residual_scale": (1.0,),
    "rope.dimension_sections": (),
    "rope.scaling.alpha": (1.0,),
    "rope.scaling.attn_factor": (1.0,),
    "rope.scaling.yarn_attn_factor": (1.0,),
    "rope.scaling.yarn_ext_factor": (1.0, -1.0),
    "rope.scaling.yarn_log_multiplier": (),
    "use_parallel_residual": (),
}

NO_EFFECT = frozenset(("rope.scaling.finetuned", "tensor_data_layout", "vocab_size"))


def effect_of(key: str) -> Effect:
    """How ``key``, given without the architecture, is handled."""
    return effect_in(key, USED, REFUSED, NO_EFFECT)


def refused_key(metadata: Mapping[str, Any], softmax_scale: float) -> str | None:
    """The first key of ``metadata``, without the architecture, that would change the result.

    ``softmax_scale`` is the factor of scores here.
    """
    for key, value in metadata.items():
        if effect_of(key) not in ("used", "none") and not _harmless(key, value, softmax_scale):
            return key
    return None


def _harmless(key: str, value: Any, softmax_scale: float) -> bool:
    if key == "attention.causal":
        return bool(value)
    if key == "attention.scale" and value:
        return bool(abs(value - softmax_scale) < 1e-6)
    nothing = isinstance(value, list) and not any(value)
    return nothing or value in OFF or value in REFUSED.get(key, ())

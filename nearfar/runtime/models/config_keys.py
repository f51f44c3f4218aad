"""Every key of a config.json: read, refused unless it changes nothing, or without effect.

An unknown key is judged by its name: one that concerns the computation (a scale, a window, experts,
...) is refused unless its value turns it off, any other is ignored with a warning, as transformers
ignores it. The lists are the source; docs/models.md repeats them.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Mapping
from typing import Any, Literal

from nearfar.errors import UnsupportedModelError

Effect = Literal["used", "refused", "none", "unknown"]

_log = logging.getLogger(__name__)

SILU = ("silu", "swish")  # two names of x * sigmoid(x)
OFF: tuple[Any, ...] = (None, False, 0, "", [], {})  # values that turn a setting off

USED = frozenset(
    """
    attention_bias eos_token_id head_dim hidden_act hidden_size intermediate_size layer_types
    max_position_embeddings max_window_layers mlp_bias model_type no_rope_layer_interval
    no_rope_layers num_attention_heads num_hidden_layers num_key_value_heads
    original_max_position_embeddings partial_rotary_factor rms_norm_eps rope_parameters
    rope_scaling rope_theta sliding_window tie_word_embeddings use_sliding_window vocab_size
    """.split()  # noqa: SIM905  a list to be read
)

# Refused unless the value is one of those given, which change nothing, or turns the setting off.
REFUSED: dict[str, tuple[Any, ...]] = {
    "activation": SILU,
    "activation_function": SILU,
    "alibi": (),
    "attention_logit_softcapping": (),
    "attention_multiplier": (),
    "attention_scale": (),
    "attn_logit_softcapping": (),
    "causal": (True,),
    "clip_qkv": (),
    "compression_config": (),
    "dual_chunk_attention_config": (),
    "embedding_multiplier": (1.0,),
    "embedding_scale": (1.0,),
    "final_logit_softcapping": (),
    "hidden_activation": SILU,
    "is_causal": (True,),
    "is_encoder_decoder": (),
    "layernorm_type": ("rms_norm", "rmsnorm"),
    "lm_head_bias": (),
    "logit_scale": (1.0,),
    "logits_scaling": (1.0,),
    "moe_intermediate_size": (),
    "n_routed_experts": (),
    "no_bias": (True,),
    "norm_type": ("rms_norm", "rmsnorm"),
    "num_experts": (1,),
    "num_local_experts": (1,),
    "num_nextn_predict_layers": (),
    "per_layer_config": (),
    "position_embedding_type": ("absolute", "rope"),
    "pruned_heads": (),
    "quantization": (),
    "quantization_config": (),
    "query_pre_attn_scalar": (),
    "residual_multiplier": (1.0,),
    "residual_scale": (1.0,),
    "rope_interleaved": (),
    "rope_local_base_freq": (),
    "rotary_pct": (1.0,),
    "use_bidirectional_attention": (),
    "use_mrope": (),
    "use_rope": (True,),
}
_ON_BY_DEFAULT = ("causal", "is_causal", "no_bias", "use_rope")  # false changes what is computed

# Of training, of saving, of generation (nearfar has options of its own), or notes of other tools.
NO_EFFECT = frozenset(
    """
    _attn_implementation _attn_implementation_autoset _attn_implementation_internal
    _experts_implementation_internal _flash_attn_2_enabled _name_or_path _output_attentions
    _post_init_done add_cross_attention architectures attention_dropout attn_implementation
    attn_pdrop auto_map bad_words_ids begin_suppress_tokens bos_token_id cache_implementation
    chunk_size_feed_forward classifier_dropout cls_token_id cross_attention_hidden_size
    decoder_start_token_id diversity_penalty do_sample dtype early_stopping embd_pdrop
    encoder_no_repeat_ngram_size exponential_decay_length_penalty finetuning_task
    forced_bos_token_id forced_eos_token_id gradient_checkpointing hidden_dropout id2label
    initializer_factor initializer_range is_decoder is_llama_config label2id length_penalty
    loss_type mask_token_id max_length max_sequence_length min_length model_max_length
    no_repeat_ngram_size num_beam_groups num_beams num_labels num_return_sequences
    output_attentions output_hidden_states output_router_logits output_scores pad_token_id prefix
    pretraining_tp problem_type qkv_bias remove_invalid_values repetition_penalty resid_pdrop
    return_dict return_dict_in_generate router_aux_loss_coef sep_token_id suppress_tokens
    task_specific_params temperature tf_legacy_loss tie_encoder_decoder tie_last_hidden_states
    tokenizer_class tokenizer_model_max_length tokenizer_padding_side top_k top_p torch_dtype
    torchscript transformers.js_config transformers_version typical_p unk_token_id unsloth_fixed
    unsloth_version use_bfloat16 use_cache use_flash_attention use_flash_attn
    """.split()  # noqa: SIM905  a list to be read
)

_SPEAKS_OF_COMPUTING = re.compile(
    "alibi|alpha_value|attention|attn|bias|bidirect|cap|causal|chunk|clamp|clip|compress|expert|"
    "gate|logn|lora|moe|mtp|multiplier|norm|ntk|prun|quant|residual|rope|rotary|scal|spars|"
    "window|yarn"
)

# Keys of rope_parameters (rope_scaling, before transformers 5), by the types that read them.
_ALL_ROPE = ("default", "linear", "llama3", "yarn")
ROPE_USED: dict[str, tuple[str, ...]] = {
    "rope_type": _ALL_ROPE,
    "type": _ALL_ROPE,
    "rope_theta": _ALL_ROPE,
    "partial_rotary_factor": _ALL_ROPE,
    "factor": ("linear", "llama3", "yarn"),
    "original_max_position_embeddings": ("llama3", "yarn"),
    "low_freq_factor": ("llama3",),
    "high_freq_factor": ("llama3",),
    "attention_factor": ("yarn",),
    "beta_fast": ("yarn",),
    "beta_slow": ("yarn",),
    "mscale": ("yarn",),
    "mscale_all_dim": ("yarn",),
    "truncate": ("yarn",),
}
ROPE_NO_EFFECT = frozenset({"finetuned"})  # a note that the model was trained for it


def effect_of(key: str) -> Effect:
    """How ``key`` of a config.json is handled."""
    return effect_in(key, USED, REFUSED, NO_EFFECT)


def effect_in(
    key: str, used: Collection[str], refused: Collection[str], no_effect: Collection[str]
) -> Effect:
    """How ``key`` is handled by three lists."""
    if key in used:
        return "used"
    if key in refused:
        return "refused"
    return "none" if key in no_effect else "unknown"


def check_keys(config: Mapping[str, Any], where: str) -> None:
    """Raise UnsupportedModelError for a setting that would change results and is not computed.

    A warning names unknown keys whose names do not concern the computation.
    """
    ignored = []
    for key, value in config.items():
        effect = effect_of(key)
        if effect in ("used", "none") or _changes_nothing(key, value):
            continue
        if effect == "refused" or _SPEAKS_OF_COMPUTING.search(key.lower()):
            raise UnsupportedModelError(
                f"{where} asks for {key} = {_short(value)}, which is not supported: results would "
                "differ without it. Take a model without this setting. If it has no part in the "
                "model's computation, remove it from the file."
            )
        ignored.append(key)
    if ignored:
        _log.warning(
            "%s has settings that nearfar does not know: %s. They are ignored.",
            where,
            ", ".join(sorted(ignored)),
        )


def _changes_nothing(key: str, value: Any) -> bool:
    if key in _ON_BY_DEFAULT:
        return value in (None, True)
    return value in OFF or (value is not True and value in REFUSED.get(key, ()))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."

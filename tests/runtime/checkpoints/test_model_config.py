"""Configs of every family and form are read as transformers reads them, or refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from nearfar.errors import CheckpointError, UnsupportedModelError
from nearfar.records import Geometry
from nearfar.runtime.checkpoints.model_config import parse_config
from nearfar.runtime.models.plan import AttentionPlan, DensePlan, LayerPlan, ModelPlan
from nearfar.runtime.models.rope import RopeConfig

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 101,
    "hidden_size": 36,
    "intermediate_size": 77,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "eos_token_id": 2,
}
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}


def parse(generation: dict[str, Any] | None = None, **changes: Any) -> ModelPlan:
    return parse_config(LLAMA | changes, "m/config.json", generation)


def parse_without(key: str) -> ModelPlan:
    return parse_config({k: v for k, v in LLAMA.items() if k != key}, "m/config.json")


def test_a_llama_config_gives_its_sizes() -> None:
    config = parse()
    assert config.geometry == Geometry(layers=3, query_heads=6, kv_heads=2, head_dim=6)
    assert config.geometry.group == 3
    assert (config.vocab_size, config.hidden_size) == (101, 36)
    assert config.norm_eps == 1e-5
    assert config.max_context_tokens == 4096
    attention = AttentionPlan(6, 2, 6, RopeConfig(500_000.0))
    assert config.layers == (LayerPlan(attention, DensePlan(77)),) * 3
    assert not config.tied_embeddings


def test_swish_is_another_name_of_silu() -> None:
    assert parse(hidden_act="swish") == parse(hidden_act="silu")


def test_absent_and_null_keys_take_the_familys_defaults() -> None:
    assert parse_without("num_key_value_heads").geometry.kv_heads == 6
    assert parse_without("rope_theta").attention.rope == RopeConfig(10_000.0)
    assert parse(head_dim=None).geometry.head_dim == 6
    assert parse(head_dim=10).geometry.head_dim == 10
    assert parse(model_type="qwen3").geometry.head_dim == 128
    assert parse(model_type="smollm3").tied_embeddings
    assert not parse(model_type="smollm3", tie_word_embeddings=False).tied_embeddings


def test_families_differ_in_biases_and_norms() -> None:
    biased = parse(attention_bias=True, mlp_bias=True)
    assert biased.attention.qkv_bias
    assert biased.attention.output_bias
    assert biased.layers[0].feed_forward == DensePlan(77, bias=True)
    qwen2 = parse(model_type="qwen2")
    assert qwen2.attention.qkv_bias
    assert not qwen2.attention.output_bias
    assert parse(model_type="qwen3").attention.qk_norm
    assert not parse(model_type="mistral", attention_bias=True).attention.qkv_bias


def rotated(config: ModelPlan) -> tuple[bool, ...]:
    return tuple(layer.mixer is not None and bool(layer.mixer.rope) for layer in config.layers)


def test_smollm3_leaves_out_rope_in_every_fourth_layer_or_where_the_file_says() -> None:
    five = parse(model_type="smollm3", num_hidden_layers=5)
    assert rotated(five) == (True, True, True, False, True)
    given = parse(model_type="smollm3", no_rope_layers=[0, 1, 0, 1])
    assert rotated(given) == (False, True, False)


@pytest.mark.parametrize(
    ("scaling", "context", "expected"),
    [
        ({"type": "linear", "factor": 4.0}, 4096, RopeConfig(500_000.0, "linear", 4.0)),
        (LLAMA3_SCALING, 4096, RopeConfig(500_000.0, "llama3", 8.0, 512, 1.0, 4.0)),
        # yarn's files keep the trained length; the extended one is factor times that
        ({"type": "yarn", "factor": 4.0}, 16384, RopeConfig(500_000.0, "yarn", 4.0, 4096)),
        (
            {"rope_type": "yarn", "factor": 2, "original_max_position_embeddings": 512},
            4096,
            RopeConfig(500_000.0, "yarn", 2.0, 512),
        ),
        (
            {"rope_type": "yarn", "factor": 2, "attention_factor": 1.25, "beta_fast": 16},
            8192,
            RopeConfig(500_000.0, "yarn", 2.0, 4096, beta_fast=16.0, attention_factor=1.25),
        ),
    ],
)
def test_old_and_new_forms_of_rope_agree(
    scaling: dict[str, Any], context: int, expected: RopeConfig
) -> None:
    old = parse(rope_scaling=scaling)
    new = parse(rope_theta=None, rope_parameters={**scaling, "rope_theta": 500_000.0})
    assert old == new
    assert old.attention.rope == expected
    assert old.max_context_tokens == context


def test_yarn_magnitudes_may_be_weighted() -> None:
    scaling = {"type": "yarn", "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.707}
    rope = parse(rope_scaling=scaling).attention.rope
    assert rope is not None
    assert rope.scale == pytest.approx(1.36889 / 1.26080, rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "context"),
    [
        ({"model_type": "mistral", "sliding_window": 1000}, 1000),
        ({"model_type": "mistral", "sliding_window": None}, 32768),
        ({"model_type": "mistral"}, 4096),
        ({"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 1000}, 32768),
        ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 1000}, 32768),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 0},
            4096,
        ),
        (
            {
                "model_type": "qwen3",
                "use_sliding_window": True,
                "sliding_window": 1000,
                "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            },
            1000,
        ),
        (
            {
                "model_type": "qwen3",
                "use_sliding_window": True,
                "sliding_window": 1000,
                "max_window_layers": 0,
                "layer_types": ["full_attention"] * 3,
            },
            32768,
        ),
        ({"model_type": "smollm3", "use_sliding_window": True, "sliding_window": 9}, 32768),
        (
            {
                "model_type": "smollm3",
                "use_sliding_window": True,
                "sliding_window": 9,
                "no_rope_layer_interval": 2,
            },
            9,
        ),
        ({"sliding_window": 1000}, 32768),
    ],
)
def test_a_context_ends_where_sliding_windows_begin(changes: dict[str, Any], context: int) -> None:
    assert parse(max_position_embeddings=32768, **changes).max_context_tokens == context


def test_stop_tokens_come_from_the_generation_config_first() -> None:
    assert parse().eos_token_ids == (2,)
    assert parse({"eos_token_id": [5, 0]}).eos_token_ids == (5, 0)
    assert parse({"eos_token_id": 0}).eos_token_ids == (0,)
    assert parse({"eos_token_id": None}).eos_token_ids == (2,)
    assert parse_without("eos_token_id").eos_token_ids == ()


def test_weight_bytes_follow_from_the_parameter_count() -> None:
    config = parse()
    layer = 36 * (36 + 60 + 3 * 77 + 2)
    assert config.parameter_count() == 2 * 101 * 36 + 3 * layer + 36
    assert config.weight_bytes(2) == 2 * config.parameter_count()
    assert config.parameter_count() - parse(tie_word_embeddings=True).parameter_count() == 101 * 36


@pytest.mark.parametrize(
    "key",
    [
        "model_type",
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "max_position_embeddings",
        "rms_norm_eps",
    ],
)
def test_a_missing_key_is_named(key: str) -> None:
    with pytest.raises(CheckpointError) as error:
        parse_without(key)
    assert str(error.value) == (
        f"m/config.json has no '{key}', which is needed to build the model. "
        "Download the file again, or take the model from another source."
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"num_hidden_layers": 10**9},
            "'num_hidden_layers' in m/config.json is 1,000,000,000, more than any model has "
            "(10,000). Download the file again.",
        ),
        (
            {"hidden_size": "36"},
            "'hidden_size' in m/config.json must be a whole number, 1 or more. Got '36'.",
        ),
        (
            {"num_hidden_layers": True},
            "'num_hidden_layers' in m/config.json must be a whole number, 1 or more. Got True.",
        ),
        (
            {"rms_norm_eps": float("nan")},
            "'rms_norm_eps' in m/config.json must be a number above 0. Got nan.",
        ),
        (
            {"rope_scaling": "linear"},
            "'rope_scaling' in m/config.json must be an object. Got 'linear'.",
        ),
        (
            {"layer_types": "full"},
            "'layer_types' in m/config.json must be a list. Got 'full'.",
        ),
        (
            {"model_type": "smollm3", "no_rope_layers": [1]},
            "'no_rope_layers' in m/config.json must have an entry for each of 3 layers. Got 1.",
        ),
        (
            {"num_key_value_heads": 4},
            "m/config.json must have a multiple of KV heads as query heads, and an even head_dim. "
            "Got 6 query heads, 4 KV heads, head_dim 6.",
        ),
        (
            {"head_dim": 5},
            "m/config.json must have a multiple of KV heads as query heads, and an even head_dim. "
            "Got 6 query heads, 2 KV heads, head_dim 5.",
        ),
        (
            {"rope_scaling": {"type": "linear"}},
            "m/config.json has no 'factor', which is needed to build the model. "
            "Download the file again, or take the model from another source.",
        ),
    ],
)
def test_an_impossible_value_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError) as error:
        parse(**changes)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("changes", "what", "supported"),
    [
        (
            {"model_type": "mamba"},
            "the model type 'mamba'",
            "llama (Llama 2 and 3, SmolLM2), mistral (Mistral), qwen2 (Qwen2 and 2.5), "
            "qwen3 (Qwen3), smollm3 (SmolLM3)",
        ),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "rotary embedding of type 'dynamic'",
            "default, linear, llama3, yarn",
        ),
        (
            {"rope_parameters": {"rope_type": "longrope"}},
            "rotary embedding of type 'longrope'",
            "default, linear, llama3, yarn",
        ),
        ({"partial_rotary_factor": 0.5}, "rotary embedding of 0.5 of a head", "all of it"),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}},
            "rotary embeddings that differ by layer type",
            "one for all",
        ),
        ({"hidden_act": "gelu"}, "the activation 'gelu'", "silu"),
        (
            {"quantization_config": {"quant_method": "awq", "bits": 4}},
            "quantized weights (awq)",
            "float32, bfloat16 and float16 weights",
        ),
        (
            {"model_type": "qwen3", "layer_types": ["linear_attention", "full_attention"]},
            "layers of the types ['full_attention', 'linear_attention']",
            "full_attention, sliding_attention",
        ),
    ],
)
def test_what_is_not_implemented_is_refused(
    changes: dict[str, Any], what: str, supported: str
) -> None:
    with pytest.raises(UnsupportedModelError) as error:
        parse(**changes)
    assert str(error.value) == (
        f"m/config.json asks for {what}, which is not supported. Supported: {supported}."
    )

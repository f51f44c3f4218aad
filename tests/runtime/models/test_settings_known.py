"""Every setting of a supported family is known here, and the documents say what becomes of it."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import transformers
from gguf.constants import Keys
from tiny_gguf import tiny_config, tiny_state, write_gguf

from nearfar.errors import CheckpointError, UnsupportedModelError
from nearfar.runtime.checkpoints import gguf_keys
from nearfar.runtime.checkpoints.gguf_file import GgufFile
from nearfar.runtime.checkpoints.model_config import parse_config
from nearfar.runtime.models import config_keys
from nearfar.runtime.models.families.registry import BUILT_IN
from nearfar.runtime.models.plan import ModelPlan
from nearfar.runtime.models.rope import RopeConfig

PAGE = (Path(__file__).parents[3] / "docs" / "models.md").read_text(encoding="utf-8")


def parse(**changes: Any) -> ModelPlan:
    return parse_config(tiny_config() | changes, "m/config.json")


def refusal(**changes: Any) -> str:
    with pytest.raises(UnsupportedModelError) as error:
        parse(**changes)
    return str(error.value)


@pytest.mark.parametrize("family", BUILT_IN)
def test_every_field_of_a_familys_config_in_transformers_is_known(family: str) -> None:
    config = transformers.AutoConfig.for_model(family)
    fields = {*config.to_dict(), *config.__dict__} - {"model_type"}
    unknown = {key for key in fields if config_keys.effect_of(key) == "unknown"}
    assert not unknown
    saved = config.to_dict() | {"model_type": family, "sliding_window": None}
    assert len(parse_config(saved, "c").layers) == config.num_hidden_layers


def test_every_key_that_llama_cpp_reads_of_rotary_embedding_and_attention_is_known_or_refused() -> (
    None
):
    keys = [key for kind in (Keys.Rope, Keys.Attention) for key in vars(kind).values()]
    names = [key.removeprefix("{arch}.") for key in keys if str(key).startswith("{arch}.")]
    assert len(names) > 30
    for name in names:
        if gguf_keys.effect_of(name) in ("refused", "unknown"):
            assert gguf_keys.refused_key({name: 0.37}, 0.25) == name or name == "attention.causal"


def test_the_documents_name_every_key() -> None:
    for table in (config_keys, gguf_keys):
        for name in {*table.USED, *table.REFUSED, *table.NO_EFFECT}:
            assert f"`{name}`" in PAGE, name
    for name, kinds in config_keys.ROPE_USED.items():
        assert f"| `{name}` | {', '.join(kinds)} |" in PAGE


@pytest.mark.parametrize(
    ("key", "value", "same"),
    [
        ("attn_logit_softcapping", 50.0, None),
        ("logit_scale", 0.0625, 1.0),
        ("residual_multiplier", 0.22, 1),
        ("is_causal", False, True),
        ("causal", False, None),
        ("use_rope", False, True),
        ("use_dynamic_ntk", True, False),
        ("use_logn_attn", True, False),
        ("dual_chunk_attention_config", {"chunk_size": 9}, {}),
        ("num_local_experts", 8, 0),
        ("rope_interleaved", True, False),
        ("my_attention_temperature", 2.0, 0),
    ],
)
def test_a_setting_that_changes_results_is_refused_unless_off(
    key: str, value: Any, same: Any
) -> None:
    message = refusal(**{key: value})
    assert message.startswith(f"m/config.json asks for {key} = {value!r}, which is not supported")
    assert parse(**{key: same}) == parse()


def test_an_unknown_note_is_ignored_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert parse(made_with="x", torch_dtype="bfloat16") == parse()
    assert caplog.messages == [
        "m/config.json has settings that nearfar does not know: made_with. They are ignored."
    ]


@pytest.mark.parametrize(
    ("changes", "method"),
    [
        ({"quantization": {"group_size": 64, "bits": 4}}, "MLX, 4 bits"),
        ({"compression_config": {"format": "pack-quantized"}}, "compressed-tensors"),
        ({"quantization_config": {"load_in_4bit": True}}, "bitsandbytes"),
        ({"quantization_config": {"quant_method": "fp8"}}, "fp8"),
    ],
)
def test_quantisation_in_a_config_is_named(changes: dict[str, Any], method: str) -> None:
    assert f"asks for quantized weights ({method})" in refusal(**changes)


def test_a_flag_must_be_one() -> None:
    with pytest.raises(
        CheckpointError, match=r"'tie_word_embeddings' in m/config\.json must be true"
    ):
        parse(tie_word_embeddings="false")


YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 200}


def test_rope_scaling_added_beside_rope_parameters_counts_and_keeps_the_base() -> None:
    new = {"rope_type": "default", "rope_theta": 1e6}
    both = parse(rope_theta=None, rope_parameters=new, rope_scaling=YARN)
    assert both.attention.rope == RopeConfig(1e6, "yarn", 4.0, 200)
    assert both.max_context_tokens == 800
    plain = replace(both.attention, rope=RopeConfig(1e6))
    assert parse(rope_theta=None, rope_parameters=new, rope_scaling={}).attention == plain


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        ({"factor": 4.0}, "rotary embedding with a factor of 4.0 and no rope_type"),
        ({"type": "yarn", "rope_type": "default"}, "type 'default' (rope_type) and 'yarn' (type)"),
        ({"type": "linear", "factor": 2.0, "beta_fast": 8}, "'beta_fast' in rotary embedding of"),
        ({"rope_type": "default", "mrope_section": [1, 2]}, "'mrope_section' in rotary embedding"),
    ],
)
def test_a_rotary_setting_that_its_type_does_not_read_is_refused(
    scaling: dict[str, Any], expected: str
) -> None:
    assert expected in refusal(rope_scaling=scaling)


def test_harmless_rotary_settings_are_taken() -> None:
    assert parse(rope_scaling=YARN | {"finetuned": True, "mscale": 0}) == parse(rope_scaling=YARN)
    assert parse(rope_scaling={"rope_type": "default", "factor": 1.0}) == parse()


def gguf(folder: Path, **metadata: Any) -> GgufFile:
    config = tiny_config()
    return GgufFile(write_gguf(folder / "t.gguf", config, tiny_state(config), metadata=metadata))


@pytest.mark.parametrize(
    ("key", "value", "same"),
    [
        ("attention.scale", 0.5, 32**-0.5),
        ("logit_scale", 0.1, 1.0),
        ("rope.scaling.attn_factor", 0.5, 1.0),
        ("rope.scaling.yarn_ext_factor", 0.5, -1.0),
        ("final_logit_softcapping", 30.0, 0.0),
        ("attention.temperature_scale", 0.1, 0.0),
        ("a_key_of_tomorrow", 3, 0),
    ],
)
def test_a_gguf_setting_that_changes_results_is_refused_unless_off(
    tmp_path: Path, key: str, value: float, same: float
) -> None:
    with pytest.raises(UnsupportedModelError, match=rf"has the setting llama\.{key} = {value}"):
        gguf(tmp_path, **{key: value})
    assert parse_config(gguf(tmp_path, **{key: same}).config, "g") == parse()


@pytest.mark.parametrize("key", ["rope.scale_linear", "rope.scaling.factor"])
def test_a_gguf_factor_without_a_type_is_linear(tmp_path: Path, key: str) -> None:
    rope = parse_config(gguf(tmp_path, **{key: 4.0}).config, "g").attention.rope
    assert rope == RopeConfig(50_000.0, "linear", 4.0)
    off = gguf(tmp_path, **{key: 4.0, "rope.scaling.type": "none"})
    assert parse_config(off.config, "g").attention.rope == RopeConfig(50_000.0)

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tiny_gguf import tiny_config, tiny_state, write_gguf

from nearfar.errors import CheckpointError, UnsupportedModelError
from nearfar.runtime.checkpoints.gguf_file import GgufFile
from nearfar.runtime.checkpoints.model_config import parse_config
from nearfar.runtime.models.rope import RopeConfig, inverse_frequencies


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("llama", {}),
        ("llama", {"attention_bias": True, "tie_word_embeddings": False}),
        ("qwen2", {}),
        ("smollm3", {}),
        ("smollm3", {"tie_word_embeddings": False}),
        ("qwen3", {"tie_word_embeddings": False}),
    ],
)
def test_file_has_the_config_and_the_tensors_it_was_written_from(
    tmp_path: Path, architecture: str, changes: dict[str, Any]
) -> None:
    config = tiny_config(architecture, **changes)
    state = tiny_state(config)
    file = GgufFile(write_gguf(tmp_path / "tiny.gguf", config, state))
    parsed = parse_config(file.config, "gguf")
    assert parsed == parse_config(config, "folder")
    file.check_complete(parsed)
    assert file.num_tensors == len(state)
    for name, expected in state.items():
        assert torch.equal(file.tensor(name), expected), name


@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q4_1"])
def test_quantised_tensors_are_near_the_originals(tmp_path: Path, kind: str) -> None:
    config = tiny_config()
    state = tiny_state(config)
    quantised = gguf.GGMLQuantizationType[kind]
    file = GgufFile(write_gguf(tmp_path / "tiny.gguf", config, state, quantised))
    step = {"F16": 0.001, "Q8_0": 0.02, "Q4_1": 0.3}[kind]
    for name in ("model.layers.4.self_attn.k_proj.weight", "model.embed_tokens.weight"):
        error = (file.tensor(name) - state[name]).abs().max()
        assert 0 < error < step


def test_tensor_that_is_not_there_is_a_key_error(tmp_path: Path) -> None:
    config = tiny_config()
    file = GgufFile(write_gguf(tmp_path / "tiny.gguf", config, tiny_state(config)))
    with pytest.raises(KeyError, match="lm_head"):
        file.tensor("lm_head.weight")


def test_file_cut_anywhere_is_not_whole(tmp_path: Path) -> None:
    config = tiny_config()
    content = write_gguf(tmp_path / "tiny.gguf", config, tiny_state(config)).read_bytes()
    cut = tmp_path / "cut.gguf"
    steps = np.geomspace(1, len(content) - 1, 40).astype(int)
    for length in [0, 3, 4, 23, 24, len(content) // 2, len(content) - 1, *steps]:
        cut.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=r"cut\.gguf is not a whole GGUF file: .+\. Del"):
            GgufFile(cut)


@pytest.mark.parametrize("offset", [4, 8, 16, 24, 40])
def test_file_with_a_damaged_header_is_refused(tmp_path: Path, offset: int) -> None:
    config = tiny_config()
    path = write_gguf(tmp_path / "tiny.gguf", config, tiny_state(config))
    content = bytearray(path.read_bytes())
    content[offset : offset + 8] = b"\xff" * 7 + b"\x7f"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="not a whole GGUF file"):
        GgufFile(path)


@pytest.mark.parametrize(
    ("kind", "item"),
    [(gguf.GGUFValueType.UINT8, b"a"), (gguf.GGUFValueType.STRING, bytes(8))],
    ids=["numbers", "strings"],
)
def test_a_damaged_length_of_an_array_is_seen_before_its_items(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: gguf.GGUFValueType, item: bytes
) -> None:
    calls: list[int] = []
    get = gguf.GGUFReader._get

    def counted(reader: Any, offset: int, *how: Any) -> Any:
        calls.append(offset)
        return get(reader, offset, *how)

    monkeypatch.setattr(gguf.GGUFReader, "_get", counted)
    path, key, count = tmp_path / "tiny.gguf", b"tokenizer.ggml.tokens", 5000
    length = count + 1 + (kind == gguf.GGUFValueType.UINT8)  # a byte more is what aligns the file
    head = struct.pack("<4sIQQQ", b"GGUF", 3, 0, 1, len(key)) + key
    path.write_bytes(head + struct.pack("<IIQ", 9, kind, length) + item * count)
    with pytest.raises(CheckpointError, match="is not a whole GGUF file: it ends in the middle"):
        GgufFile(path)
    assert len(calls) < 30


def test_missing_metadata_is_named(tmp_path: Path) -> None:
    config = tiny_config()
    path = tmp_path / "tiny.gguf"
    write_gguf(path, config, tiny_state(config), leave_out="block_count")
    with pytest.raises(CheckpointError, match=r"has no metadata 'llama\.block_count'"):
        GgufFile(path)


def test_missing_tensor_is_noticed_before_anything_is_decoded(tmp_path: Path) -> None:
    config = tiny_config()
    path = tmp_path / "tiny.gguf"
    file = GgufFile(write_gguf(path, config, tiny_state(config), leave_out="blk.3.ffn_up.weight"))
    with pytest.raises(
        CheckpointError, match=r"no tensor 'model\.layers\.3\.mlp\.up_proj\.weight'"
    ):
        file.check_complete(parse_config(file.config, "gguf"))
    write_gguf(path, config, tiny_state(config), leave_out="token_embd.weight")
    with pytest.raises(CheckpointError, match=r"has no tensor 'token_embd\.weight'"):
        GgufFile(path)


def test_tensor_that_would_be_ignored_is_refused(tmp_path: Path) -> None:
    config = tiny_config()
    extra = {"blk.0.attn_sinks": np.ones(6, np.float32)}
    file = GgufFile(write_gguf(tmp_path / "t.gguf", config, tiny_state(config), tensors=extra))
    with pytest.raises(UnsupportedModelError, match=r"1 tensor that llama does not use \(blk\.0"):
        file.check_complete(parse_config(file.config, "gguf"))


def test_unknown_architecture_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mamba.gguf"
    writer = gguf.GGUFWriter(path, "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    expected = r"the architecture 'mamba', which is not supported\. Supported: llama, qwen2, "
    with pytest.raises(UnsupportedModelError, match=expected):
        GgufFile(path)


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"expert_count": 8}, "experts, or layers that differ in size"),
        ({"rope.dimension_count": 16}, r"dimensions but rope\.dimension_count of 16"),
        ({"rope.scaling.type": "longrope"}, "rotary scaling 'longrope'"),
        ({"split.count": 3}, "only a part of the model"),
    ],
)
def test_feature_that_is_not_implemented_is_refused(
    tmp_path: Path, metadata: dict[str, Any], expected: str
) -> None:
    config = tiny_config()
    path = write_gguf(tmp_path / "t.gguf", config, tiny_state(config), metadata=metadata)
    with pytest.raises(UnsupportedModelError, match=expected):
        GgufFile(path)


def test_rotary_scaling_is_read(tmp_path: Path) -> None:
    config, path = tiny_config(), tmp_path / "t.gguf"
    linear = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
    write_gguf(path, config, tiny_state(config), metadata=linear)
    assert parse_config(GgufFile(path).config, "t").attention.rope == RopeConfig(
        50_000.0, "linear", 4.0
    )
    yarn = linear | {"rope.scaling.type": "yarn", "rope.scaling.original_context_length": 200}
    write_gguf(path, config, tiny_state(config), metadata=yarn)
    parsed = parse_config(GgufFile(path).config, "t")
    assert parsed.attention.rope == RopeConfig(50_000.0, "yarn", 4.0, 200)
    assert parsed.max_context_tokens == 800


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_frequency_divisors_of_llama_3_become_its_scaling(tmp_path: Path, factor: float) -> None:
    config, path = tiny_config(rope_theta=500_000.0), tmp_path / "t.gguf"
    scaled = RopeConfig(500_000.0, "llama3", factor, 8192)
    divisors = inverse_frequencies(RopeConfig(500_000.0), 32) / inverse_frequencies(scaled, 32)
    tensors = {"rope_freqs.weight": divisors.numpy()}
    write_gguf(path, config, tiny_state(config), tensors=tensors)
    file = GgufFile(path)
    parsed = parse_config(file.config, "t")
    assert parsed.attention.rope == scaled
    file.check_complete(parsed)
    tensors["rope_freqs.weight"][7] *= 1.1
    write_gguf(path, config, tiny_state(config), tensors=tensors)
    with pytest.raises(UnsupportedModelError, match="frequency divisors of its own"):
        GgufFile(path)

"""Every tensor and file of a model's folder is used or refused by name, never passed over."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_engine import read, tiny_engine
from tiny_gguf import tiny_config, tiny_state, write_folder
from torch import Tensor

from nearfar.errors import CheckpointError, ModelError
from nearfar.runtime.checkpoints.checkpoint import Checkpoint
from nearfar.runtime.checkpoints.model_source import open_source
from nearfar.runtime.models.weights import Weights
from nearfar.runtime.text.token_range import check_token_ids

State = dict[str, Tensor]
ATTENTION = "model.layers.0.self_attn."


def write(folder: Path, change: Callable[[State], State], **config: Any) -> Path:
    content = tiny_config(**config)
    return write_folder(folder, content, change(tiny_state(content)))


def load(folder: Path) -> Weights:
    return Checkpoint(folder).load(torch.float32, torch.device("cpu"))


def refusal(folder: Path) -> str:
    with pytest.raises(ModelError) as error:
        load(folder)
    return str(error.value)


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        ({ATTENTION + "q_proj.bias": (3,)}, "the config does not announce these biases"),
        ({"model.layers.5.mlp.up_proj.weight": (2, 2)}, "there are 5 layers, and the weights have"),
        ({ATTENTION + "q_proj.lora_A.weight": (2, 2)}, "they are of an adapter"),
        ({"model.layers.0.mlp.shared_expert.up_proj.weight": (2, 2)}, "do not use them"),
        ({"score.weight": (2, 64)}, "llama models with this config do not use them"),
    ],
)
def test_a_tensor_that_would_be_ignored_is_refused(
    tmp_path: Path, extra: dict[str, tuple[int, ...]], reason: str
) -> None:
    made = {name: torch.ones(shape) for name, shape in extra.items()}
    message = refusal(write(tmp_path / "m", lambda state: state | made))
    assert f"has 1 tensor that would be ignored ({next(iter(extra))}): " in message
    assert reason in message


def test_tables_that_follow_from_the_config_are_passed_over(tmp_path: Path) -> None:
    tables = {ATTENTION + "rotary_emb.inv_freq": torch.ones(16)}
    load(write(tmp_path / "m", lambda state: state | tables))


@pytest.mark.parametrize(
    ("rename", "tool"),
    [
        ("qweight", "GPTQ or AWQ"),
        ("weight_scale_inv", "FP8"),
        ("weight_packed", "compressed-tensors"),
        ("scales", "MLX"),
        ("trellis", "EXL3"),
        ("W_q", "HQQ"),
        ("weight.absmax", "bitsandbytes"),
    ],
)
def test_weights_of_another_tool_are_named(tmp_path: Path, rename: str, tool: str) -> None:
    name = ATTENTION + f"q_proj.{rename}"
    folder = write(tmp_path / "m", lambda state: state | {name: torch.ones(3)})
    assert refusal(folder) == (
        f"{folder} is quantised ({tool}, by {name}), which is not read. Take the model's weights "
        "in float32, bfloat16 or float16, or a GGUF file of it."
    )


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.int32])
def test_packed_types_without_a_config_are_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    name = ATTENTION + "q_proj.weight"
    folder = write(tmp_path / "m", lambda state: state | {name: state[name].to(dtype)})
    assert "is quantised (weights of type" in refusal(folder)


@pytest.mark.parametrize(
    ("file", "tool"), [("quantize_config.json", "GPTQ"), ("hf_quant_config.json", "ModelOpt")]
)
def test_files_of_another_tool_are_named(tmp_path: Path, file: str, tool: str) -> None:
    folder = write(tmp_path / "m", lambda state: state)
    (folder / file).write_text("{}")
    assert f"is quantised ({tool}" in refusal(folder).replace("NVIDIA ", "")


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: name.removeprefix("model."),
        lambda name: "_orig_mod." + name,
        lambda name: "module." + name.replace("layers.", "layers._orig_mod."),
    ],
)
def test_names_with_wrappers_or_without_a_prefix_load(
    tmp_path: Path, rename: Callable[[str], str]
) -> None:
    plain = load(write(tmp_path / "a", lambda state: state))
    folder = write(tmp_path / "b", lambda state: {rename(k): v for k, v in state.items()})
    assert all(torch.equal(plain[name], value) for name, value in load(folder).items())


def test_a_tied_model_keeps_a_head_of_its_own(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    head = {"lm_head.weight": torch.ones_like(tiny_state(tiny_config())[EMBEDDING])}
    folder = write(tmp_path / "m", lambda state: state | head)
    assert not Checkpoint(folder).config.tied_embeddings
    assert torch.equal(load(folder)["head"], head["lm_head.weight"])
    assert "the weights have a head of their own. It is used." in caplog.text


EMBEDDING = "model.embed_tokens.weight"


def test_a_tied_model_may_have_its_head_twice_or_alone(tmp_path: Path) -> None:
    twice = write(tmp_path / "a", lambda s: s | {"lm_head.weight": s[EMBEDDING].clone()})
    alone = write(
        tmp_path / "b",
        lambda s: {"lm_head.weight" if k == EMBEDDING else k: v for k, v in s.items()},
    )
    for folder in (twice, alone):
        weights = load(folder)
        assert "head" not in weights
        assert torch.equal(weights["embedding"], tiny_state(tiny_config())[EMBEDDING])


def test_weights_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    nan = {"model.norm.weight": torch.full((64,), float("nan"))}
    folder = write(tmp_path / "m", lambda state: state | nan)
    assert "The tensor 'model.norm.weight' has NaN or infinite numbers in float32" in refusal(
        folder
    )


def test_an_adapter_is_refused_alone_and_beside_a_model(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", lambda state: state)
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "some/base"}')
    assert "has an adapter for some/base (adapter_config.json) beside the model" in refusal(folder)
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    assert "holds an adapter for some/base (adapter_config.json), not a whole" in refusal(folder)


def test_links_to_nothing_and_pointers_are_named(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", lambda state: state)
    file = folder / "model.safetensors"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert "is not the file itself but a pointer to it, left by Git LFS" in refusal(folder)
    file.unlink()
    for name in ("tokenizer.json", "model.safetensors", "config.json"):
        (folder / name).unlink(missing_ok=True)
        (folder / name).mkdir()
        said = refusal(folder)
        assert said.endswith(
            f"{name} is a folder, and a file of the model should be there. "
            "Download the model again."
        )
        (folder / name).rmdir()
    file.symlink_to("nowhere")
    with pytest.raises(CheckpointError, match="is a link to nowhere, which is not there"):
        open_source(str(folder))


def test_a_file_that_the_index_does_not_name_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", lambda state: state)
    (folder / "model.fp16.safetensors").write_bytes(b"a copy for others")
    load(folder)
    (folder / "model-00002-of-00002.safetensors").write_bytes(b"")
    assert "do not belong to model.safetensors: model-00002-of-00002.saf" in refusal(folder)


def test_odd_indexes_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", lambda state: state)
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    index = folder / "model.safetensors.index.json"
    for odd in ("../m/a.safetensors", 3):
        index.write_text(json.dumps({"weight_map": {"x": odd}}))
        assert f"a file of its own folder. Got {odd!r} for 'x'" in refusal(folder)
    save_file({EMBEDDING: state[EMBEDDING]}, folder / "b.safetensors")
    index.write_text(json.dumps({"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}))
    assert f"has the tensor '{EMBEDDING}' twice, in a.safetensors and b.saf" in refusal(folder)


def test_a_config_may_start_with_a_byte_order_mark(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", lambda state: state)
    config = folder / "config.json"
    config.write_bytes(b"\xef\xbb\xbf" + config.read_bytes())
    load(folder)


def test_a_token_beyond_the_embedding_is_refused() -> None:
    check_token_ids([0, 6], 7)
    for beyond in (7, -1):
        with pytest.raises(
            CheckpointError, match=rf"the token {beyond}, and the model's embedding"
        ):
            check_token_ids([0, beyond], 7)
    engine = tiny_engine()
    with pytest.raises(CheckpointError, match="rows for tokens 0 to"):
        read(engine, torch.tensor([0, engine.model_config.vocab_size]))

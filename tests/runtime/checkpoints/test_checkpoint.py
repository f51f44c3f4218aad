"""Folders load whole, in shards and in every type, or say what is wrong with them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import MODELS, build

from nearfar.errors import CheckpointError
from nearfar.runtime.checkpoints.checkpoint import load_directory, read_directory_config
from nearfar.runtime.checkpoints.model_config import parse_config
from nearfar.runtime.models.weights import (
    Weights,
    assemble,
    checked_weights,
    random_weights,
    total_bytes,
)

CPU = torch.device("cpu")


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Weights:
    return load_directory(folder, dtype, CPU)[1]


def error_of(folder: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        load(folder)
    return str(error.value)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    build("llama3", tmp_path)
    return tmp_path


def test_shards_give_what_one_file_gives(tmp_path: Path) -> None:
    build("qwen2", tmp_path / "one").save_pretrained(tmp_path / "many", max_shard_size="20KB")
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 2
    one, many = (load(tmp_path / name) for name in ("one", "many"))
    assert one.keys() == many.keys()
    assert all(torch.equal(one[name], many[name]) for name in one)


def test_projections_are_fused_in_order(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    weights = load(folder)
    named = [state[f"model.layers.2.self_attn.{name}_proj.weight"] for name in ("q", "k", "v")]
    assert torch.equal(weights["layers.2.qkv"], torch.cat(named))
    named = [state[f"model.layers.2.mlp.{name}_proj.weight"] for name in ("gate", "up")]
    assert torch.equal(weights["layers.2.gate_up"], torch.cat(named))
    assert "layers.2.qkv_bias" not in weights


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_weights_are_converted(folder: Path, dtype: torch.dtype) -> None:
    weights = load(folder, dtype)
    assert {tensor.dtype for tensor in weights.values()} == {dtype}
    stored = load_file(folder / "model.safetensors")["lm_head.weight"]
    assert torch.equal(weights["head"], stored.to(dtype))
    config = read_directory_config(folder)
    assert total_bytes(weights) == config.weight_bytes(dtype.itemsize)


def test_weights_outlive_their_file(folder: Path) -> None:
    weights = load(folder)
    before = weights["embedding"].clone()
    with (folder / "model.safetensors").open("r+b") as file:
        file.write(bytes((folder / "model.safetensors").stat().st_size))
    assert torch.equal(weights["embedding"], before)


@pytest.mark.parametrize("name", MODELS)
def test_the_fused_layout_goes_to_a_file_and_back_without_copies(name: str, tmp_path: Path) -> None:
    build(name, tmp_path)
    config, weights = load_directory(tmp_path, torch.bfloat16, CPU)
    save_file(dict(weights), tmp_path / "fused.safetensors")
    stored = load_file(tmp_path / "fused.safetensors")
    back = checked_weights(stored, config)
    assert back.keys() == weights.keys()
    assert all(back[key] is stored[key] for key in back)
    assert all(torch.equal(back[key], value) for key, value in weights.items())
    assert ("head" not in back) == config.tied_embeddings


def test_the_fused_layout_must_fit_the_config(folder: Path) -> None:
    config, weights = load_directory(folder, torch.float32, CPU)
    tensors = dict(weights)
    tensors["layers.1.qkv"] = tensors["layers.1.qkv"][1:]
    with pytest.raises(CheckpointError, match=r"'layers\.1\.qkv' must have shape \(160, 36\)"):
        checked_weights(tensors, config)
    del tensors["norm"]
    with pytest.raises(CheckpointError, match="no tensor 'norm'"):
        checked_weights(tensors, config)


def test_tensors_may_come_from_a_function(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    config = read_directory_config(folder)
    asked: list[str] = []

    def read(name: str) -> torch.Tensor:
        asked.append(name)
        return state[name]

    weights = assemble(read, config, torch.float32, CPU)
    assert sorted(asked) == sorted(state)
    assert torch.equal(weights["layers.0.down"], state["model.layers.0.mlp.down_proj.weight"])


@pytest.mark.parametrize("name", ["llama-biased", "qwen3"])
def test_random_weights_are_whole_repeatable_and_tame(name: str, tmp_path: Path) -> None:
    build(name, tmp_path)
    config, loaded = load_directory(tmp_path, torch.bfloat16, CPU)
    weights = random_weights(config, torch.bfloat16, CPU, seed=1)
    again = random_weights(config, torch.bfloat16, CPU, seed=1)
    other = random_weights(config, torch.bfloat16, CPU, seed=2)
    shapes = {key: value.shape for key, value in loaded.items()}
    assert {key: value.shape for key, value in weights.items()} == shapes
    assert all(torch.equal(weights[key], again[key]) for key in weights)
    assert not torch.equal(weights["layers.0.qkv"], other["layers.0.qkv"])
    assert weights["layers.0.down"].float().std() == pytest.approx(77**-0.5, rel=0.05)


def test_generation_config_names_the_stop_tokens(folder: Path) -> None:
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    assert read_directory_config(folder).eos_token_ids == (7, 9)
    (folder / "generation_config.json").unlink()
    assert read_directory_config(folder).eos_token_ids == (2,)


def test_the_old_form_of_a_config_loads_the_same(folder: Path) -> None:
    content = json.loads((folder / "config.json").read_text())
    scaling = content.pop("rope_parameters")
    content |= {"rope_theta": scaling.pop("rope_theta"), "rope_scaling": scaling}
    assert parse_config(content, "old") == read_directory_config(folder)


def test_no_folder_and_no_config(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    assert error_of(missing) == (
        f"A model is a folder with config.json and safetensors files. {missing} is no folder."
    )
    assert error_of(tmp_path) == (
        f"{tmp_path} has no config.json. Give the folder of a model in the Hugging Face layout."
    )


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_invalid_json(folder: Path, name: str) -> None:
    (folder / name).write_text('{"model_type": "lla')
    message = error_of(folder)
    assert message.startswith(f"{folder / name} is not valid JSON (Unterminated string")
    assert message.endswith("Download the file again.")
    (folder / name).write_bytes(b"\xff\xfe\x00")
    assert error_of(folder).startswith(f"{folder / name} is not valid JSON ('utf-8' codec")
    (folder / name).write_text("[1]")
    assert error_of(folder) == (
        f"{folder / name} must hold a JSON object. Got a list. Download the file again."
    )


def test_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert error_of(folder) == (
        f"{folder} has no weights: expected model.safetensors or model.safetensors.index.json. "
        "Download the model again."
    )


def test_only_pickled_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert error_of(folder) == (
        f"{folder} has its weights only as pytorch_model.bin, a pickle, which is not read. "
        "Convert them: load the model with transformers and call save_pretrained."
    )


@pytest.mark.parametrize("size", [0, 5, 300, 20_000])
def test_a_truncated_file(folder: Path, size: int) -> None:
    file = folder / "model.safetensors"
    os.truncate(file, size)
    message = error_of(folder)
    assert message.startswith(f"{file} is truncated or corrupt (")
    assert message.endswith(". Delete the file and download it again.")


def test_a_file_of_something_else(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"<html>not found</html>" * 99)
    assert "is truncated or corrupt" in error_of(folder)


def test_a_missing_shard(tmp_path: Path) -> None:
    build("qwen2", tmp_path / "one").save_pretrained(tmp_path, max_shard_size="20KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    shards[1].unlink()
    assert error_of(tmp_path) == (
        f"{tmp_path} lacks 1 of {len(shards)} weight files that model.safetensors.index.json "
        f"names: {shards[1].name}. Download the model again."
    )


def test_an_index_without_a_map(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    index = folder / "model.safetensors.index.json"
    index.write_text("{}")
    assert error_of(folder) == f"{index} has no 'weight_map'. Download the file again."


def test_a_missing_tensor(folder: Path) -> None:
    file = folder / "model.safetensors"
    state = load_file(file)
    del state["model.layers.1.self_attn.k_proj.weight"]
    save_file(state, file)
    assert error_of(folder) == (
        "The checkpoint has no tensor 'model.layers.1.self_attn.k_proj.weight'; its config asks "
        "for one of shape (32, 36). Config and weights must come from the same model."
    )


def test_a_tensor_of_another_shape(folder: Path) -> None:
    file = folder / "model.safetensors"
    state = load_file(file)
    state["model.norm.weight"] = state["model.norm.weight"][:-1].clone()
    save_file(state, file)
    assert error_of(folder) == (
        "The tensor 'model.norm.weight' must have shape (36,) by the checkpoint's config. Got "
        "(35,). Config and weights must come from the same model."
    )

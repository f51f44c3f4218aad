"""A model's folder as Hugging Face lays it out: config.json and safetensors files.

All files are opened, and so checked for truncation, before the first tensor is read. What is read
is mapped, converted and let go, tensor by tensor: beside the weights themselves, memory holds one
tensor of the file. This module fetches nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nearfar.errors import CheckpointError
from nearfar.runtime.model_config import ModelConfig, parse_config
from nearfar.runtime.weights import DecoderWeights, assemble

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def read_directory_config(path: Path) -> ModelConfig:
    """The model in the folder ``path``, without its weights.

    Raises CheckpointError for missing or invalid files, UnsupportedModelError.
    """
    if not path.is_dir():
        raise CheckpointError(
            f"A model is a folder with {CONFIG} and safetensors files. {path} is no folder."
        )
    if not (path / CONFIG).is_file():
        raise CheckpointError(
            f"{path} has no {CONFIG}. Give the folder of a model in the Hugging Face layout."
        )
    generation = path / GENERATION_CONFIG
    return parse_config(
        _read_json(path / CONFIG),
        str(path / CONFIG),
        _read_json(generation) if generation.is_file() else None,
    )


def load_directory(
    path: Path, dtype: torch.dtype, device: torch.device
) -> tuple[ModelConfig, DecoderWeights]:
    """The model in the folder ``path``, its weights converted to ``dtype`` on ``device``.

    Raises CheckpointError for missing, truncated or inconsistent files, UnsupportedModelError.
    """
    config = read_directory_config(path)
    files = _TensorFiles(_weight_files(path))
    return config, assemble(files.read, config, dtype, device)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(
            f"{path} is not valid JSON ({error}). Download the file again."
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path} must hold a JSON object. Got a {type(content).__name__}. "
            "Download the file again."
        )
    return content


def _weight_files(path: Path) -> list[Path]:
    """The safetensors files of a folder: one, or the shards that its index names."""
    if (path / SINGLE).is_file():
        return [path / SINGLE]
    if not (path / INDEX).is_file():
        pickled = sorted(file.name for file in path.glob("pytorch_model*.bin"))
        if pickled:
            raise CheckpointError(
                f"{path} has its weights only as {pickled[0]}, a pickle, which is not read. "
                "Convert them: load the model with transformers and call save_pretrained."
            )
        raise CheckpointError(
            f"{path} has no weights: expected {SINGLE} or {INDEX}. Download the model again."
        )
    shards = _read_json(path / INDEX).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise CheckpointError(f"{path / INDEX} has no 'weight_map'. Download the file again.")
    files = [path / name for name in sorted(set(shards.values()))]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise CheckpointError(
            f"{path} lacks {len(missing)} of {len(files)} weight files that {INDEX} names: "
            f"{', '.join(missing)}. Download the model again."
        )
    return files


class _TensorFiles:
    """Tensors of several safetensors files by name."""

    def __init__(self, files: Iterable[Path]) -> None:
        self._file_of: dict[str, Path] = {}
        for file in files:
            try:
                with safe_open(file, framework="pt") as tensors:
                    self._file_of |= dict.fromkeys(tensors.keys(), file)
            except SafetensorError as error:
                raise CheckpointError(
                    f"{file} is truncated or corrupt ({error}). "
                    "Delete the file and download it again."
                ) from error

    def read(self, name: str) -> Tensor:
        """The tensor ``name``, mapped; KeyError where no file has it.

        The file is opened for each tensor, because a mapping's pages count as this process's memory
        until the mapping goes, and it goes with its last tensor.
        """
        with safe_open(self._file_of[name], framework="pt") as tensors:
            tensor: Tensor = tensors.get_tensor(name)
            return tensor

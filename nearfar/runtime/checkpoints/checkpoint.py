"""A model's folder in the Hugging Face layout: config.json and safetensors files.

All files are opened, and so checked for truncation and for unused tensors, before the first weight
is read. Each tensor is mapped, converted and released: beside the weights themselves, memory holds
one tensor of the file. This module fetches nothing.
"""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import torch

from nearfar.runtime.checkpoints.folder_files import (
    CONFIG,
    GENERATION_CONFIG,
    check_folder,
    read_json,
    weight_files,
)
from nearfar.runtime.checkpoints.model_config import parse_config
from nearfar.runtime.checkpoints.tensor_files import EMBEDDING, HEAD, TensorFiles
from nearfar.runtime.models.plan import ModelPlan
from nearfar.runtime.models.weights import Weights, assemble, checkpoint_shapes

_log = logging.getLogger(__name__)


class Checkpoint:
    """The model in the folder ``path``, completely checked, its weights not read.

    Where a config ties the output head to the embedding and the weights have a head with other
    numbers, the head counts, as in transformers; ``config`` then says so. To know it, both are
    read. Raises CheckpointError for missing, truncated or inconsistent files and
    UnsupportedModelError for what is not implemented.
    """

    def __init__(self, path: Path) -> None:
        config = read_directory_config(path)
        self.files = weight_files(path)
        self._tensors = TensorFiles(path, self.files)
        self.config = self._with_its_head(config, path)
        layout = checkpoint_shapes(self.config)
        if self.config.tied_embeddings and HEAD in self._tensors:
            layout |= {HEAD: layout[EMBEDDING]}  # the same numbers twice
        self._tensors.check(layout, len(self.config.layers), self.config.family)

    def load(self, dtype: torch.dtype, device: torch.device) -> Weights:
        """The weights converted to ``dtype`` on ``device``."""
        return assemble(self._tensors.read, self.config, dtype, device)

    def _with_its_head(self, config: ModelPlan, path: Path) -> ModelPlan:
        if not config.tied_embeddings or HEAD not in self._tensors:
            return config
        if EMBEDDING not in self._tensors:
            self._tensors.use_head_as_embedding()
            return config
        if not self._tensors.head_differs():
            return config
        _log.warning(
            "%s says tie_word_embeddings, but the weights have a head of their own. It is used.",
            path / CONFIG,
        )
        return dataclasses.replace(config, tied_embeddings=False)


def read_directory_config(path: Path) -> ModelPlan:
    """The model that the folder ``path`` describes; its weights are not opened.

    Raises CheckpointError for missing or invalid files, UnsupportedModelError.
    """
    check_folder(path)
    generation = path / GENERATION_CONFIG
    return parse_config(
        read_json(path / CONFIG),
        str(path / CONFIG),
        read_json(generation) if generation.is_file() else None,
    )


def load_directory(
    path: Path, dtype: torch.dtype, device: torch.device
) -> tuple[ModelPlan, Weights]:
    """The model in the folder ``path``, its weights converted to ``dtype`` on ``device``.

    Raises CheckpointError for missing, truncated or inconsistent files, UnsupportedModelError.
    """
    checkpoint = Checkpoint(path)
    return checkpoint.config, checkpoint.load(dtype, device)

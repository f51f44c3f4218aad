"""Tensors of several safetensors files, by the names that the decoder's layout has.

Names are brought to one form: wrappers of training (`_orig_mod.`, `module.`) are removed and a
missing `model.` is added. Every tensor is part of the layout, known to be redundant, or an error
that names it. Opening reads headers alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nearfar.config import counted
from nearfar.errors import CheckpointError, UnsupportedModelError
from nearfar.runtime.checkpoints.folder_files import quantised
from nearfar.runtime.checkpoints.foreign_quantisation import packed_tensor, quantised_by_tensors
from nearfar.runtime.models.weights import missing_tensor, other_shape

Shape = tuple[int, ...]

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_WRAPPERS = re.compile(r"(^|(?<=\.))(_orig_mod|module|_fsdp_wrapped_module)\.")
_BARE = re.compile(r"^(embed_tokens|layers|norm)\.")
# tables that follow from the config; old versions of transformers saved them
_UNNEEDED = re.compile(
    r"\.(rotary_emb\.(inv_freq|cos_cached|sin_cached)|masked_bias|attention_mask|position_ids)$"
)
_LAYER = re.compile(r"^model\.layers\.(\d+)\.")
_COMPARED_ROWS = 4096


class _Stored(NamedTuple):
    file: Path
    name: str  # in the file
    shape: Shape
    dtype: str  # as safetensors calls it


class TensorFiles:
    """Tensors of ``files``, all in ``folder``, by name.

    Raises CheckpointError where a file is damaged or two have the same tensor, and
    UnsupportedModelError where another tool quantised them.
    """

    def __init__(self, folder: Path, files: Iterable[Path]) -> None:
        self._folder = folder
        self._stored: dict[str, _Stored] = {}
        for file in files:
            for stored in _header(file):
                self._add(stored)
        if found := quantised_by_tensors(self._stored):
            raise quantised(folder, *found)
        needed = {name: stored.dtype for name, stored in self._stored.items() if _counts(name)}
        if packed := packed_tensor(needed):
            raise quantised(folder, f"weights of type {needed[packed]}", packed)

    def __contains__(self, name: str) -> bool:
        return name in self._stored

    def read(self, name: str) -> Tensor:
        """The tensor ``name``, mapped; KeyError where no file has it.

        The file is opened for each tensor, because a mapping's pages count as this process's memory
        until the mapping goes, and it goes with its last tensor.
        """
        stored = self._stored[name]
        with safe_open(stored.file, framework="pt") as tensors:
            tensor: Tensor = tensors.get_tensor(stored.name)
            return tensor

    def use_head_as_embedding(self) -> None:
        """Read the head, which a tied model may have saved alone, as the embedding."""
        self._stored[EMBEDDING] = self._stored.pop(HEAD)

    def head_differs(self) -> bool:
        """Whether the head has other numbers than the embedding; both are read."""
        head, embedding = self._stored[HEAD], self._stored[EMBEDDING]
        if head.shape != embedding.shape:
            return True
        with (
            safe_open(head.file, framework="pt") as heads,
            safe_open(embedding.file, framework="pt") as embeddings,
        ):
            first, second = heads.get_slice(head.name), embeddings.get_slice(embedding.name)
            rows = head.shape[0] if head.shape else 0
            for start in range(0, rows, _COMPARED_ROWS):
                stop = min(start + _COMPARED_ROWS, rows)
                if not torch.equal(first[start:stop].float(), second[start:stop].float()):
                    return True
        return False

    def check(self, layout: Mapping[str, Shape], layers: int, family: str) -> None:
        """Raise unless the files have the tensors of ``layout`` and no others.

        ``layers`` and ``family`` are those of the config, for the message.
        """
        for name, shape in layout.items():
            stored = self._stored.get(name)
            if stored is None:
                raise missing_tensor(name, shape)
            if stored.shape != shape:
                raise other_shape(name, shape, stored.shape)
        left = [name for name in self._stored if name not in layout and _counts(name)]
        if left:
            raise self._unused(sorted(left), layers, family)

    def _add(self, stored: _Stored) -> None:
        name = _WRAPPERS.sub("", stored.name)
        name = f"model.{name}" if _BARE.match(name) else name
        if name in self._stored:
            other = self._stored[name]
            raise CheckpointError(
                f"{self._folder} has the tensor {name!r} twice, in {other.file.name} and "
                f"{stored.file.name}, and no rule which one counts. Download the model again."
            )
        self._stored[name] = stored

    def _unused(self, names: list[str], layers: int, family: str) -> UnsupportedModelError:
        numbers = [int(match[1]) for name in names if (match := _LAYER.match(name))]
        reason = f"{family} models with this config do not use them"
        if numbers and max(numbers) >= layers:
            reason = f"by the config there are {layers} layers, and the weights have more"
        elif any(".lora_" in name or ".base_layer." in name for name in names):
            reason = "they are of an adapter, which is not applied; merge it first (peft)"
        elif all(name.endswith(".bias") for name in names):
            reason = "the config does not announce these biases"
        named = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        return UnsupportedModelError(
            f"{self._folder} has {counted(len(names), 'tensor')} that would be ignored ({named}): "
            f"{reason}. Results would differ without them. Take weights and config from the same "
            "model."
        )


def _counts(name: str) -> bool:
    return _UNNEEDED.search(name) is None


def _header(file: Path) -> list[_Stored]:
    try:
        with safe_open(file, framework="pt") as tensors:
            slices = {name: tensors.get_slice(name) for name in list(tensors.keys())}
            return [
                _Stored(file, name, tuple(each.get_shape()), each.get_dtype())
                for name, each in slices.items()
            ]
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file} is truncated or corrupt ({error}). Delete the file and download it again."
        ) from error

"""Resolves `--model` to a config, a tokenizer and weights.

Opening a source reads no weights, because memory is planned between the two. A folder is used where
it is; a GGUF file and a built-in model are converted once and kept in the cache. This module knows
where files are and what they are called, not what they compute.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor

from nearfar.errors import CheckpointError, ModelNameError, UnknownNameError
from nearfar.progress import Progress, silent
from nearfar.runtime.checkpoints.builtin import BUILT_IN, Adapter, BuiltIn, adapter_path
from nearfar.runtime.checkpoints.cache_folder import (
    cache_folder,
    fingerprint,
    locked,
    written_whole,
)
from nearfar.runtime.checkpoints.checkpoint import Checkpoint, read_directory_config
from nearfar.runtime.checkpoints.decoded_weights import decoded_weights
from nearfar.runtime.checkpoints.download import fetch
from nearfar.runtime.checkpoints.folder_files import check_whole
from nearfar.runtime.checkpoints.gguf_file import GgufFile
from nearfar.runtime.checkpoints.gguf_tokenizer import write_gguf_tokenizer
from nearfar.runtime.checkpoints.hub import is_hub_id, snapshot
from nearfar.runtime.checkpoints.model_config import parse_config
from nearfar.runtime.checkpoints.slow_tokenizer import write_slow_tokenizer
from nearfar.runtime.checkpoints.tokenizer_files import DEFINITION, read_tokenizer
from nearfar.runtime.models.plan import ModelPlan
from nearfar.runtime.models.weights import Weights, assemble
from nearfar.runtime.text.tokenizer import Tokenizer

GGUF_MAGIC = b"GGUF"
_OLD_TOKENIZER = (".json", ".model", ".txt")  # what vocabularies and merges are written as
_FORMAT = "1"  # of identities
_CONVERSION = "conversion 3"  # version of checks and output; a new version converts again


class UnknownModelError(UnknownNameError):
    """`--model` is neither a built-in name nor anything else that can be opened."""

    def __init__(self, name: str) -> None:
        super().__init__("model", name, BUILT_IN)
        self.args = (
            f"{self.args[0]} A model can also be a folder in the Hugging Face layout, a .gguf file "
            "or the name organisation/model of one on the Hugging Face hub.",
        )


class ModelSource(ABC):
    """A model that can be loaded.

    ``identity`` is a sha256 in hex over the config and what tells its weights from others: two
    models with the same one compute the same.
    """

    name: str
    config: ModelPlan
    identity: str

    @abstractmethod
    def load_tokenizer(self) -> Tokenizer:
        """The tokenizer; if it must be converted, this is done once."""

    @abstractmethod
    def load_weights(self, dtype: torch.dtype, device: torch.device) -> Weights:
        """The weights in ``dtype`` on ``device``; on the CPU they may be mapped from a file."""


def open_source(model: str, *, progress: Progress = silent) -> ModelSource:
    """The model that ``model`` names.

    A folder in the Hugging Face layout; a GGUF file; a built-in name; a model of the Hugging Face
    hub. ``progress`` counts downloads (bytes) and decoding (tensors). Raises UnknownModelError, or
    a ModelError if the model is missing, damaged, unsupported or out of reach.
    """
    if not model:
        raise UnknownModelError(model)
    path = Path(model).expanduser()
    if path.is_dir():
        return _FolderSource(model, path)
    if path.is_file():
        return _opened_file(model, path, progress)
    if model in BUILT_IN:
        return _built_in(model, BUILT_IN[model], progress)
    if path.suffix == ".gguf" or model.startswith(("/", "./", "../", "~")):
        raise ModelNameError(f"There is no file or folder {path}. Check the path.")
    if is_hub_id(model):
        return _FolderSource(model, snapshot(model))
    raise UnknownModelError(model)


class _FolderSource(ModelSource):
    """A folder in the Hugging Face layout, used where it is."""

    def __init__(self, name: str, path: Path) -> None:
        self.name, self._path = name, path
        self._checkpoint = Checkpoint(path)
        self.config = self._checkpoint.config
        files = [(file.name, fingerprint(file)) for file in self._checkpoint.files]
        self.identity = _digest("folder", (path / "config.json").read_text("utf-8"), files)

    def load_tokenizer(self) -> Tokenizer:
        folder = self._path
        if not (folder / DEFINITION).is_file():
            files = [file for file in sorted(self._path.iterdir()) if file.suffix in _OLD_TOKENIZER]
            name = _digest("tokenizer", [(file.name, fingerprint(file)) for file in files])
            make = partial(write_slow_tokenizer, self._path)
            folder = _made_once(cache_folder("models") / name, make)
        return read_tokenizer(folder, self.config.eos_token_ids)

    def load_weights(self, dtype: torch.dtype, device: torch.device) -> Weights:
        return self._checkpoint.load(dtype, device)


class _GgufSource(ModelSource):
    """A GGUF file, with an adapter or without, kept in the cache as a folder and decoded weights.

    Once it is converted, neither the file nor the adapter is opened again.
    """

    def __init__(
        self,
        name: str,
        identity: str,
        locate: Callable[[], Path],
        adapter: Callable[[], Adapter] | None,
        progress: Progress,
    ) -> None:
        self.name, self.identity = name, identity
        self._locate, self._open_adapter, self._progress = locate, adapter, progress
        converted = cache_folder("models") / _digest(_CONVERSION, identity)
        self._folder = _made_once(converted, self._convert)
        self.config = read_directory_config(self._folder)

    def load_tokenizer(self) -> Tokenizer:
        return read_tokenizer(self._folder, self.config.eos_token_ids)

    def load_weights(self, dtype: torch.dtype, device: torch.device) -> Weights:
        path = self._folder / f"{str(dtype).removeprefix('torch.')}.safetensors"
        return decoded_weights(path, self.config, device, partial(self._decode, dtype))

    @cached_property
    def _file(self) -> GgufFile:
        return GgufFile(self._locate())

    @cached_property
    def _adapter(self) -> Adapter | None:
        return self._open_adapter() if self._open_adapter else None

    def _convert(self, folder: Path) -> None:
        """Write config.json and the tokenizer; all tensors are known to be there and usable."""
        changes = self._adapter.config if self._adapter else {}
        config = self._file.config | changes
        self._file.check_complete(parse_config(config, str(self._file.path)))
        (folder / "config.json").write_text(json.dumps(config, indent=2), "utf-8")
        write_gguf_tokenizer(self._file, folder)

    def _decode(self, dtype: torch.dtype) -> Weights:
        """Weights in host memory; progress counts the file's tensors."""
        read = self._adapter.applied_to(self._file.tensor) if self._adapter else self._file.tensor
        done = 0

        def counted(name: str) -> Tensor:
            nonlocal done
            tensor = read(name)
            done += 1
            self._progress(done, self._file.num_tensors)
            return tensor

        return assemble(counted, self.config, dtype, torch.device("cpu"))


def _opened_file(name: str, path: Path, progress: Progress) -> ModelSource:
    with path.open("rb") as file:
        start = file.read(len(GGUF_MAGIC))
    check_whole([path])
    if start != GGUF_MAGIC:
        raise CheckpointError(
            f"A model that is one file must be GGUF, which starts with {GGUF_MAGIC!r}. {path} "
            f"starts with {start!r}. For a Hugging Face model give its folder."
        )
    path = path.resolve()
    return _GgufSource(name, _digest("gguf", fingerprint(path)), lambda: path, None, progress)


def _built_in(name: str, model: BuiltIn, progress: Progress) -> ModelSource:
    identity = _digest("built-in", model.base.sha256, model.adapter_sha256)
    return _GgufSource(
        name,
        identity,
        lambda: fetch(model.base, progress),
        lambda: Adapter(adapter_path(model), model.adapter_sha256),
        progress,
    )


def _made_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """``folder``, which ``make`` fills at the first use."""
    if not folder.exists():
        with locked(folder):
            if not folder.exists():
                with written_whole(folder) as temporary:
                    temporary.mkdir()
                    make(temporary)
    return folder


def _digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps([_FORMAT, *parts]).encode()).hexdigest()

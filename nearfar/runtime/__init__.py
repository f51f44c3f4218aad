"""The runtime, in rooms: models, checkpoints, text, memory, steps, saved documents, the engine.

Modules that people's scripts imported before there were rooms are still found under their old
names, with a DeprecationWarning.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_MOVED = {
    "answering": "engine.answering",
    "document": "engine.document",
    "gguf_file": "checkpoints.gguf_file",
    "model_config": "checkpoints.model_config",
    "prepared": "engine.prepared",
    "saved.cache": "engine.document_cache",
    "source": "checkpoints.model_source",
    "text_files": "text.text_files",
    "tokenizer": "text.tokenizer",
}


class _Moved(MetaPathFinder, Loader):
    """Finds a module under the name that it had."""

    def find_spec(
        self,
        name: str,
        path: Sequence[str] | None,  # noqa: ARG002  a finder is given both
        target: ModuleType | None = None,  # noqa: ARG002
    ) -> ModuleSpec | None:
        room, _, old = name.partition("nearfar.runtime.")
        return ModuleSpec(name, self) if not room and old in _MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        new = f"{__name__}.{_MOVED[spec.name.removeprefix(f'{__name__}.')]}"
        warnings.warn(f"{spec.name} is {new} now.", DeprecationWarning, stacklevel=2)
        module = import_module(new)
        self._spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._spec  # that of the new name, which importing replaced


sys.meta_path.append(_Moved())

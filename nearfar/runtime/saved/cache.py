"""Documents that were read, kept in a folder so that reading them again costs nothing.

A file's name is a digest of all that its bytes depend on, so another text, model, setting or format
is another file and nothing is ever out of date. Above a limit the files that were used longest ago
go. What cannot be kept or opened costs a warning and a reading, never an answer.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nearfar import __version__
from nearfar.config import DEFAULT_CACHE_BYTES, EngineConfig, cache_root
from nearfar.errors import InvalidOptionError, SavedDocumentError
from nearfar.policies.registry import create_policy
from nearfar.runtime.chat import DocumentPrompt
from nearfar.runtime.hardware import choose_device, choose_dtype
from nearfar.runtime.progress import Progress, silent
from nearfar.runtime.saved.facts import Facts
from nearfar.runtime.saved.held import Model
from nearfar.runtime.saved.layout import VERSION
from nearfar.runtime.saved.read_document import open_facts
from nearfar.runtime.saved.writing import PARTIAL, remove_leftovers
from nearfar.runtime.text_origins import Text
from nearfar.runtime.tokenizer import Tokenizer
from nearfar.storage import format_name

if TYPE_CHECKING:
    from nearfar.runtime.document import Document
    from nearfar.runtime.engine import Engine

SUFFIX = ".nearfar"
NAME_DIGITS = 12  # of a digest, shown to people
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Entry:
    """One file of the cache."""

    path: Path
    file_bytes: int
    used_at: float  # seconds since 1970
    facts: Facts | None  # None: it cannot be opened
    problem: str = ""

    @property
    def name(self) -> str:
        """What it is called on the command line."""
        return self.path.stem[:NAME_DIGITS]


def document_key(model: Model, tokenizer: Tokenizer, text: str, config: EngineConfig) -> str:
    """A sha256 in hex over all that what is read of ``text`` depends on.

    The words around a document are taken as they are put now: a template may show the date.
    Raises as `Engine.read` does where the model's template refuses a document.
    """
    device, _ = choose_device(config.device)
    dtype = format_name(choose_dtype(config.dtype, device)[0])
    policy = create_policy(config.policy)
    keeps_far, evicts = policy.traits.keeps_far, policy.traits.kind == "evicts"
    parts = [
        [VERSION, __version__],  # what a release changes in reading is no reason to keep it
        model.identity,
        tokenizer.identity,
        [DocumentPrompt(tokenizer, "Text").prefix_ids, text.strip()],
        [device.type, dtype, config.far_dtype if keeps_far else dtype],
        [config.sinks, config.window],
        [policy.described(), config.budget] if evicts else None,
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


class DocumentCache:
    """The documents in ``folder``; None is the folder `documents` of nearfar's cache."""

    def __init__(
        self, folder: str | Path | None = None, limit_bytes: int = DEFAULT_CACHE_BYTES
    ) -> None:
        self.folder = cache_root() / "documents" if folder is None else Path(folder).expanduser()
        self.limit_bytes = limit_bytes

    def read(self, engine: Engine, text: str, *, progress: Progress = silent) -> Document:
        """The document from the cache, or read now and kept; raises as `Engine.read` does."""
        key = document_key(engine.model, engine.tokenizer, text, engine.config)
        document = self.open(engine, key, text, progress=progress)
        if document is None:
            document = engine.read(text, progress=progress)
            self.add(document, key)
        return document

    def path(self, key: str) -> Path:
        """Where the document of ``key`` is, or would be."""
        return self.folder / f"{key}{SUFFIX}"

    def open(
        self, engine: Engine, key: str, text: str, *, progress: Progress = silent
    ) -> Document | None:
        """The document of ``key``, which is ``text``; None if there is none that can be used."""
        path = self.path(key)
        if not path.exists():
            return None
        try:
            document = engine.open(path, progress=progress)
        except SavedDocumentError as error:
            _log.warning(
                "What was kept of the document cannot be used, it is read again. %s", error
            )
            return None
        with suppress(OSError):
            os.utime(path)
        document.name_sources(Text(text))
        if document.index_is_new:
            self.add(document, key)
        return document

    def add(self, document: Document, key: str) -> None:
        """Keep a document; a warning where that fails. Others go to make room."""
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            document.save(self.path(key))
        except (OSError, SavedDocumentError) as error:
            _log.warning("The document is not kept for the next time. %s", error)
            return
        self.prune(keep=self.path(key))

    def entries(self) -> list[Entry]:
        """All files, the last used first."""
        found = []
        for path in self._files():
            with suppress(FileNotFoundError):  # another process removes too
                found.append(_entry(path))
        return sorted(found, key=lambda entry: entry.used_at, reverse=True)

    def find(self, name: str) -> Path:
        """The file whose name begins with ``name``, or the file at that path.

        Raises InvalidOptionError if there is none, or more than one.
        """
        if name and Path(name).is_file():
            return Path(name)
        found = [path for path in self._files() if name and path.name.startswith(name)]
        if len(found) != 1:
            raise InvalidOptionError(
                f"{name!r} names {len(found) or 'no'} documents. Give a file, or a name that "
                "`nearfar cache list` shows."
            )
        return found[0]

    def prune(self, keep: Path | None = None) -> list[Path]:
        """Remove what cannot be opened and then what was used longest ago, down to the limit.

        The limit is also half of the disk's room. ``keep`` stays unless it alone is above.
        """
        entries = self.entries()
        total = sum(entry.file_bytes for entry in entries)
        limit = self.limit_bytes
        if entries:
            limit = min(limit, (shutil.disk_usage(self.folder).free + total) // 2)
        removed = []
        oldest = sorted(entries, key=lambda entry: (entry.path == keep, entry.used_at))
        for entry in sorted(oldest, key=lambda entry: entry.facts is not None):
            if entry.facts is None or total > limit:
                entry.path.unlink(missing_ok=True)
                total -= entry.file_bytes
                removed.append(entry.path)
        for leftover in self.folder.glob(f".*{SUFFIX}.*{PARTIAL}"):
            name, _, _ = leftover.name[1:].partition(SUFFIX)
            remove_leftovers(self.folder / f"{name}{SUFFIX}")
        if keep in removed:
            _log.warning("The document is not kept for the next time: it is above the limit.")
        return removed

    def clear(self) -> list[Path]:
        """Remove all files."""
        removed = list(self._files())
        for path in removed:
            path.unlink(missing_ok=True)
        return removed

    def _files(self) -> Iterator[Path]:
        return self.folder.glob(f"[!.]*{SUFFIX}")


def _entry(path: Path) -> Entry:
    status = path.stat()
    try:
        container, facts = open_facts(path)
        container.close()
    except SavedDocumentError as error:
        return Entry(path, status.st_size, status.st_mtime, None, str(error))
    return Entry(path, status.st_size, status.st_mtime, facts)

"""A cache of documents: a folder of files, so that a document is prefilled only once.

A file's name is a digest of everything on which its bytes depend. Another text, model, setting or
format gives another name, so no file is ever out of date. Above a limit the least recently used
files are removed; damaged files and files of an older format are removed at once. A file that
cannot be opened for the moment stays, and files with other names do not belong to the cache. If a
document cannot be kept or opened, the cache warns and the document is read again. Only the owner
can read the files.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nearfar import __version__
from nearfar.config import DEFAULT_CACHE_BYTES, EngineConfig, cache_root
from nearfar.errors import (
    DamagedDocumentError,
    DocumentVersionError,
    InvalidOptionError,
    SavedDocumentError,
)
from nearfar.output.whole import PARTIAL, remove_leftovers
from nearfar.policies.registry import create_policy
from nearfar.progress import Progress, silent
from nearfar.runtime.memory.hardware import choose_device, choose_dtype
from nearfar.runtime.saved.document_state import Model
from nearfar.runtime.saved.facts import Facts
from nearfar.runtime.saved.layout import MAGIC, VERSION
from nearfar.runtime.saved.opened import open_facts
from nearfar.runtime.text.chat import DocumentPrompt
from nearfar.runtime.text.text_origins import Text
from nearfar.runtime.text.tokenizer import Tokenizer
from nearfar.storage import format_name

if TYPE_CHECKING:
    from nearfar.runtime.engine.document import Document
    from nearfar.runtime.engine.engine import Engine

SUFFIX = ".nearfar"
_NAME = re.compile(rf"[0-9a-f]{{64}}{re.escape(SUFFIX)}")
_LEFTOVER = re.compile(rf"\.({_NAME.pattern})\.[0-9a-f]+{re.escape(PARTIAL)}")
NAME_DIGITS = 12  # of a digest, shown to users
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CachedDocument:
    """One file of the cache."""

    path: Path
    file_bytes: int
    used_at: float  # seconds since 1970
    facts: Facts | None  # None: the file cannot be opened
    problem: str = ""
    useless: bool = False  # whether no later version of nearfar can open it

    @property
    def name(self) -> str:
        """Its name on the command line."""
        return self.path.stem[:NAME_DIGITS]


def document_key(model: Model, tokenizer: Tokenizer, text: str, config: EngineConfig) -> str:
    """A sha256 in hex over everything on which the prefilled ``text`` depends.

    It includes the chat template's present words around a document: a template may show the date.
    Raises like `Engine.read` if the model's template refuses a document.
    """
    device, _ = choose_device(config.device)
    dtype = format_name(choose_dtype(config.dtype, device)[0])
    policy = create_policy(config.policy)
    keeps_far, evicts = policy.traits.keeps_far, policy.traits.kind == "evicts"
    parts = [
        [VERSION, __version__],  # a release may change how a text is read
        model.identity,
        tokenizer.identity,
        [DocumentPrompt(tokenizer, "Text").prefix_ids, text.strip()],
        [device.type, dtype, config.far_dtype if keeps_far else dtype],
        [config.sinks, config.window],
        [policy.described(), config.budget] if evicts else None,
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


class DocumentCache:
    """The documents in ``folder``; None means the folder `documents` of nearfar's cache."""

    def __init__(
        self, folder: str | Path | None = None, limit_bytes: int = DEFAULT_CACHE_BYTES
    ) -> None:
        self.folder = _own_folder() if folder is None else Path(folder).expanduser()
        self.limit_bytes = limit_bytes

    def read(self, engine: Engine, text: str, *, progress: Progress = silent) -> Document:
        """The document from the cache, or read now and kept; raises like `Engine.read`."""
        key = document_key(engine.model, engine.tokenizer, text, engine.config)
        document = self.open(engine, key, text, progress=progress)
        if document is None:
            document = engine.read(text, progress=progress)
            self.add(document, key)
        return document

    def path(self, key: str) -> Path:
        """The path of the document of ``key``, whether it exists or not."""
        return self.folder / f"{key}{SUFFIX}"

    def open(
        self, engine: Engine, key: str, text: str, *, progress: Progress = silent
    ) -> Document | None:
        """The document of ``key``, whose text is ``text``; None if no usable one is there."""
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
        with suppress(OSError):
            self._protect(path)
        document.name_sources(Text(text))
        if document.index_is_new:
            self.add(document, key)
        return document

    def add(self, document: Document, key: str) -> None:
        """Keep a document, and remove others to make room; only warn if it cannot be kept."""
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._protect(self.folder)
            document.write(self.path(key), private=True)
        except (OSError, SavedDocumentError) as error:
            _log.warning("The document is not kept for the next time. %s", error)
            return
        self.prune(keep=self.path(key))

    def entries(self) -> list[CachedDocument]:
        """All files, the most recently used first."""
        found = []
        for path in self._files():
            with suppress(FileNotFoundError):  # another process may remove it too
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
        """Remove useless files, then the least recently used ones, down to the limit.

        Half of the disk's free room is a limit too. ``keep`` stays unless it alone is above.
        """
        entries = self.entries()
        total = sum(entry.file_bytes for entry in entries)
        limit = self.limit_bytes
        if entries:
            limit = min(limit, (shutil.disk_usage(self.folder).free + total) // 2)
        removed = []
        oldest = sorted(entries, key=lambda entry: (entry.path == keep, entry.used_at))
        for entry in sorted(oldest, key=lambda entry: not entry.useless):
            if entry.useless or total > limit:
                entry.path.unlink(missing_ok=True)
                total -= entry.file_bytes
                removed.append(entry.path)
        leftovers = map(_LEFTOVER.match, os.listdir(self.folder) if self.folder.is_dir() else ())
        for name in {found[1] for found in leftovers if found}:
            remove_leftovers(self.folder / name)
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
        """The files whose names have the cache's form."""
        for path in self.folder.glob(f"*{SUFFIX}"):
            if _NAME.fullmatch(path.name) and path.is_file() and not path.is_symlink():
                yield path

    def _protect(self, path: Path) -> None:
        """Remove the permissions of other users on a file, or on nearfar's own folder."""
        own = self.folder == _own_folder() if path == self.folder else not path.is_symlink()
        status = path.stat()
        if own and status.st_uid == os.geteuid() and status.st_mode & 0o077:
            path.chmod(stat.S_IMODE(status.st_mode) & 0o700)


def _own_folder() -> Path:
    return cache_root() / "documents"


def _entry(path: Path) -> CachedDocument:
    status = path.stat()
    try:
        with open_facts(path) as opened:
            return CachedDocument(path, status.st_size, status.st_mtime, opened.facts)
    except SavedDocumentError as error:
        useless = _is_useless(path, error)
        return CachedDocument(path, status.st_size, status.st_mtime, None, str(error), useless)


def _is_useless(path: Path, error: SavedDocumentError) -> bool:
    """Whether a file of the cache that cannot be opened can never be opened later."""
    if isinstance(error, DocumentVersionError):
        return error.version < VERSION
    if isinstance(error, DamagedDocumentError):
        return True
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) != MAGIC
    except OSError:
        return False

"""The cache folder: downloads and converted models, which can all be made again.

It is the user's cache folder, or NEARFAR_CACHE_DIR. Every file in it is written under a temporary
name and then renamed, so a file with its final name is complete. Work that two processes could
start at the same time is done under a lock, which a dying process releases. This module knows
nothing of models.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import re
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from filelock import FileLock, Timeout

from nearfar.config import cache_root, format_bytes
from nearfar.errors import CheckpointError

_log = logging.getLogger(__name__)

_PIECE_BYTES, _READ_BYTES = 2**26, 2**20  # of a file whose digest is made
_SETTLED_SECONDS = 2  # after which a change is one of times too, on any file system
WAIT_SECONDS = 3600.0  # for another process; the largest models take some minutes


def cache_folder(*parts: str) -> Path:
    """A folder of the cache, made if it is missing."""
    folder = cache_root().joinpath(*parts)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"The cache folder {folder} cannot be made: {error.strerror}. "
            "Set NEARFAR_CACHE_DIR to a folder that can be written."
        ) from error
    return folder


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of ``path``; check again what exists once it is held.

    ``path`` itself need not exist. The lock is the operating system's, on a file beside it.
    """
    lock = FileLock(f"{path}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        _log.warning("Waiting for another process that is preparing %s.", path.name)
        try:
            lock.acquire(timeout=WAIT_SECONDS)
        except Timeout:
            raise CheckpointError(
                f"Another process has been preparing {path.name} for {WAIT_SECONDS / 60:.0f} "
                f"minutes. End it and run this again; it holds {lock.lock_file}."
            ) from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
    """An empty folder beside ``path`` that is gone afterwards. The caller holds the lock.

    One that a killed process left is removed first.
    """
    folder = path.with_name(f".{path.name}.partial")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def written_whole(path: Path, expected_bytes: int = 0) -> Iterator[Path]:
    """A temporary path whose file or folder becomes ``path`` when the block succeeds.

    If it fails, Ctrl-C included, nothing is left. The disk must have ``expected_bytes`` free before
    the block starts. A full disk is a CheckpointError. The caller holds the lock.
    """
    if expected_bytes > shutil.disk_usage(path.parent).free:
        raise _disk_full(path, expected_bytes)
    with scratch_folder(path) as folder:
        temporary = folder / path.name
        try:
            yield temporary
            _flush(temporary)
        except Exception as error:
            if _means_disk_full(error):
                raise _disk_full(path, expected_bytes) from error
            raise
        os.replace(temporary, path)


def _flush(path: Path) -> None:
    """Flush the file to disk, so that a power cut cannot leave a name without content."""
    for file in path.iterdir() if path.is_dir() else [path]:
        with file.open("rb") as opened:
            os.fsync(opened.fileno())


def _means_disk_full(error: Exception) -> bool:
    codes = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    if isinstance(error, OSError):
        return error.errno in codes
    return any(f"os error {code})" in str(error) for code in codes)  # libraries in Rust


def _disk_full(path: Path, expected_bytes: int) -> CheckpointError:
    needed = f" Needed: {format_bytes(expected_bytes)}." if expected_bytes else ""
    free_bytes = shutil.disk_usage(path.parent).free
    return CheckpointError(
        f"No room to write {path}.{needed} Free there: {format_bytes(free_bytes)}. "
        "Make room, or set NEARFAR_CACHE_DIR to a folder on another disk."
    )


def sha256_of(path: Path) -> str:
    """The sha256 of a whole file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(path: Path) -> str:
    """A sha256 in hex over a whole checkpoint file, which is read once until it changes.

    It is over the digests of pieces of 64 MiB, which one thread per processor makes. It is stored
    under the file's number and size and the times of its last change of content and of any
    attribute; no program can set the last.
    """
    status = path.stat()
    seen = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    name = hashlib.sha256(repr((str(path.resolve()), *seen)).encode()).hexdigest()
    known = cache_root() / "digests" / name
    with suppress(OSError):
        digest = known.read_text("ascii")
        if re.fullmatch("[0-9a-f]{64}", digest):
            return digest
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        starts = range(0, status.st_size, _PIECE_BYTES)
        pieces = b"".join(pool.map(partial(_digest_of_piece, path), starts))
    digest = hashlib.sha256(pieces).hexdigest()
    if time.time() - status.st_ctime < _SETTLED_SECONDS:
        return digest  # a change so soon after might leave the times as they are
    with suppress(OSError):  # it is then read again the next time
        known.parent.mkdir(parents=True, exist_ok=True)
        partial_file = known.with_name(f".{name}.{os.getpid()}")
        partial_file.write_text(digest, "ascii")
        partial_file.replace(known)
    return digest


def _digest_of_piece(path: Path, start: int) -> bytes:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(start)
        for _ in range(_PIECE_BYTES // _READ_BYTES):
            digest.update(file.read(_READ_BYTES))
    return digest.digest()

"""The folder of things that can be made again: downloads and converted models.

It is the user's cache folder, or NEARFAR_CACHE_DIR. Every file in it is written under a temporary
name and then renamed, so a file that has its final name is whole; work that two processes could
start at once is done under a lock that a process which dies gives back. It knows nothing of models.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from nearfar.config import cache_root, format_bytes
from nearfar.errors import CheckpointError

_log = logging.getLogger(__name__)

_HEAD_BYTES = 8 * 2**20  # holds the header of a checkpoint: names, shapes, a GGUF's metadata
_SAMPLES = 64
_SAMPLE_BYTES = 64 * 2**10


def cache_folder(*parts: str) -> Path:
    """A folder of the cache, made if it is not there."""
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
    """Hold the lock of ``path``; look again at what is there once it is held.

    ``path`` itself need not exist. The lock is the operating system's, on a file beside it.
    """
    lock = FileLock(f"{path}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        _log.warning("Waiting for another process that is preparing %s.", path.name)
        lock.acquire()
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
    """A temporary path of which the file or folder becomes ``path`` when the block ends well.

    When it does not, Ctrl-C included, nothing is left. ``expected_bytes`` are asked of the disk
    before the block starts. A full disk is a CheckpointError. The caller holds the lock.
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
    """Have the disk hold what was written, so that a power cut cannot leave the name alone."""
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
    """A sha256 that tells one checkpoint file from another without reading all of it.

    It covers the size, the first 8 MiB, the last 64 KiB and 62 blocks of 64 KiB spread evenly
    between. Two trainings of a model differ in it; a change of a few bytes made by hand may not.
    """
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        digest.update(file.read(_HEAD_BYTES))
        if size > _HEAD_BYTES:
            for sample in range(_SAMPLES):
                file.seek((size - _SAMPLE_BYTES) * sample // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()

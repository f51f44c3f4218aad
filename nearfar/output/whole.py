"""Writes a file so that its name never refers to a part of it.

Bytes go to a temporary name beside the file, reach the disk, and take the final name in one step. A
writer holds a lock on its temporary file. The next writer thus recognises and removes the file of a
killed writer. Two writers of one name do not interfere: the later one's file stays, complete. The
new file gets the permissions and the owner of the one that it replaces.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from nearfar.config import format_bytes
from nearfar.errors import OutputError
from nearfar.output.place import Place

PARTIAL = ".partial"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_DIGITS = 8  # that make a temporary name one of its own
_MOST_NAME_BYTES = 255 - len(f"..{PARTIAL}") - _DIGITS


def write_output(place: Place, data: bytes) -> None:
    """Write all of ``data`` to ``place``; OutputError where that fails."""
    if place.streams:
        _write_into(place, data)
        return
    with whole_file(place.path, len(data)) as file:
        file.write(data)


@contextmanager
def whole_file(path: Path, num_bytes: int, *, private: bool = False) -> Iterator[BinaryIO]:
    """A file that becomes ``path`` when the block succeeds; otherwise nothing is left of it.

    The disk must have ``num_bytes`` free before the block starts. Only its owner can read a
    ``private`` file. ``path`` is not checked otherwise: see `place`.
    """
    try:
        remove_leftovers(path)
        if num_bytes > (free := shutil.disk_usage(path.parent).free):
            raise _disk_full(path, num_bytes, free)
        before = _replaced(path)
        temporary, file = _locked_temporary(
            path, 0o666 if before is None and not private else 0o600
        )
    except OSError as error:
        raise _cannot_write(str(path), error) from error
    try:
        with file:
            yield file
            file.flush()
            if before is not None and not private:
                _hand_on(before, file.fileno())
            os.fsync(file.fileno())
            _replaced(path)  # again: it may have changed meanwhile
            os.replace(temporary, path)
        _flush_folder(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        if error.errno in _FULL:
            raise _disk_full(path, num_bytes, shutil.disk_usage(path.parent).free) from error
        raise _cannot_write(str(path), error) from error
    except BaseException:  # Ctrl-C too
        temporary.unlink(missing_ok=True)
        raise


def remove_leftovers(path: Path) -> None:
    """Remove the temporary files of killed writers of ``path``, and no others."""
    pattern = re.compile(rf"{re.escape(_stem(path))}[0-9a-f]{{{_DIGITS}}}{re.escape(PARTIAL)}")
    for leftover in path.parent.iterdir():
        if not pattern.fullmatch(leftover.name):
            continue
        with suppress(OSError):
            number = os.open(leftover, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                if stat.S_ISREG(os.fstat(number).st_mode):
                    fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a living writer has it
                    leftover.unlink()
            finally:
                os.close(number)


def _stem(path: Path) -> str:
    """The prefix of temporary names of ``path``."""
    name = os.fsencode(path.name)
    if len(name) <= _MOST_NAME_BYTES:
        return f".{path.name}."
    return f".{hashlib.sha256(name).hexdigest()}."


def _locked_temporary(path: Path, mode: int) -> tuple[Path, BinaryIO]:
    """A new temporary file of ``path``, locked."""
    while True:
        temporary = path.with_name(f"{_stem(path)}{secrets.token_hex(_DIGITS // 2)}{PARTIAL}")
        number = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        file = os.fdopen(number, "wb")
        fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(number).st_nlink:  # else another writer took it for a leftover
            return temporary, file
        file.close()


def _replaced(path: Path) -> os.stat_result | None:
    """The file that is replaced, if there is one; only files are replaced."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        return None
    if stat.S_ISLNK(status.st_mode):
        return None
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EEXIST, "it is there and is not a file")
    return status


def _hand_on(before: os.stat_result, number: int) -> None:
    """Give an open file the owner and the permissions of the one that it replaces."""
    own = os.fstat(number)
    with suppress(PermissionError):
        if own.st_gid != before.st_gid:
            os.fchown(number, -1, before.st_gid)
        if own.st_uid != before.st_uid:
            os.fchown(number, before.st_uid, -1)
    os.fchmod(number, stat.S_IMODE(before.st_mode) & 0o777)


def _write_into(place: Place, data: bytes) -> None:
    """Write to a device, a FIFO or a descriptor."""
    try:
        number = os.open(place.path, os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK | os.O_NOCTTY)
        os.set_blocking(number, True)
        with os.fdopen(number, "wb") as file:
            file.write(data)
    except OSError as error:
        if error.errno == errno.ENXIO:
            raise OutputError(
                f"Nothing reads from {place.named}. Start its reader first, or name a file."
            ) from error
        raise _cannot_write(place.named, error) from error


def _flush_folder(folder: Path) -> None:
    """Flush the new name to disk too; not every file system can."""
    with suppress(OSError):
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def _disk_full(path: Path, num_bytes: int, free: int) -> OutputError:
    return OutputError(
        f"No room to write {path}. Needed: {format_bytes(num_bytes)}. Free there: "
        f"{format_bytes(free)}. Make room, or name a file on another disk."
    )


def _cannot_write(name: str, error: OSError) -> OutputError:
    return OutputError(f"{name} cannot be written: {error.strerror or error}.")

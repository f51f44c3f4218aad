"""The place of an output: the file behind its name, and whether it may be written.

The rules are those of Unix tools. A symbolic link is followed, also one to a missing file. A folder
is refused. A device or a FIFO is written into if bytes can go in order, and refused otherwise; it
is never replaced. A file is replaced if it is empty or an earlier output of the same kind. Any
other file, and one that is read-only or another user's, is replaced only on request. An input file
is never replaced.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from nearfar.errors import OutputExistsError, OutputNameError

_KINDS = (
    (stat.S_ISFIFO, "FIFO"),
    (stat.S_ISSOCK, "socket"),
    (stat.S_ISCHR, "device"),
    (stat.S_ISBLK, "block device"),
)
_MOST_LINKS = 40


@dataclass(frozen=True)
class Place:
    """A name that can be written to, as it was found."""

    named: str  # by the user
    path: Path  # of the file to write, behind symbolic links
    before: os.stat_result | None  # of the existing file; None: there is none
    streams: bool = False  # bytes are written into the existing device or FIFO


def find_place(name: str | Path, *, may_stream: bool = False, new_folder: bool = False) -> Place:
    """The place of ``name``; OutputNameError if no output can go there.

    ``may_stream`` allows FIFOs, character devices and descriptors of this process, ``new_folder``
    a folder that is still to be made.
    """
    text = os.fspath(name)
    if not text or "\0" in text:
        raise OutputNameError(f"{text!r} is not a file name. Name a file.")
    if text.endswith(os.sep):
        raise OutputNameError(f"{text} is the name of a folder. Name a file in it.")
    path = Path(text).expanduser() if text.startswith("~/") else Path(text)
    before = _status(path)
    if before is not None and stat.S_ISDIR(before.st_mode):
        raise OutputNameError(f"{path} is a folder. Name a file in it.")
    kind = _special_kind(path, before)
    if kind:
        if not may_stream or kind in ("socket", "block device"):
            raise OutputNameError(f"{path} is a {kind}, but this output needs a file. Name a file.")
        if not os.access(path, os.W_OK):
            raise OutputNameError(f"You may not write to {path}. Name another file.")
        return Place(str(path), path, before, streams=True)
    real = Path(os.path.realpath(path))
    if new_folder:
        check_new_folder(real.parent)
    else:
        _check_folder(real.parent, path)
    return Place(str(path), real, before)


def check_replaced(
    place: Place,
    kind: str,
    is_own: Callable[[Path], bool],
    *,
    overwrite: bool = False,
    read: Iterable[str | Path] = (),
) -> None:
    """Raise if the file at ``place`` must not be replaced.

    ``is_own`` tells whether a file is an earlier output of the same ``kind`` (words for people).
    The files in ``read`` are never replaced. OutputExistsError is raised if ``overwrite`` would
    allow it.
    """
    status = place.before
    if status is None or place.streams:
        return
    for each in read:
        with suppress(OSError):
            if os.path.samestat(status, os.stat(each)):
                raise OutputNameError(
                    f"{place.named} is also an input. Name another file to write."
                )
    if overwrite:
        return
    reason = ""
    if status.st_size and not is_own(place.path):
        reason = f"exists and is not {kind}"
    elif not status.st_mode & 0o222:
        reason = "is read-only"
    elif os.geteuid() not in (0, status.st_uid):
        reason = "belongs to another user"
    if reason:
        raise OutputExistsError(place.named, reason)


def check_new_folder(folder: Path) -> None:
    """Raise OutputNameError if ``folder`` does not exist and cannot be made."""
    real = Path(os.path.realpath(folder))
    while not (real.exists() or real.is_symlink()) and real != real.parent:
        real = real.parent
    _check_folder(real, folder)


def starts_with(path: Path, start: bytes, mark: bytes = b"", within: int = 4096) -> bool:
    """Whether a file begins with ``start`` and has ``mark`` at its beginning or its end."""
    try:
        with path.open("rb") as file:
            head = file.read(within)
            file.seek(max(0, path.stat().st_size - within))
            return head.startswith(start) and (mark in head or mark in file.read(within))
    except OSError:
        return False


def _status(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except FileNotFoundError:
        return None
    except OSError as error:  # loops of links, long names, a file where a folder should be
        raise OutputNameError(
            f"{path} cannot be written: {error.strerror or error}. Name another file."
        ) from error


def _special_kind(path: Path, status: os.stat_result | None) -> str:
    """The thing under the name if it is not a file that can be replaced."""
    if status is None:
        return ""
    for is_kind, kind in _KINDS:
        if is_kind(status.st_mode):
            return kind
    return "descriptor" if _is_descriptor(path) else ""


def _is_descriptor(path: Path) -> bool:
    """Whether a name like /dev/stdout leads to an open file of a process."""
    for _ in range(_MOST_LINKS):
        folder = os.path.realpath(path.parent)
        if folder.startswith("/proc/") and folder.endswith("/fd"):
            return True
        if not path.is_symlink():
            return False
        path = Path(folder, os.readlink(path))
    return False


def _check_folder(folder: Path, path: Path) -> None:
    """Refuse a folder in which ``path`` cannot be made."""
    if not folder.exists():
        link = f" (a link to {os.path.realpath(path)!r})" if path.is_symlink() else ""
        raise OutputNameError(f"The folder of {str(path)!r}{link} does not exist. Make it first.")
    if not folder.is_dir():
        raise OutputNameError(f"{path} cannot be written: {folder} is a file and not a folder.")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutputNameError(
            f"{path} cannot be written: nearfar makes a new file first, and you may make none in "
            f"the folder {folder}. Name a file in another folder."
        )

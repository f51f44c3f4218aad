"""The bytes of a file that a user named, or the reason why there are none and what to do.

A file that is missing or may not be opened raises DocumentNameError, before anything is read.
"""

from __future__ import annotations

import difflib
import stat
from pathlib import Path

from nearfar.errors import DocumentError, DocumentNameError
from nearfar.runtime.text.unicode_text import shown


def read_named(path: str | Path, folder_advice: str = "Name a file in it.") -> bytes:
    """The bytes of a file; ``folder_advice`` is the remedy if it is a folder.

    Raises DocumentNameError for a file that is missing, a folder, a device or unreadable.
    """
    name = shown(str(path))
    try:
        if not str(path):
            raise DocumentNameError("'' is not a file name. Name one.")
        if "\0" in str(path):
            raise DocumentNameError(f"{name} is not a file name: it has a zero byte.")
        _check_kind(Path(path), name)
        return Path(path).read_bytes()
    except FileNotFoundError:
        raise DocumentNameError(_missing(Path(path))) from None
    except IsADirectoryError:
        raise DocumentNameError(f"{name} is a folder. {folder_advice}") from None
    except PermissionError:
        raise DocumentNameError(
            f"{name} cannot be read: permission denied. Change it with: chmod u+r {name}"
        ) from None
    except OSError as error:
        raise DocumentNameError(f"{name} cannot be read: {error.strerror or error}.") from error
    except MemoryError:
        raise DocumentError(f"{name} is larger than the free memory. Split it.") from None


def _check_kind(path: Path, name: str) -> None:
    """Raise DocumentNameError for a device, whose bytes may never end."""
    mode = path.stat().st_mode
    if stat.S_ISBLK(mode) or (stat.S_ISCHR(mode) and name not in ("/dev/stdin", "/dev/fd/0")):
        raise DocumentNameError(f"{name} is a device. Give a file, or - to read a pipe.")


def _missing(path: Path) -> str:
    folder, name = path.parent, shown(str(path))
    if not folder.is_dir():
        return f"{name} does not exist, nor does the folder {shown(str(folder))}. Check the path."
    try:
        names = [entry.name for entry in folder.iterdir()]
    except OSError:
        names = []
    close = difflib.get_close_matches(path.name, names, n=1)
    return f"{name} does not exist. " + (
        f"Did you mean {shown(str(folder / close[0]))}?" if close else "Check the path."
    )

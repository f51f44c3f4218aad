"""Writing a file so that its name never stands for a part of it.

Bytes go to a temporary name beside the file, reach the disk, and take the final name in one step.
A writer holds a lock on its temporary file, so what a killed one left behind is told from what
another is writing, and is removed by the next writer. Two writers of one name do not meet: the
later one's file stays, whole.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import secrets
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from nearfar.config import format_bytes
from nearfar.errors import SavedDocumentError
from nearfar.runtime.saved.container import head_digest
from nearfar.runtime.saved.layout import (
    ALIGN,
    HEADER_AT,
    MAGIC,
    MAX_HEADER_BYTES,
    PRELUDE,
    VERSION,
    Layout,
    Section,
)

PARTIAL = ".partial"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_COPY_BYTES = 2**22


@dataclass(frozen=True)
class Content:
    """A section and what is in it: ``parts()`` yields one contiguous array for each part."""

    section: Section
    parts: Callable[[], Iterable[NDArray[Any]]]


def write_container(path: Path, about: dict[str, Any], contents: Sequence[Content]) -> None:
    """Write a saved file; SavedDocumentError where that fails, and then nothing is left of it."""
    sections = [content.section for content in contents]
    described = [section.as_json() for section in sections]
    header = json.dumps({"about": about, "align": ALIGN, "sections": described}).encode()
    if len(header) > MAX_HEADER_BYTES:
        raise SavedDocumentError(
            f"{path} cannot be written: its header would have {len(header):,} bytes and may have "
            f"{MAX_HEADER_BYTES:,}. Give fewer documents at once."
        )
    layout = Layout(sections, len(header))
    with whole_file(path, layout.file_bytes) as file:
        sums: list[int] = []
        for content in contents:
            _write_section(file, layout, content, sums)
        file.truncate(layout.file_bytes)
        packed = np.array(sums, "<u4").tobytes()
        sizes = (len(header), layout.file_bytes, len(packed))
        start = PRELUDE.pack(MAGIC, VERSION, *sizes, b"")
        file.seek(0)
        file.write(PRELUDE.pack(MAGIC, VERSION, *sizes, head_digest(start, header, packed)))
        file.seek(HEADER_AT)
        file.write(header + packed)


@contextmanager
def whole_file(path: Path, num_bytes: int) -> Iterator[BinaryIO]:
    """A file that becomes ``path`` when the block ends well, and of which else nothing is left.

    ``num_bytes`` are asked of the disk before the block starts.
    """
    try:
        remove_leftovers(path)
        if num_bytes > (free := shutil.disk_usage(path.parent).free):
            raise _disk_full(path, num_bytes, free)
        temporary, file = _locked_temporary(path)
    except OSError as error:
        raise _cannot_write(path, error) from error
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, path)
        _flush_folder(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        if error.errno in _FULL:
            raise _disk_full(path, num_bytes, shutil.disk_usage(path.parent).free) from error
        raise _cannot_write(path, error) from error
    except BaseException:  # Ctrl-C too
        temporary.unlink(missing_ok=True)
        raise


def remove_leftovers(path: Path) -> None:
    """Remove what writers of ``path`` that were killed left behind."""
    for leftover in path.parent.glob(f".{path.name}.*{PARTIAL}"):
        with suppress(OSError), leftover.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a living writer has it
            leftover.unlink()


def _locked_temporary(path: Path) -> tuple[Path, BinaryIO]:
    """A new temporary file of ``path``, locked."""
    while True:
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{PARTIAL}")
        file = temporary.open("xb")
        fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(file.fileno()).st_nlink:  # else another writer took it for a leftover
            return temporary, file
        file.close()


def _write_section(file: BinaryIO, layout: Layout, content: Content, sums: list[int]) -> None:
    """Write all parts of a section and add the checksums of their blocks to ``sums``."""
    place, section = layout.places[content.section.name], content.section
    count = 0
    for count, part in enumerate(content.parts(), start=1):
        assert part.nbytes == section.part_bytes, section.name
        assert part.flags.c_contiguous, section.name
        data = part.reshape(-1).view(np.uint8).data
        file.seek(place.offset + (count - 1) * place.stride)
        for start in range(0, len(data), _COPY_BYTES):
            file.write(data[start : start + _COPY_BYTES])
        size = section.block_bytes
        sums += [zlib.crc32(data[i : i + size]) for i in range(0, len(data), size)]
    assert count == section.parts, section.name


def _flush_folder(folder: Path) -> None:
    """Have the disk hold the new name too; not every file system can."""
    with suppress(OSError):
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def _disk_full(path: Path, num_bytes: int, free: int) -> SavedDocumentError:
    return SavedDocumentError(
        f"No room to write {path}. Needed: {format_bytes(num_bytes)}. Free there: "
        f"{format_bytes(free)}. Make room, or name a file on another disk."
    )


def _cannot_write(path: Path, error: OSError) -> SavedDocumentError:
    return SavedDocumentError(f"{path} cannot be written: {error.strerror or error}.")

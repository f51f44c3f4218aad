"""A saved file, opened: its head is checked at once, its blocks when they are used.

The file is mapped copy-on-write: reads come from the page cache that all processes share, writes
stay in this process. Sizes in the head are compared with the file's before memory of such a size is
allocated. The caller knows the meaning of the sections.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from nearfar.errors import (
    DamagedDocumentError,
    DocumentVersionError,
    SavedDocumentError,
    SavedNameError,
)
from nearfar.progress import Progress, silent
from nearfar.runtime.saved.layout import (
    HEADER_AT,
    MAGIC,
    MAX_HEADER_BYTES,
    PRELUDE,
    VERSION,
    Layout,
    Place,
    parse_section,
)

MAP_FLAGS = getattr(mmap, "MAP_PRIVATE", 2) | getattr(mmap, "MAP_NORESERVE", 0)
_BATCH_BLOCKS = 64  # that a thread checks at a time


@dataclass(frozen=True)
class Kind:
    """The expected kind of a file, and what to do if it is missing or damaged."""

    name: str  # in a header
    noun: str
    make: str
    again: str


DOCUMENT = Kind(
    "document",
    "saved document",
    "Make one with: nearfar index DOCUMENT -o FILE",
    "Make it again with: nearfar index",
)
CONVERSATION = Kind(
    "conversation",
    "saved conversation",
    "Name one that was saved, or begin a new one.",
    "Name another file to begin a new conversation",
)


class Container:
    """One opened file."""

    def __init__(
        self, path: Path, file: BinaryIO, about: dict[str, Any], layout: Layout, kind: Kind
    ) -> None:
        self.path = path
        self.kind = kind
        self.about = about
        self.layout = layout
        self.file = file
        self._memory = _mapped(path, file, layout.file_bytes)
        sums_at = HEADER_AT + layout.header_bytes
        self._sums = np.frombuffer(self._memory, "<u4", layout.sum_count, sums_at)

    def close(self) -> None:
        """Close the file; what is mapped stays as long as it is used."""
        self.file.close()

    def has(self, name: str) -> bool:
        """Whether there is a section of this name."""
        return name in self.layout.places

    def place(self, name: str) -> Place:
        """The place of a section; DamagedDocumentError if there is none."""
        if name not in self.layout.places:
            raise self.damaged(f"it has no section {name!r}")
        return self.layout.places[name]

    def array(
        self, name: str, dtype: str | None = None, shape: tuple[int | None, ...] | None = None
    ) -> NDArray[Any]:
        """A section of one part as it is mapped, every block of it checked.

        ``dtype`` and ``shape`` are required values; None allows any.
        """
        place = self.place(name)
        section = place.section
        fits = shape is None or (
            len(section.shape) == len(shape)
            and all(want in (None, size) for want, size in zip(shape, section.shape, strict=True))
        )
        if section.dtype != (dtype or section.dtype) or section.parts != 1 or not fits:
            described = f"{section.dtype} {list(section.shape)} in {section.parts} parts"
            raise self.damaged(f"section {name!r} is {described}")
        self.check([name])
        return self.part_bytes(place, 0).view(section.dtype).reshape(section.shape)

    def part_bytes(self, place: Place, part: int) -> NDArray[np.uint8]:
        """The bytes of one part as they are mapped, not checked."""
        start, size = place.offset + part * place.stride, place.section.part_bytes
        if size == 0:  # an empty part may be at the very end
            return np.zeros(0, np.uint8)
        return np.frombuffer(self._memory, np.uint8, size, start)

    def sums(self, place: Place) -> NDArray[np.uint32]:
        """Checksums [parts, blocks] of a section."""
        section = place.section
        count = section.parts * section.part_blocks
        sums = self._sums[place.first_sum : place.first_sum + count]
        return sums.reshape(section.parts, section.part_blocks)

    def check(self, names: Iterable[str] | None = None, progress: Progress = silent) -> None:
        """Compare the checksums of all blocks of sections (None: of all sections).

        ``progress`` counts blocks. Raises DamagedDocumentError at the first damaged one.
        """
        places = [self.place(name) for name in names or self.layout.places]
        tasks = [
            (place, part, first)
            for place in places
            for part in range(place.section.parts)
            for first in range(0, place.section.part_blocks, _BATCH_BLOCKS)
        ]
        with ThreadPoolExecutor(min(len(tasks) or 1, os.cpu_count() or 1)) as threads:
            for done, wrong in enumerate(threads.map(lambda task: self._wrong(*task), tasks)):
                if wrong is not None:
                    raise self.damaged_block(*wrong)
                progress(done + 1, len(tasks))

    def damaged_block(self, place: Place, part: int, block: int) -> DamagedDocumentError:
        """The error that names the damaged place of the file."""
        at = place.offset + part * place.stride + block * place.section.block_bytes
        return self.damaged(f"section {place.section.name!r} differs at byte {at:,}")

    def damaged(self, what: str) -> DamagedDocumentError:
        """The error for a file that is not as it was written."""
        return damaged(self.path, what, self.kind)

    def _wrong(self, place: Place, part: int, first: int) -> tuple[Place, int, int] | None:
        """The first damaged one of a batch of blocks."""
        size = place.section.block_bytes
        data, sums = self.part_bytes(place, part), self.sums(place)[part]
        for block in range(first, min(first + _BATCH_BLOCKS, len(sums))):
            if zlib.crc32(data[block * size : (block + 1) * size].data) != sums[block]:
                return place, part, block
        return None


def open_container(path: Path, kind: Kind = DOCUMENT) -> Container:
    """Open a file that should be of a ``kind``, and check its head.

    Raises SavedNameError for one that cannot be opened, SavedDocumentError for what is no saved
    file or of another version, DamagedDocumentError for one that is not as it was written. Which
    kind it is of is the caller's to check.
    """
    file = _opened(path, kind)
    try:
        about, layout = _read_head(path, file, kind)
        return Container(path, file, about, layout, kind)
    except BaseException as error:
        file.close()
        if isinstance(error, OSError | MemoryError):  # no damage: it may be read another time
            raise _unreadable(path, error) from error
        raise


def is_container(path: Path) -> bool:
    """Whether a file begins as a saved document does."""
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def damaged(path: Path, what: str, kind: Kind = DOCUMENT) -> DamagedDocumentError:
    """The error for a file that is not as it was written."""
    return DamagedDocumentError(f"{path} is damaged: {what}. {kind.again}")


def head_digest(prelude: bytes, header: bytes, sums: bytes) -> bytes:
    """sha256 over the whole head without the digest itself."""
    return hashlib.sha256(prelude[:28] + header + sums).digest()


def _opened(path: Path, kind: Kind) -> BinaryIO:
    try:
        return path.open("rb")
    except FileNotFoundError:
        raise SavedNameError(f"{path} does not exist. {kind.make}") from None
    except IsADirectoryError:
        raise SavedNameError(f"{path} is a folder, not a {kind.noun}. {kind.make}") from None
    except OSError as error:
        raise SavedNameError(str(_unreadable(path, error))) from error


def _unreadable(path: Path, error: OSError | MemoryError) -> SavedDocumentError:
    reason = "there is no memory for it"
    if isinstance(error, OSError):
        reason = error.strerror or str(error)
    return SavedDocumentError(f"{path} cannot be read: {reason}.")


def _read_head(path: Path, file: BinaryIO, kind: Kind) -> tuple[dict[str, Any], Layout]:
    size = os.fstat(file.fileno()).st_size
    prelude = file.read(HEADER_AT)
    if not prelude.startswith(MAGIC):
        raise SavedDocumentError(
            f"{path} is not a {kind.noun}: it does not begin as one does. {kind.make}"
        )
    if len(prelude) < HEADER_AT:
        raise damaged(path, f"it ends after {size:,} bytes", kind)
    _, version, header_bytes, file_bytes, sum_bytes, digest = PRELUDE.unpack_from(prelude)
    if version != VERSION:
        raise DocumentVersionError(
            f"{path} has format version {version}; this nearfar reads version {VERSION}. "
            f"{kind.again}, or use the nearfar that wrote it.",
            version,
        )
    if size != file_bytes:
        raise damaged(path, f"it has {size:,} bytes where {file_bytes:,} were written", kind)
    if header_bytes > MAX_HEADER_BYTES or HEADER_AT + header_bytes + sum_bytes > size:
        raise damaged(path, "its header has an impossible size", kind)
    header, sums = file.read(header_bytes), file.read(sum_bytes)
    if head_digest(prelude, header, sums) != digest:
        raise damaged(path, "its header differs", kind)
    return _parsed(path, header, file_bytes, kind)


def _parsed(
    path: Path, header: bytes, file_bytes: int, kind: Kind
) -> tuple[dict[str, Any], Layout]:
    try:
        value = json.loads(header)
        about, align = value["about"], value["align"]
        sections = [parse_section(each) for each in value["sections"]]
        if not isinstance(about, dict) or type(align) is not int or not 1 <= align <= 2**24:
            raise ValueError("the header is not described as it should be")
        layout = Layout(sections, len(header), align)
        if len(layout.places) != len(sections) or layout.file_bytes != file_bytes:
            raise ValueError("its sections do not make up the file")
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError) as error:
        raise damaged(path, f"its header is not valid ({error})", kind) from error
    return about, layout


def _mapped(path: Path, file: BinaryIO, size: int) -> mmap.mmap:
    try:
        protection = mmap.PROT_READ | mmap.PROT_WRITE
        return mmap.mmap(file.fileno(), size, flags=MAP_FLAGS, prot=protection)
    except (OSError, ValueError) as error:
        raise SavedDocumentError(
            f"{path} cannot be mapped into memory ({error}). Copy it to a local disk."
        ) from error

"""Writes sections and their checksums as one file, completely or not at all."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from nearfar.errors import OutputError, SavedDocumentError
from nearfar.output.whole import whole_file
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

_COPY_BYTES = 2**22


@dataclass(frozen=True)
class Content:
    """A section and its content: ``parts()`` yields one contiguous array for each part."""

    section: Section
    parts: Callable[[], Iterable[NDArray[Any]]]


def write_container(
    path: Path, about: dict[str, Any], contents: Sequence[Content], *, private: bool = False
) -> None:
    """Write a saved file; if that fails, SavedDocumentError, and nothing is left of it.

    ``path`` is not checked, see `replacing`. Only its owner can read a ``private`` file.
    """
    sections = [content.section for content in contents]
    described = [section.as_json() for section in sections]
    header = json.dumps({"about": about, "align": ALIGN, "sections": described}).encode()
    if len(header) > MAX_HEADER_BYTES:
        raise SavedDocumentError(
            f"{path} cannot be written: its header would have {len(header):,} bytes and may have "
            f"{MAX_HEADER_BYTES:,}. Give fewer documents at once."
        )
    layout = Layout(sections, len(header))
    try:
        with whole_file(path, layout.file_bytes, private=private) as file:
            _write(file, layout, header, contents)
    except OutputError as error:
        raise SavedDocumentError(str(error)) from error


def _write(file: BinaryIO, layout: Layout, header: bytes, contents: Sequence[Content]) -> None:
    """Write sections, and then the head with their checksums."""
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

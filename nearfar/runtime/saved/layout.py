"""The layout of a saved file. docs/format.md describes it for other programs.

    0   8   magic
    8   4   format version, little-endian like every number here
    12  4   bytes of the header
    16  8   bytes of the whole file
    24  4   bytes of the checksums
    28  32  sha256 of bytes 0 to 28, the header and the checksums
    64      header, JSON
            checksums, a CRC-32 for every block of every section
            sections, each part of each at a multiple of `align`

A section is an array, or several parts of equal size, each contiguous and each cut into blocks. The
header lists sections in order, and their places follow from their sizes: a reader computes them and
trusts no offset. This module does not interpret sections.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

MAGIC = b"\x89NEARFAR"
VERSION = 1
PRELUDE = struct.Struct("<8sIIQI32s")
HEADER_AT = 64
ALIGN = 4096  # a page nearly everywhere, so that parts can be mapped
BLOCK_BYTES = 2**16  # that share a checksum, where a section does not say otherwise
MAX_HEADER_BYTES = 2**22
MAX_PARTS = 2**12
ITEM_BYTES = {"uint8": 1, "uint16": 2, "int32": 4, "uint32": 4, "float32": 4, "int64": 8}
_FIELDS = {"name", "dtype", "shape", "parts", "block"}


@dataclass(frozen=True)
class Section:
    """One array: its first axis is cut into ``parts`` of equal size."""

    name: str
    dtype: str  # a key of ITEM_BYTES
    shape: tuple[int, ...]
    parts: int = 1
    block_bytes: int = BLOCK_BYTES

    @property
    def num_bytes(self) -> int:
        """Of all parts, without what is between them."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]

    @property
    def part_bytes(self) -> int:
        """Of one part."""
        return self.num_bytes // self.parts

    @property
    def part_blocks(self) -> int:
        """Blocks of one part; the last one may be shorter."""
        return -(-self.part_bytes // self.block_bytes)

    def as_json(self) -> dict[str, Any]:
        """Its entry in the header."""
        shape = list(self.shape)
        own = {"name": self.name, "dtype": self.dtype, "shape": shape, "parts": self.parts}
        return {**own, "block": self.block_bytes}


@dataclass(frozen=True)
class Place:
    """Where a section is: part i at ``offset + i * stride``, its first checksum ``first_sum``."""

    section: Section
    offset: int
    stride: int
    first_sum: int


@dataclass(frozen=True)
class Layout:
    """Places of all sections of a file."""

    sections: Sequence[Section]
    header_bytes: int
    align: int = ALIGN
    places: dict[str, Place] = field(init=False)
    sum_count: int = field(init=False)
    file_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        blocks = sum(section.parts * section.part_blocks for section in self.sections)
        end = HEADER_AT + self.header_bytes + 4 * blocks
        places, first_sum = {}, 0
        for section in self.sections:
            start, stride = _up(end, self.align), _up(section.part_bytes, self.align)
            places[section.name] = Place(section, start, stride, first_sum)
            first_sum += section.parts * section.part_blocks
            end = start + (section.parts - 1) * stride + section.part_bytes
        object.__setattr__(self, "places", places)
        object.__setattr__(self, "sum_count", blocks)
        object.__setattr__(self, "file_bytes", end)


def parse_section(value: Any) -> Section:
    """A section from the header; ValueError for an impossible one."""
    if not isinstance(value, dict) or set(value) != _FIELDS or value["dtype"] not in ITEM_BYTES:
        raise ValueError("a section is not described as it should be")
    name, shape, parts, block = value["name"], value["shape"], value["parts"], value["block"]
    if not isinstance(name, str) or not isinstance(shape, list) or len(shape) > 8:
        raise ValueError("a section is not described as it should be")
    # the limit keeps products small: Python's integers have none
    if not all(type(size) is int and 0 <= size < 2**48 for size in [*shape, parts, block]):
        raise ValueError(f"section {name!r} has an impossible size")
    cut = parts == 1 or (1 < parts <= MAX_PARTS and shape and shape[0] == parts)
    if not cut or block < 1:
        raise ValueError(f"section {name!r} has an impossible size")
    return Section(name, value["dtype"], tuple(shape), parts, block)


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple

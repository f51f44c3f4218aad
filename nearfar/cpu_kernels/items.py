"""How kernels read the items of far rows (format: `nearfar.storage`): to float32, in registers.

Numba has neither bfloat16 nor float16 on CPUs, so other NumPy types represent them: uint16 for the
bits of bfloat16, int16 for those of float16; float32 and int8 are themselves. Packed rows have the
unsigned types that represent them everywhere. The type alone decides how a row is read.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from numpy.typing import NDArray

from nearfar.cpu_kernels.compile import cpu_features, emitted
from nearfar.cpu_kernels.packed_rows import PACKED, PackedRows
from nearfar.cpu_kernels.vectors import (
    FLOAT,
    FLOATS,
    INT8,
    INT16,
    INT32,
    INTS,
    LANES,
    Emitter,
    floats,
    ints,
    number,
)
from nearfar.storage import SCALE_BITS

_STANDS_FOR = {
    torch.float32: (torch.float32, "f4"),
    torch.bfloat16: (torch.int16, "u2"),
    torch.float16: (torch.int16, "i2"),
    torch.int8: (torch.int8, "i1"),
    torch.uint8: (torch.uint8, "u1"),
    torch.uint32: (torch.int32, "u4"),
    torch.uint64: (torch.int64, "u8"),
}
CONVERTS_HALF = "f16c" in cpu_features() or platform.machine() in ("aarch64", "arm64")


def row_array(rows: torch.Tensor) -> NDArray[Any]:
    """``rows`` (CPU, contiguous; not copied) as kernels take them."""
    kind, name = _STANDS_FOR[rows.dtype]
    array: NDArray[Any] = rows.view(kind).numpy().view(name)
    return array


@dataclass(frozen=True)
class Items:
    """One type of items, and float32 made of LANES of them."""

    item: ir.Type
    num_bytes: int
    widen: Callable[[Emitter, ir.Value], ir.Value]
    scaled: bool = False  # whether the result of `widen` must be multiplied by a scale


class Rows:
    """Reads rows [key | value] of plain items; emits code at the place of ``emit``.

    A row is a list of addresses of its parts, the last of which is the row itself. A half is the
    address of the key, or the same plus ``half_bytes``. Dimensions ``d`` are multiples of LANES.
    """

    grouped = False  # whether a row has another part before itself
    scaled = False  # whether a half's numbers must still be multiplied by its scale
    shifted = False  # and whether its zero is then to be added
    ragged = True  # whether D may be other than a multiple of LANES

    def __init__(self, emit: Emitter, D: ir.Value, items: Items) -> None:
        self.emit, self.items = emit, items
        self.scaled = items.scaled
        self.half_bytes = emit.times(D, items.num_bytes)
        self.row_bytes = emit.times(self.half_bytes, 2)
        self.lane_bytes = LANES * items.num_bytes  # of LANES items

    def offsets(self, rows: ir.Value) -> list[ir.Value]:
        """Of the parts of the row of this number; of a vector of numbers vectors."""
        return [self.emit.builder.mul(rows, self.emit.like(rows, self.row_bytes))]

    def key(self, parts: list[ir.Value], d: ir.Value, count: ir.Value | None = None) -> ir.Value:
        """Dimensions of a key from ``d`` on: LANES, or ``count`` and then zeros."""
        return self.value(parts[-1], d, count)

    def value(self, half: ir.Value, d: ir.Value, count: ir.Value | None = None) -> ir.Value:
        """Dimensions of a value, as `key` gives those of a key."""
        emit, item = self.emit, self.items.item
        place = emit.at(half, emit.times(d, self.items.num_bytes))
        if count is None:
            return self.items.widen(emit, emit.load(place, ir.VectorType(item, LANES)))
        return self.items.widen(emit, emit.load_some(place, item, count))

    def scale(self, half: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Scale and zero of a half, of int8 items: a bfloat16 in their lowest bits, and 0."""
        emit, b = self.emit, self.emit.builder
        items = emit.load(half, ir.VectorType(INT8, SCALE_BITS))
        bits = b.trunc(items, ir.VectorType(ir.IntType(1), SCALE_BITS))
        high = b.zext(b.bitcast(bits, INT16), INT32)
        return b.bitcast(b.shl(high, INT32(16)), FLOAT), FLOAT(0.0)


def rows_of(emit: Emitter, dtype: types.Type, D: ir.Value) -> Rows | PackedRows:
    """The reader of rows of ``dtype``."""
    packed = PACKED.get(dtype)
    return Rows(emit, D, ITEMS[dtype]) if packed is None else PackedRows(emit, D, packed)


def _widen_nothing(emit: Emitter, items: ir.Value) -> ir.Value:
    return items


def _widen_brain(emit: Emitter, items: ir.Value) -> ir.Value:
    b = emit.builder
    return b.bitcast(b.shl(b.zext(items, INTS), ints(16)), FLOATS)


def _widen_half(emit: Emitter, items: ir.Value) -> ir.Value:
    b = emit.builder
    if CONVERTS_HALF:
        return b.fpext(b.bitcast(items, ir.VectorType(ir.HalfType(), LANES)), FLOATS)
    wide = b.zext(items, INTS)
    # moves the exponent's bias by a multiplication: exact for subnormal numbers too
    size = b.bitcast(b.shl(b.and_(wide, ints(0x7FFF)), ints(13)), FLOATS)
    sign = b.shl(b.and_(wide, ints(0x8000)), ints(16))
    return b.bitcast(b.or_(b.bitcast(b.fmul(size, floats(2.0**112)), INTS), sign), FLOATS)


def _widen_byte(emit: Emitter, items: ir.Value) -> ir.Value:
    return emit.builder.sitofp(emit.builder.sext(items, INTS), FLOATS)


ITEMS = {
    types.float32: Items(FLOAT, 4, _widen_nothing),
    types.uint16: Items(INT16, 2, _widen_brain),
    types.int16: Items(INT16, 2, _widen_half),
    types.int8: Items(INT8, 1, _widen_byte, scaled=True),
}


def _find_row(emit, signature, arguments):
    """Of (rows, row, key): what reads rows, addresses of the row's parts and of the key, and D."""
    rows, row, key = arguments
    start, _ = emit.array(signature.args[0], rows)
    out, (D,) = emit.array(signature.args[2], key)
    reader = rows_of(emit, signature.args[0].dtype, D)
    return reader, [emit.at(start, offset) for offset in reader.offsets(row)], out, D


@intrinsic
def _read_key(typing_context, rows, row, key):
    def generate(context, builder, signature, arguments):
        emit = Emitter(context, builder)
        reader, parts, out, D = _find_row(emit, signature, arguments)
        scale = [emit.splat(x) for x in reader.scale(parts[-1])] if reader.scaled else []

        def move(first, count):
            read = reader.key(parts, first, count)
            read = emit.fma(read, *scale) if scale else read
            place = emit.at(out, emit.times(first, 4))
            if count is None:
                emit.store(read, place)
            else:
                emit.store_some(read, place, count)

        chunks = builder.udiv(D, number(LANES))
        with emit.loop(chunks) as chunk:
            move(emit.times(chunk, LANES), None)
        first = emit.times(chunks, LANES)
        rest = builder.sub(D, first)
        if reader.ragged:
            with emit.when(builder.icmp_signed(">", rest, number(0))):
                move(first, rest)
        return context.get_dummy_value()

    return types.void(rows, types.int64, key), generate


@emitted
def read_key(
    rows,  # [N, width] as `row_array` gives them
    row,
    key,  # [D] float32, written
):
    """Widen the key of ``rows[row]``."""
    _read_key(rows, row, key)


@intrinsic
def _prefetch_row(typing_context, rows, row, key):
    def generate(context, builder, signature, arguments):
        emit = Emitter(context, builder)
        reader, parts, _, _ = _find_row(emit, signature, arguments)
        emit.prefetch_lines(parts[-1], reader.row_bytes)
        return context.get_dummy_value()

    return types.void(rows, types.int64, key), generate


@emitted
def prefetch_row(
    rows,  # [N, width] as `row_array` gives them
    row,
    key,  # [D] float32, not looked at
):
    """Prefetch ``rows[row]``, key and value."""
    _prefetch_row(rows, row, key)

"""How kernels read the items of far rows (format: `nearfar.storage`): to float32, in registers.

Numba has neither bfloat16 nor float16 on CPUs, so rows come as NumPy types that stand for them:
float32 and int8 for themselves, uint16 for the bits of bfloat16, int16 for those of float16. The
type alone says how a row is read.
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
}
CONVERTS_HALF = "f16c" in cpu_features() or platform.machine() in ("aarch64", "arm64")


def row_array(rows: torch.Tensor) -> NDArray[Any]:
    """``rows`` (CPU, contiguous; not copied) as kernels take them."""
    kind, name = _STANDS_FOR[rows.dtype]
    array: NDArray[Any] = rows.view(kind).numpy().view(name)
    return array


@dataclass(frozen=True)
class Items:
    """One storage type: its items, and float32 made of LANES of them."""

    item: ir.Type
    num_bytes: int
    widen: Callable[[Emitter, ir.Value], ir.Value]
    scaled: bool = False  # whether what `widen` gives is to be multiplied by `scale`

    def load(self, emit: Emitter, place: ir.Value) -> ir.Value:
        """LANES items from ``place`` on."""
        return self.widen(emit, emit.load(place, ir.VectorType(self.item, LANES)))

    def load_some(self, emit: Emitter, place: ir.Value, count: ir.Value) -> ir.Value:
        """``count`` < LANES items, then zeros."""
        return self.widen(emit, emit.load_some(place, self.item, count))


def scale(emit: Emitter, place: ir.Value) -> ir.Value:
    """The scale of the int8 items from ``place`` on: a bfloat16 in their lowest bits."""
    items = emit.load(place, ir.VectorType(INT8, SCALE_BITS))
    bits = emit.builder.trunc(items, ir.VectorType(ir.IntType(1), SCALE_BITS))
    high = emit.builder.zext(emit.builder.bitcast(bits, INT16), INT32)
    return emit.builder.bitcast(emit.builder.shl(high, INT32(16)), FLOAT)


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


@intrinsic
def _read_key(typing_context, rows, row, key):
    items = ITEMS[rows.dtype]

    def generate(context, builder, signature, arguments):
        emit = Emitter(context, builder)
        start, (_, width) = emit.array(signature.args[0], arguments[0])
        out, (D,) = emit.array(signature.args[2], arguments[2])
        place = emit.at(start, emit.times(emit.times(arguments[1], width), items.num_bytes))
        factor = emit.splat(scale(emit, place)) if items.scaled else floats(1.0)
        chunks = builder.udiv(D, number(LANES))
        with emit.loop(chunks) as chunk:
            first = emit.times(chunk, LANES)
            read = items.load(emit, emit.at(place, emit.times(first, items.num_bytes)))
            emit.store(builder.fmul(read, factor), emit.at(out, emit.times(first, 4)))
        first = emit.times(chunks, LANES)
        rest = builder.sub(D, first)
        with emit.when(builder.icmp_signed(">", rest, number(0))):
            tail = emit.at(place, emit.times(first, items.num_bytes))
            read = builder.fmul(items.load_some(emit, tail, rest), factor)
            emit.store_some(read, emit.at(out, emit.times(first, 4)), rest)
        return context.get_dummy_value()

    return types.void(rows, types.int64, key), generate


@emitted
def read_key(
    rows,  # [N, 2 D] as `row_array` gives them
    row,
    key,  # [D] float32, written
):
    """Widen the key of ``rows[row]``."""
    _read_key(rows, row, key)

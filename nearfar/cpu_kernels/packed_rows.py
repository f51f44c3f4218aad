"""How kernels read packed rows (format: `nearfar.packing`): codes to float32, in registers.

It has the interface of `items.Rows`. A half of a row with its own step and zero gives only its
codes: the dot product is scaled and shifted at the end. If channels have their own steps, the
reader gives finished numbers.
"""

from __future__ import annotations

from collections.abc import Callable

from llvmlite import ir
from numba import types

from nearfar.cpu_kernels.vectors import (
    FLOAT,
    FLOATS,
    INT8,
    INT32,
    INTS,
    LANES,
    Emitter,
    ints,
    number,
)
from nearfar.packing import BLOCK, GROUP, PAIR_BYTES, Packing
from nearfar.storage import PACKINGS

PACKED = dict(zip((types.uint8, types.uint32, types.uint64), PACKINGS.values(), strict=True))


class PackedRows:
    """Reads rows of one packed format."""

    ragged = False

    def __init__(self, emit: Emitter, D: ir.Value, packing: Packing) -> None:
        self.emit, self.packing = emit, packing
        self.grouped = packing.in_groups
        self.scaled = self.shifted = not packing.in_groups
        self.lane_bytes = LANES * packing.bits // 8
        codes = emit.times(emit.builder.udiv(D, number(8)), packing.bits)
        pairs = number(PAIR_BYTES)
        self.group_bytes = number(0)
        self.half_bytes = codes if self.grouped else emit.builder.add(codes, pairs)
        if self.grouped:
            self.group_bytes = emit.times(D, PAIR_BYTES)
            pairs = emit.times(emit.builder.udiv(D, number(GROUP)), PAIR_BYTES)
        # of a value: its codes lie behind its pairs
        self._pair_bytes = pairs
        self.row_bytes = emit.builder.add(self.half_bytes, emit.builder.add(pairs, codes))

    def offsets(self, rows: ir.Value) -> list[ir.Value]:
        """Of the row of this number, and before it of its group; of vectors vectors."""
        emit, b = self.emit, self.emit.builder
        own = b.mul(rows, emit.like(rows, self.row_bytes))
        if not self.grouped:
            return [own]
        group = b.udiv(rows, emit.like(rows, number(GROUP)))
        unit = b.add(self.group_bytes, emit.times(self.row_bytes, GROUP))
        behind = b.add(group, emit.like(rows, number(1)))
        own = b.add(own, b.mul(behind, emit.like(rows, self.group_bytes)))
        return [b.mul(group, emit.like(rows, unit)), own]

    def key(self, parts: list[ir.Value], d: ir.Value, _count: None = None) -> ir.Value:
        """LANES dimensions of a key from ``d`` on, or their codes."""
        if not self.grouped:
            return self.value(parts[-1], d)
        emit = self.emit
        pairs = emit.load(emit.at(parts[0], emit.times(d, PAIR_BYTES)), INTS)
        return emit.fma(self._codes(parts[-1], d), *self._halves(pairs, ints, FLOATS))

    def value(self, half: ir.Value, d: ir.Value, _count: None = None) -> ir.Value:
        """LANES dimensions of a value from ``d`` on, or their codes."""
        emit = self.emit
        codes = self._codes(emit.at(half, self._pair_bytes), d)
        if not self.grouped:
            return codes
        place = emit.times(emit.builder.udiv(d, number(GROUP)), PAIR_BYTES)
        step, zero = self.scale(emit.at(half, place))
        return emit.fma(codes, emit.splat(step), emit.splat(zero))

    def scale(self, half: ir.Value) -> tuple[ir.Value, ir.Value]:
        """The step and the zero at the start of a half."""
        return self._halves(self.emit.load(half, INT32), INT32, FLOAT)

    def _halves(
        self, pairs: ir.Value, constant: Callable[[int], ir.Value], kind: ir.Type
    ) -> tuple[ir.Value, ir.Value]:
        """Steps and zeros of pairs."""
        b = self.emit.builder
        steps = b.and_(pairs, constant(-(2**16)))
        return b.bitcast(steps, kind), b.bitcast(b.shl(pairs, constant(16)), kind)

    def _codes(self, start: ir.Value, d: ir.Value) -> ir.Value:
        """Codes from dimension ``d`` on; the first code is at ``start``."""
        emit, b, bits = self.emit, self.emit.builder, self.packing.bits
        size = BLOCK * bits // 8
        block = b.udiv(d, number(BLOCK))
        packed = emit.load(emit.at(start, emit.times(block, size)), ir.VectorType(INT8, size))
        wide = b.zext(emit.shuffle(packed, packed, [i % size for i in range(LANES)]), INTS)
        shifts = ir.Constant(INTS, [i // size * bits for i in range(LANES)])
        if LANES < BLOCK:  # the upper half of a block
            behind = b.urem(b.udiv(d, number(LANES)), number(BLOCK // LANES))
            step = b.trunc(emit.times(behind, LANES // size * bits), INT32)
            shifts = b.add(shifts, emit.splat_int(step))
        codes = b.and_(b.lshr(wide, shifts), ints(2**bits - 1))
        return b.sitofp(codes, FLOATS)

"""One tile of the online softmax: up to TILE rows for a few query heads that share them.

A block of rows times a block of heads gives one sum for each lane of a vector: 4 rows for 4 heads,
16 rows for one head (with 16 lanes). The compiler knows the number of heads of a block and makes
code for that number only: see `head_block`. Dot products stay in registers. A tree of shuffles
makes one vector of them, first of logits, then of weights. Values are added to a few vectors of the
accumulator at a time, each row's weight spread from memory.

See `attend` for the meaning of the numbers.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from nearfar.cpu_kernels.compile import emitted
from nearfar.cpu_kernels.items import Rows, rows_of
from nearfar.cpu_kernels.tile_rows import TILE, TileRows
from nearfar.cpu_kernels.vectors import (
    FLOAT,
    FLOATS,
    LANES,
    Emitter,
    floats,
    number,
)

MAX_HEADS = 8  # of a block


def head_block(heads: int) -> tuple[int, ...]:
    """A tuple as long as a block has heads, of ``heads`` that share their keys.

    That is the largest divisor of ``heads`` for which the registers suffice.
    """
    fits = min(heads, MAX_HEADS)
    return (0,) * max(size for size in range(1, fits + 1) if heads % size == 0)


class _Tile:
    """Emits the four steps of one tile; all addresses are of the first of its ``heads``."""

    def __init__(self, emit: Emitter, dtype: types.Type, heads: int) -> None:
        self.emit = emit
        self.dtype = dtype
        self.heads = heads
        self.block = LANES // (1 << (heads - 1).bit_length())  # rows
        self.columns = min(4, self.block)  # vectors of an accumulator that are kept in registers
        self.row_of_lane = [lane % self.block for lane in range(LANES)]
        self.head_of_lane = [min(lane // self.block, heads - 1) for lane in range(LANES)]

    def take_arguments(self, signature: Any, arguments: Any) -> None:
        """Addresses, sizes and room on the stack."""
        emit, b = self.emit, self.emit.builder
        rows, indices, log_weights, first, stop, q, head, out, top, total = (
            emit.array(kind, value) if isinstance(kind, types.Array) else value
            for kind, value in zip(signature.args[1:], arguments[1:], strict=True)
        )
        self.D = q[1][1]
        self.reader = rows_of(emit, self.dtype, self.D)
        self.head_bytes = emit.times(self.D, 4)
        self.q, self.out = (emit.at(x[0], emit.times(head, self.head_bytes)) for x in (q, out))
        self.top, self.total = (emit.at(x[0], emit.times(head, 4)) for x in (top, total))
        self.weights = emit.local(FLOATS, TILE // self.block)
        lists = [(array, sizes[0]) for array, sizes in (indices, log_weights)]
        self.rows = TileRows(emit, self.reader, self.block, (rows[0], *lists), (first, stop))
        self.blocks = b.udiv(b.add(self.rows.count, number(self.block - 1)), number(self.block))
        self.chunks = b.udiv(self.D, number(LANES))
        self.rest = b.sub(self.D, emit.times(self.chunks, LANES))

    def find_logits(self) -> None:
        """Dot products with the keys, plus log-weights, and the largest of each head."""
        emit, b = self.emit, self.emit.builder
        self.highest = emit.local(FLOATS)
        emit.store(floats(float("-inf")), self.highest)
        sums = [emit.local(FLOATS) for _ in range(self.heads * self.block)]
        query_sums = self._query_sums() if self.reader.shifted else floats(0.0)
        with emit.loop(self.blocks) as block:
            keys = [self.rows.parts(block, r) for r in range(self.block)]
            for each in sums:
                emit.store(floats(0.0), each)
            if not isinstance(self.reader, Rows):
                self.rows.prefetch_packed(block)
            with emit.loop(self.chunks) as chunk:
                if isinstance(self.reader, Rows):
                    self.rows.prefetch_keys(block, chunk)
                self._add_products(sums, keys, emit.times(chunk, LANES), None)
            if self.reader.ragged:
                with emit.when(b.icmp_signed(">", self.rest, number(0))):
                    self._add_products(sums, keys, emit.times(self.chunks, LANES), self.rest)
            logits = self._all_sums(sums)
            if self.reader.scaled:
                scales, zeros = self._scales([parts[-1] for parts in keys])
                logits = emit.fma(logits, scales, b.fmul(zeros, query_sums))
            row_biases = ir.VectorType(FLOAT, self.block)
            first_bias = emit.at(self.rows.biases, emit.times(block, 4 * self.block))
            bias = emit.load(first_bias, row_biases)
            logits = b.fadd(logits, emit.shuffle(bias, bias, self.row_of_lane))
            emit.store(logits, self._block_of_weights(block))
            emit.store(emit.maximum(logits, emit.load(self.highest, FLOATS)), self.highest)

    def find_weights(self) -> None:
        """Weights exp(logit - top) in place of logits; new tops and totals."""
        emit, b = self.emit, self.emit.builder
        old_top = self._of_heads(self.top)
        highest = emit.over_groups(emit.load(self.highest, FLOATS), self.block, emit.maximum)
        top = emit.maximum(highest, old_top)
        rescale = emit.exp(b.fsub(old_top, top))
        mass, shift = emit.local(FLOATS), emit.local(FLOATS)
        emit.store(floats(0.0), mass)
        emit.store(floats(0.0), shift)
        with emit.loop(self.blocks) as block:
            place = self._block_of_weights(block)
            weights = emit.exp(b.fsub(emit.load(place, FLOATS), top))
            emit.store(b.fadd(weights, emit.load(mass, FLOATS)), mass)
            if self.reader.scaled:
                scales, zeros = self._scales([self.rows.value(block, r) for r in range(self.block)])
                if self.reader.shifted:
                    emit.add_to(shift, weights, zeros)
                weights = b.fmul(weights, scales)
            emit.store(weights, place)
        added = emit.over_groups(emit.load(mass, FLOATS), self.block, b.fadd)
        total = emit.fma(self._of_heads(self.total), rescale, added)
        for h in range(self.heads):
            lane = h * self.block
            emit.store(emit.lane(top, lane), emit.at(self.top, 4 * h))
            emit.store(emit.lane(total, lane), emit.at(self.total, 4 * h))
        self.rescale = self._of_each_head(rescale)
        shifts = emit.over_groups(emit.load(shift, FLOATS), self.block, b.fadd)
        self.shift = self._of_each_head(shifts)

    def add_values(self) -> None:
        """Rescale the accumulators and add the weighted values."""
        emit, b = self.emit, self.emit.builder
        groups = b.udiv(self.chunks, number(self.columns))
        with emit.loop(groups) as group:
            self._add_columns(emit.times(group, self.columns * LANES), self.columns)
        done = emit.times(groups, self.columns)
        if self.columns > 1:
            with emit.loop(b.sub(self.chunks, done)) as chunk:
                self._add_columns(emit.times(b.add(done, chunk), LANES), 1)
        if self.reader.ragged:
            with emit.when(b.icmp_signed(">", self.rest, number(0))):
                self._add_columns(emit.times(self.chunks, LANES), 1, count=self.rest)

    def _query_sums(self) -> ir.Value:
        """Sums over the dimensions of each head's query, in the order of logits."""
        emit = self.emit
        sums = [emit.local(FLOATS) for _ in range(self.heads * self.block)]
        for h in range(self.heads):
            emit.store(floats(0.0), sums[h * self.block])
            with emit.loop(self.chunks) as chunk:
                place = emit.at(
                    self.q, emit.times(self.head_bytes, h), emit.times(chunk, 4 * LANES)
                )
                emit.add_to(sums[h * self.block], emit.load(place, FLOATS), floats(1.0))
            for r in range(1, self.block):
                emit.store(emit.load(sums[h * self.block], FLOATS), sums[h * self.block + r])
        return self._all_sums(sums)

    def _all_sums(self, sums: list[ir.Value]) -> ir.Value:
        """The sum of each vector of ``sums``, a lane each."""
        unused = LANES - len(sums)
        return self.emit.sums([*(self.emit.load(s, FLOATS) for s in sums), *[floats(0.0)] * unused])

    def _of_each_head(self, lanes: ir.Value) -> list[ir.Value]:
        """The number of each head, LANES times."""
        return [
            self.emit.shuffle(lanes, lanes, [h * self.block] * LANES) for h in range(self.heads)
        ]

    def _add_products(
        self, sums: list[ir.Value], keys: list[list[ir.Value]], d: ir.Value, count: ir.Value | None
    ) -> None:
        """Add the products of dimensions from ``d`` on: LANES, or ``count``."""
        emit = self.emit
        queries = [
            self._floats(emit.at(self.q, emit.times(self.head_bytes, h), emit.times(d, 4)), count)
            for h in range(self.heads)
        ]
        for r, key in enumerate(keys):
            wide = self.reader.key(key, d, count)
            for h, query in enumerate(queries):
                emit.add_to(sums[h * self.block + r], query, wide)

    def _add_columns(self, d: ir.Value, columns: int, count: ir.Value | None = None) -> None:
        """Add values to the dimensions of ``columns`` vectors from ``d`` on, or to ``count``."""
        emit, b = self.emit, self.emit.builder
        places = [
            [
                emit.at(self.out, emit.times(self.head_bytes, h), emit.times(d, 4), 4 * LANES * c)
                for h in range(self.heads)
            ]
            for c in range(columns)
        ]
        sums = [[emit.local(FLOATS) for _ in range(self.heads)] for _ in range(columns)]
        for c in range(columns):
            for h in range(self.heads):
                old = self._floats(places[c][h], count)
                new = b.fmul(old, self.rescale[h])
                if self.reader.shifted:
                    new = emit.fma(old, self.rescale[h], self.shift[h])
                emit.store(new, sums[c][h])
        with emit.loop(self.blocks) as block:
            weights = self._block_of_weights(block)
            for r in range(self.block):
                half = self.rows.value(block, r)
                if columns == self.columns and count is None and isinstance(self.reader, Rows):
                    self.rows.prefetch_values(self.reader, block, r, d, columns)
                spread = [
                    emit.splat(emit.load(emit.at(weights, 4 * (h * self.block + r)), FLOAT))
                    for h in range(self.heads)
                ]
                for c in range(columns):
                    value = self.reader.value(half, b.add(d, number(c * LANES)), count)
                    for h in range(self.heads):
                        emit.add_to(sums[c][h], spread[h], value)
        for c in range(columns):
            for h in range(self.heads):
                self._store_floats(emit.load(sums[c][h], FLOATS), places[c][h], count)

    def _block_of_weights(self, block: ir.Value) -> ir.Value:
        return self.emit.at(self.weights, self.emit.times(block, 4 * LANES))

    def _scales(self, halves: list[ir.Value]) -> tuple[ir.Value, ir.Value]:
        """Scales and zeros of halves of the rows of a block, in the order of logits."""
        scales, zeros = zip(*[self.reader.scale(half) for half in halves], strict=True)
        return self.emit.spread(scales, self.row_of_lane), self.emit.spread(zeros, self.row_of_lane)

    def _of_heads(self, place: ir.Value) -> ir.Value:
        """One float32 of each head, in the order of logits."""
        scalars = [self.emit.load(self.emit.at(place, 4 * h), FLOAT) for h in range(self.heads)]
        return self.emit.spread(scalars, self.head_of_lane)

    def _floats(self, place: ir.Value, count: ir.Value | None) -> ir.Value:
        if count is None:
            return self.emit.load(place, FLOATS)
        return self.emit.load_some(place, FLOAT, count)

    def _store_floats(self, value: ir.Value, place: ir.Value, count: ir.Value | None) -> None:
        if count is None:
            self.emit.store(value, place)
        else:
            self.emit.store_some(value, place, count)


@intrinsic
def _attend_tile(
    typing_context,
    block,
    rows,
    indices,
    log_weights,
    first,
    stop,
    q,
    head,
    out,
    top,
    total,
):
    def generate(context, builder, signature, arguments):
        tile = _Tile(Emitter(context, builder), rows.dtype, len(block))
        tile.take_arguments(signature, arguments)
        tile.rows.find()
        tile.find_logits()
        tile.find_weights()
        tile.add_values()
        return context.get_dummy_value()

    whole = types.int64
    arguments = (block, rows, indices, log_weights, whole, whole, q, whole, out, top, total)
    return types.void(*arguments), generate


@emitted
def attend_tile(
    block,  # tuple from `head_block`
    rows,  # [N, width] as `items.row_array` gives them
    indices,  # [M] int32, or empty: row i is rows[i]
    log_weights,  # [M] float32, or empty: all 0
    first,
    stop,  # the tile is the entries first to min(first + TILE, stop) of indices, at least one
    q,  # [heads, D] float32
    head,  # the heads are head to head + len(block)
    out,  # [heads, D] float32, updated: sum of exp(logit - top) times value
    top,  # [heads] float32, updated: largest logit
    total,  # [heads] float32, updated: sum of exp(logit - top)
):
    """Add one tile of rows to the online softmax of a few query heads."""
    _attend_tile(block, rows, indices, log_weights, first, stop, q, head, out, top, total)

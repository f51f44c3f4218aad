"""One tile of the online softmax: up to TILE rows for a few query heads that share them.

A block of rows times a block of heads is as many sums as a vector has lanes: 4 rows for 4 heads, 16
rows for one head (with 16 lanes). How many heads a block has is known to the compiler, which makes
code for that number only: see `head_block`. Dot products stay in registers, become one vector by a
tree of shuffles, and stay together as such a vector of logits and then of weights. Values are added
to a few vectors of the accumulator at a time, each row's weight spread from memory. While a tile is
worked on, the lines of the next one are asked for, evenly, so that waiting and arithmetic overlap.

See `attend` for what the numbers mean.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from nearfar.cpu_kernels.compile import emitted
from nearfar.cpu_kernels.items import ITEMS, Items, scale
from nearfar.cpu_kernels.vectors import (
    FLOAT,
    FLOATS,
    INT32,
    INT64,
    INTS,
    LANES,
    LINE_BYTES,
    Emitter,
    floats,
    number,
)

TILE = 64  # rows
MAX_HEADS = 8  # of a block


def head_block(heads: int) -> tuple[int, ...]:
    """A tuple whose length is how many of ``heads`` that share their keys make a block.

    It is the largest divisor that registers suffice for.
    """
    fits = min(heads, MAX_HEADS)
    return (0,) * max(size for size in range(1, fits + 1) if heads % size == 0)


class _Tile:
    """Emits the four steps of one tile; all addresses are of the first of its ``heads``."""

    def __init__(self, emit: Emitter, items: Items, heads: int) -> None:
        self.emit = emit
        self.items = items
        self.heads = heads
        self.block = LANES // (1 << (heads - 1).bit_length())  # rows
        self.columns = min(4, self.block)  # vectors of an accumulator that are kept in registers
        self.row_of_lane = [lane % self.block for lane in range(LANES)]
        self.head_of_lane = [min(lane // self.block, heads - 1) for lane in range(LANES)]

    def take_arguments(self, signature: Any, arguments: Any) -> None:
        """Addresses, sizes and room on the stack."""
        emit, b = self.emit, self.emit.builder
        rows, indices, log_weights, self.first, self.stop, q, head, out, top, total = (
            emit.array(kind, value) if isinstance(kind, types.Array) else value
            for kind, value in zip(signature.args[1:], arguments[1:], strict=True)
        )
        self.head = head
        self.rows, self.indices, self.log_weights = rows[0], indices[0], log_weights[0]
        self.any_row = b.icmp_signed("==", indices[1][0], number(0))
        self.weighted = b.icmp_signed(">", log_weights[1][0], number(0))
        self.D = q[1][1]
        self.half_bytes = emit.times(self.D, self.items.num_bytes)
        self.head_bytes = emit.times(self.D, 4)
        self.q, self.out = (emit.at(x[0], emit.times(head, self.head_bytes)) for x in (q, out))
        self.top, self.total = (emit.at(x[0], emit.times(head, 4)) for x in (top, total))
        self.places = emit.local(INT64, 2 * TILE)  # offsets of the rows of this tile and the next
        self.own_biases = emit.local(FLOAT, TILE)  # log-weights
        self.weights = emit.local(FLOATS, TILE // self.block)
        left = b.sub(self.stop, self.first)
        few = b.icmp_signed("<", left, number(TILE))
        self.count = b.select(few, left, number(TILE))
        self.blocks = b.udiv(b.add(self.count, number(self.block - 1)), number(self.block))
        self.chunks = b.udiv(self.D, number(LANES))
        self.rest = b.sub(self.D, emit.times(self.chunks, LANES))

    def find_rows(self) -> None:
        """Where the rows of this tile and the next lie, and the log-weights of this one's.

        Places behind the last row are filled with it, at log-weight -inf.
        """
        emit, b = self.emit, self.emit.builder
        behind = b.add(self.first, number(2 * TILE))
        with b.if_else(b.icmp_signed("<=", behind, self.stop)) as (many, few):
            with many:
                self._find_many()
            with few:
                self._find_few()
        # log-weights of a whole tile are read where they are
        whole = b.and_(self.weighted, b.icmp_signed("==", self.count, number(TILE)))
        there = emit.at(self.log_weights, emit.times(self.first, 4))
        self.biases = b.select(whole, there, self.own_biases)

    def _find_many(self) -> None:
        """The case of two whole tiles, LANES rows at a time."""
        emit, b = self.emit, self.emit.builder
        offsets = ir.VectorType(INT64, LANES)
        in_order = ir.Constant(offsets, list(range(LANES)))
        row_bytes = b.add(self.half_bytes, self.half_bytes)
        for t in range(0, 2 * TILE, LANES):
            first = b.add(self.first, number(t))
            rows = emit.choose(
                self.any_row,
                partial(lambda first: b.add(emit.splat_whole(first), in_order), first),
                partial(self._indices, first, INTS, offsets),
            )
            places = b.mul(rows, emit.splat_whole(row_bytes))
            emit.store(places, emit.at(self.places, 8 * t))
        for t in range(0, TILE, LANES):
            emit.store(floats(0.0), emit.at(self.own_biases, 4 * t))

    def _find_few(self) -> None:
        """The last two tiles of a range."""
        emit, b = self.emit, self.emit.builder
        last = b.sub(self.stop, number(1))
        with emit.loop(number(2 * TILE)) as t:
            behind = b.icmp_signed(">", b.add(self.first, t), last)
            position = b.select(behind, last, b.add(self.first, t))
            row = emit.choose(
                self.any_row,
                lambda: position,
                partial(self._indices, position, INT32, INT64),
            )
            place = emit.times(row, emit.times(self.half_bytes, 2))
            emit.store(place, emit.at(self.places, emit.times(t, 8)))
        with emit.loop(number(TILE)) as t:
            inside = b.icmp_signed("<", t, self.count)
            offset = emit.times(b.add(self.first, t), 4)
            bias = emit.choose(
                b.and_(inside, self.weighted),
                lambda: emit.load(emit.at(self.log_weights, offset), FLOAT),
                lambda: b.select(inside, FLOAT(0.0), FLOAT(float("-inf"))),
            )
            emit.store(bias, emit.at(self.own_biases, emit.times(t, 4)))

    def _indices(self, position: ir.Value, kind: ir.Type, wide: ir.Type) -> ir.Value:
        """One index or several from ``position`` on."""
        place = self.emit.at(self.indices, self.emit.times(position, 4))
        return self.emit.builder.sext(self.emit.load(place, kind), wide)

    def find_logits(self) -> None:
        """Dot products with the keys, plus log-weights, and the largest of each head."""
        emit, b = self.emit, self.emit.builder
        self.highest = emit.local(FLOATS)
        emit.store(floats(float("-inf")), self.highest)
        sums = [emit.local(FLOATS) for _ in range(self.heads * self.block)]
        with emit.loop(self.blocks) as block:
            keys = [self._row(block, r) for r in range(self.block)]
            for each in sums:
                emit.store(floats(0.0), each)
            with emit.loop(self.chunks) as chunk:
                self._prefetch_keys(block, chunk)
                self._add_products(sums, keys, emit.times(chunk, LANES), None)
            with emit.when(b.icmp_signed(">", self.rest, number(0))):
                self._add_products(sums, keys, emit.times(self.chunks, LANES), self.rest)
            unused = LANES - len(sums)
            logits = emit.sums([*(emit.load(s, FLOATS) for s in sums), *[floats(0.0)] * unused])
            if self.items.scaled:
                logits = b.fmul(logits, self._scales(keys))
            row_biases = ir.VectorType(FLOAT, self.block)
            first_bias = emit.at(self.biases, emit.times(block, 4 * self.block))
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
        mass = emit.local(FLOATS)
        emit.store(floats(0.0), mass)
        with emit.loop(self.blocks) as block:
            place = self._block_of_weights(block)
            weights = emit.exp(b.fsub(emit.load(place, FLOATS), top))
            emit.store(b.fadd(weights, emit.load(mass, FLOATS)), mass)
            if self.items.scaled:
                values = [emit.at(self._row(block, r), self.half_bytes) for r in range(self.block)]
                weights = b.fmul(weights, self._scales(values))
            emit.store(weights, place)
        added = emit.over_groups(emit.load(mass, FLOATS), self.block, b.fadd)
        total = emit.fma(self._of_heads(self.total), rescale, added)
        for h in range(self.heads):
            lane = h * self.block
            emit.store(emit.lane(top, lane), emit.at(self.top, 4 * h))
            emit.store(emit.lane(total, lane), emit.at(self.total, 4 * h))
        self.rescale = [
            emit.shuffle(rescale, rescale, [h * self.block] * LANES) for h in range(self.heads)
        ]

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
        with emit.when(b.icmp_signed(">", self.rest, number(0))):
            self._add_columns(emit.times(self.chunks, LANES), 1, count=self.rest)

    def _add_products(
        self, sums: list[ir.Value], keys: list[ir.Value], d: ir.Value, count: ir.Value | None
    ) -> None:
        """Add the products of dimensions from ``d`` on: LANES, or ``count``."""
        emit = self.emit
        queries = [
            self._floats(emit.at(self.q, emit.times(self.head_bytes, h), emit.times(d, 4)), count)
            for h in range(self.heads)
        ]
        for r, key in enumerate(keys):
            wide = self._items(emit.at(key, emit.times(d, self.items.num_bytes)), count)
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
                emit.store(b.fmul(old, self.rescale[h]), sums[c][h])
        with emit.loop(self.blocks) as block:
            weights = self._block_of_weights(block)
            for r in range(self.block):
                offset = b.add(self.half_bytes, emit.times(d, self.items.num_bytes))
                row = emit.at(self._row(block, r), offset)
                if columns == self.columns and count is None:
                    self._prefetch_values(block, r, offset)
                spread = [
                    emit.splat(emit.load(emit.at(weights, 4 * (h * self.block + r)), FLOAT))
                    for h in range(self.heads)
                ]
                for c in range(columns):
                    value = self._items(emit.at(row, c * LANES * self.items.num_bytes), count)
                    for h in range(self.heads):
                        emit.add_to(sums[c][h], spread[h], value)
        for c in range(columns):
            for h in range(self.heads):
                self._store_floats(emit.load(sums[c][h], FLOATS), places[c][h], count)

    def _prefetch_keys(self, block: ir.Value, chunk: ir.Value) -> None:
        """Ask for some lines of the keys that stand in the next tile where this block's do.

        While the chunks of a line pass, all rows get their turn: a core waits for few lines at a
        time, and asked for in one go they would come in bursts with nothing between.
        """
        emit, b = self.emit, self.emit.builder
        chunks = max(1, LINE_BYTES // (LANES * self.items.num_bytes))  # of a line
        turn = b.urem(chunk, number(chunks))
        offset = emit.times(chunk, LANES * self.items.num_bytes)
        for r in range(max(1, self.block // chunks)):
            row = b.urem(
                b.add(emit.times(turn, max(1, self.block // chunks)), number(r)),
                number(self.block),
            )
            place = emit.at(
                self.places, emit.times(block, 8 * self.block), 8 * TILE, emit.times(row, 8)
            )
            emit.prefetch(emit.at(self.rows, emit.load(place, INT64), offset))

    def _prefetch_values(self, block: ir.Value, r: int, offset: ir.Value) -> None:
        """Ask for what stands in the next tile where the columns from ``offset`` on do in this."""
        emit = self.emit
        place = emit.at(self._row(block, TILE + r), offset)
        num_bytes = self.columns * LANES * self.items.num_bytes
        for line in range(0, num_bytes, LINE_BYTES):
            emit.prefetch(emit.at(place, line))

    def _row(self, block: ir.Value, r: int) -> ir.Value:
        emit = self.emit
        place = emit.at(self.places, emit.times(block, 8 * self.block), 8 * r)
        return emit.at(self.rows, emit.load(place, INT64))

    def _block_of_weights(self, block: ir.Value) -> ir.Value:
        return self.emit.at(self.weights, self.emit.times(block, 4 * LANES))

    def _scales(self, places: list[ir.Value]) -> ir.Value:
        """Scales of the rows of a block, as their logits lie."""
        return self.emit.spread([scale(self.emit, place) for place in places], self.row_of_lane)

    def _of_heads(self, place: ir.Value) -> ir.Value:
        """One float32 of each head, as the logits of the heads lie."""
        scalars = [self.emit.load(self.emit.at(place, 4 * h), FLOAT) for h in range(self.heads)]
        return self.emit.spread(scalars, self.head_of_lane)

    def _items(self, place: ir.Value, count: ir.Value | None) -> ir.Value:
        if count is None:
            return self.items.load(self.emit, place)
        return self.items.load_some(self.emit, place, count)

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
        tile = _Tile(Emitter(context, builder), ITEMS[rows.dtype], len(block))
        tile.take_arguments(signature, arguments)
        tile.find_rows()
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
    rows,  # [N, 2 D] as `items.row_array` gives them
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

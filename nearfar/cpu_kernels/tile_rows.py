"""Finds the rows of a tile of the online softmax, and prefetches those of the next.

The lines of the next tile are prefetched evenly during the work on a tile, so that waiting and
arithmetic overlap.
"""

from __future__ import annotations

from functools import partial

from llvmlite import ir

from nearfar.cpu_kernels.items import Rows
from nearfar.cpu_kernels.packed_rows import PackedRows
from nearfar.cpu_kernels.vectors import (
    FLOAT,
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


class TileRows:
    """Emits the finding of rows; see `attend_tile.attend_tile` for the arguments.

    ``block`` rows are worked on together.
    """

    def __init__(
        self,
        emit: Emitter,
        reader: Rows | PackedRows,
        block: int,
        arrays: tuple[ir.Value, tuple[ir.Value, ir.Value], tuple[ir.Value, ir.Value]],
        span: tuple[ir.Value, ir.Value],
    ) -> None:
        b = emit.builder
        self.emit, self.reader, self.block = emit, reader, block
        self.rows, (self.indices, indexed), (self.log_weights, weighted) = arrays
        self.first, self.stop = span
        self.any_row = b.icmp_signed("==", indexed, number(0))
        self.weighted = b.icmp_signed(">", weighted, number(0))
        # offsets of the parts of rows of this tile and the next
        self.places = [emit.local(INT64, 2 * TILE) for _ in range(1 + reader.grouped)]
        self._own_biases = emit.local(FLOAT, TILE)  # log-weights
        left = b.sub(self.stop, self.first)
        few = b.icmp_signed("<", left, number(TILE))
        self.count = b.select(few, left, number(TILE))

    def find(self) -> None:
        """The places of the rows of this tile and the next, and the log-weights of this tile.

        The last row, with log-weight -inf, fills the places after it.
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
        self.biases = b.select(whole, there, self._own_biases)

    def _find_many(self) -> None:
        """The case of two whole tiles, LANES rows at a time."""
        emit, b = self.emit, self.emit.builder
        offsets = ir.VectorType(INT64, LANES)
        in_order = ir.Constant(offsets, list(range(LANES)))
        for t in range(0, 2 * TILE, LANES):
            first = b.add(self.first, number(t))
            rows = emit.choose(
                self.any_row,
                partial(lambda first: b.add(emit.splat_whole(first), in_order), first),
                partial(self._indices, first, INTS, offsets),
            )
            for part, places in zip(self.places, self.reader.offsets(rows), strict=True):
                emit.store(places, emit.at(part, 8 * t))
        for t in range(0, TILE, LANES):
            emit.store(floats(0.0), emit.at(self._own_biases, 4 * t))

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
            for part, place in zip(self.places, self.reader.offsets(row), strict=True):
                emit.store(place, emit.at(part, emit.times(t, 8)))
        with emit.loop(number(TILE)) as t:
            inside = b.icmp_signed("<", t, self.count)
            offset = emit.times(b.add(self.first, t), 4)
            bias = emit.choose(
                b.and_(inside, self.weighted),
                lambda: emit.load(emit.at(self.log_weights, offset), FLOAT),
                lambda: b.select(inside, FLOAT(0.0), FLOAT(float("-inf"))),
            )
            emit.store(bias, emit.at(self._own_biases, emit.times(t, 4)))

    def _indices(self, position: ir.Value, kind: ir.Type, wide: ir.Type) -> ir.Value:
        """One index or several from ``position`` on."""
        place = self.emit.at(self.indices, self.emit.times(position, 4))
        return self.emit.builder.sext(self.emit.load(place, kind), wide)

    def prefetch_keys(self, block: ir.Value, chunk: ir.Value) -> None:
        """Prefetch some lines of the keys of the next tile at the places of this block.

        All rows get their turn while the chunks of a line pass: a core waits for few lines at a
        time, and all at once would come in bursts with gaps between.
        """
        emit, b = self.emit, self.emit.builder
        chunks = max(1, LINE_BYTES // self.reader.lane_bytes)  # of a line
        turn = b.urem(chunk, number(chunks))
        offset = emit.times(chunk, self.reader.lane_bytes)
        for r in range(max(1, self.block // chunks)):
            row = b.urem(
                b.add(emit.times(turn, max(1, self.block // chunks)), number(r)),
                number(self.block),
            )
            place = emit.at(
                self.places[-1], emit.times(block, 8 * self.block), 8 * TILE, emit.times(row, 8)
            )
            emit.prefetch(emit.at(self.rows, emit.load(place, INT64), offset))

    def prefetch_values(
        self, reader: Rows, block: ir.Value, r: int, d: ir.Value, vectors: int
    ) -> None:
        """Prefetch the rows of the next tile at the place of ``vectors`` from ``d`` on."""
        emit = self.emit
        offset = emit.times(d, reader.items.num_bytes)
        place = emit.at(self.value(block, TILE + r), offset)
        for line in range(0, vectors * reader.lane_bytes, LINE_BYTES):
            emit.prefetch(emit.at(place, line))

    def prefetch_packed(self, block: ir.Value) -> None:
        """Prefetch all lines of the rows in the next tile at the places of this block."""
        emit, b = self.emit, self.emit.builder
        for r in range(self.block):
            parts = self.parts(block, TILE + r)
            emit.prefetch_lines(parts[-1], self.reader.row_bytes)
            emit.prefetch(emit.at(parts[-1], b.sub(self.reader.row_bytes, number(1))))
            if isinstance(self.reader, PackedRows) and self.reader.grouped:
                before = self.parts(block, TILE + r - 1)[0]
                with emit.when(b.icmp_unsigned("!=", parts[0], before)):
                    emit.prefetch_lines(parts[0], self.reader.group_bytes)

    def parts(self, block: ir.Value, r: int) -> list[ir.Value]:
        """Addresses of the parts of a row."""
        emit = self.emit
        places = [emit.at(part, emit.times(block, 8 * self.block), 8 * r) for part in self.places]
        return [emit.at(self.rows, emit.load(place, INT64)) for place in places]

    def value(self, block: ir.Value, r: int) -> ir.Value:
        """Address of the value of a row."""
        place = self.emit.at(self.places[-1], self.emit.times(block, 8 * self.block), 8 * r)
        return self.emit.at(self.rows, self.emit.load(place, INT64), self.reader.half_bytes)

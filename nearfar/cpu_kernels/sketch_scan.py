"""The inner loop of scoring: one block of codes for up to four query heads, in registers.

Bits and planes of `sketch_codes` are numbers here, not cases: the shifts are computed.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from nearfar.cpu_kernels.byte_dots import BYTE_DOTS, NARROW_LEVELS
from nearfar.cpu_kernels.compile import emitted
from nearfar.cpu_kernels.vectors import (
    FLOAT,
    FLOATS,
    INT32,
    INTS,
    LANES,
    LINE_BYTES,
    Emitter,
    ints,
    number,
)

BLOCK_KEYS = 64
VECTORS = 4 if LANES == 16 else 2  # of keys that are kept in registers
_ROW_BYTES = 4 * BLOCK_KEYS  # of the same word of a block's keys


class _Block:
    """Emits the scoring of one block for ``heads`` queries."""

    def __init__(self, emit: Emitter, heads: int, kinds: Any, values: Any) -> None:
        self.emit = emit
        self.heads = heads
        words, block, factors, queries, scales, shifts, head, bits, high, scores, at = (
            emit.array(kind, value) if isinstance(kind, types.Array) else value
            for kind, value in zip(kinds, values, strict=True)
        )
        b = emit.builder
        self.W, padded = words[1][1], queries[1][1]
        self.words = emit.at(words[0], emit.times(emit.times(block, self.W), _ROW_BYTES))
        self.factors = emit.at(factors[0], emit.times(block, _ROW_BYTES))
        self.queries = [
            emit.at(queries[0], emit.times(b.add(head, number(h)), padded)) for h in range(heads)
        ]
        self.scales, self.shifts = (
            [
                emit.splat(emit.load(emit.at(x[0], emit.times(b.add(head, number(h)), 4)), FLOAT))
                for h in range(heads)
            ]
            for x in (scales, shifts)
        )
        stride = emit.times(scores[1][1], 4)
        self.scores = [
            emit.at(scores[0], emit.times(b.add(head, number(h)), stride), emit.times(at, 4))
            for h in range(heads)
        ]
        self.bits, self.high = bits, high

    def score(self) -> None:
        """All keys of the block, a few vectors of them at a time."""
        emit, b = self.emit, self.emit.builder
        two_planes = b.icmp_signed(">", self.high, number(0))
        low_bits = b.select(two_planes, number(2), self.bits)
        with emit.loop(number(BLOCK_KEYS // LANES), step=VECTORS) as vector:
            offset = emit.times(vector, 4 * LANES)
            sums = [[emit.local(INTS) for _ in range(VECTORS)] for _ in range(self.heads)]
            every = [each for of_head in sums for each in of_head]
            for each in every:
                emit.store(ints(0), each)
            self._add_plane(sums, offset, number(0), self.high, number(1))
            with emit.when(two_planes):
                for each in every:
                    emit.store(b.shl(emit.load(each, INTS), ints(2)), each)
            self._add_plane(sums, offset, self.high, self.W, low_bits)
            for v in range(VECTORS):
                factor = emit.load(emit.at(self.factors, offset, 4 * LANES * v), FLOATS)
                for h in range(self.heads):
                    total = b.sitofp(emit.load(sums[h][v], INTS), FLOATS)
                    score = b.fsub(b.fmul(total, self.scales[h]), self.shifts[h])
                    place = emit.at(self.scores[h], offset, 4 * LANES * v)
                    emit.store(b.fmul(score, factor), place)

    def _add_plane(
        self,
        sums: list[list[ir.Value]],
        offset: ir.Value,
        first: ir.Value,
        stop: ir.Value,
        bits: ir.Value,
    ) -> None:
        """Add the products of the words ``first`` to ``stop``, whose fields have ``bits``."""
        emit, b = self.emit, self.emit.builder
        highest = b.sub(b.shl(number(1), bits), number(1))
        # the same field in each byte
        mask = emit.splat_int(b.trunc(b.mul(highest, number(0x01010101)), INT32))
        shift = emit.splat_int(b.trunc(bits, INT32))
        steps = b.udiv(number(8), bits)
        if BYTE_DOTS.widen is None:
            self._add_words(sums, offset, first, (first, stop), (steps, mask, shift))
            return
        words = b.udiv(b.udiv(number(NARROW_LEVELS), highest), steps)  # at a time: 4 of 4 bits
        spans = b.sdiv(b.add(b.sub(stop, first), b.sub(words, number(1))), words)
        narrow = [[emit.local(INTS) for _ in of_head] for of_head in sums]
        with emit.loop(spans) as span:
            start = b.add(first, emit.times(span, words))
            end = b.add(start, words)
            end = b.select(b.icmp_signed("<", end, stop), end, stop)
            for each in (each for of_head in narrow for each in of_head):
                emit.store(ints(0), each)
            self._add_words(narrow, offset, first, (start, end), (steps, mask, shift))
            for wide, own in zip(sums, narrow, strict=True):
                for total, part in zip(wide, own, strict=True):
                    both = emit.load(total, INTS), emit.load(part, INTS)
                    emit.store(BYTE_DOTS.widen(emit, *both), total)

    def _add_words(
        self,
        sums: list[list[ir.Value]],
        offset: ir.Value,
        first: ir.Value,
        span: tuple[ir.Value, ir.Value],
        fields: tuple[ir.Value, ir.Value, ir.Value],
    ) -> None:
        """Add the words of a ``span`` of the plane that begins at ``first``, as BYTE_DOTS does."""
        emit, b = self.emit, self.emit.builder
        steps, mask, shift = fields
        with emit.loop(b.sub(span[1], span[0])) as index:
            place = b.add(span[0], index)
            word = b.sub(place, first)
            row = emit.at(self.words, emit.times(place, _ROW_BYTES), offset)
            codes = [emit.local(INTS) for _ in range(VECTORS)]
            for v, code in enumerate(codes):
                emit.store(emit.load(emit.at(row, 4 * LANES * v), INTS), code)
            for line in range(0, 4 * LANES * VECTORS, LINE_BYTES):
                ahead = emit.at(row, emit.times(self.W, _ROW_BYTES), line)  # of the next block
                emit.prefetch(ahead)
            with emit.loop(steps) as step:
                dims = emit.times(b.add(emit.times(word, steps), step), 4)
                bytes_ = []
                for code in codes:
                    left = emit.load(code, INTS)
                    bytes_.append(b.and_(left, mask))
                    emit.store(b.lshr(left, shift), code)
                for h in range(self.heads):
                    query = emit.splat_int(emit.load(emit.at(self.queries[h], dims), INT32))
                    for v in range(VECTORS):
                        old = emit.load(sums[h][v], INTS)
                        emit.store(BYTE_DOTS.add(emit, old, bytes_[v], query), sums[h][v])


@intrinsic
def _score_block(typing_context, heads, where):
    if not isinstance(heads, types.IntegerLiteral):
        return None

    def generate(context, builder, signature, arguments):
        values = cgutils.unpack_tuple(builder, arguments[1], len(where))
        emit = Emitter(context, builder)
        _Block(emit, heads.literal_value, signature.args[1], values).score()
        return context.get_dummy_value()

    return types.void(heads, where), generate


@emitted
def score_block(
    words,  # [blocks, W, BLOCK_KEYS] uint32, see `sketch_codes`
    block,
    factors,  # [blocks * BLOCK_KEYS] float32
    queries,  # [G, D padded] int8
    scales,  # [G] float32
    shifts,  # [G] float32: what the middle of the levels adds to a score
    head,  # the heads are head to min(head + 4, G)
    bits,
    high,  # words of the high plane
    scores,  # [G, N] float32, written from column `at` on
    at,
):
    """Scores (levels . query - shift) factor of the keys of one block."""
    left = queries.shape[0] - head
    where = (words, block, factors, queries, scales, shifts, head, bits, high, scores, at)
    if left >= 4:
        _score_block(4, where)
    elif left == 3:
        _score_block(3, where)
    elif left == 2:
        _score_block(2, where)
    else:
        _score_block(1, where)

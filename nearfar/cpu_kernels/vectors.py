"""Vector instructions that Numba does not offer, emitted as LLVM IR.

LLVM maps vectors of LANES numbers to the machine's registers: one of AVX-512, one of AVX2, two of
NEON. Loops that must keep many of them in registers (several rows times several query heads) are
written here as IR, because Numba's own loops would load and store them again. Knows nothing of
attention. Offsets are int64 and count bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from nearfar.cpu_kernels.compile import cpu_features

LANES = 16 if "avx512f" in cpu_features() else 8
LINE_BYTES = 64

FLOAT, INT8, INT16 = ir.FloatType(), ir.IntType(8), ir.IntType(16)
INT32, INT64 = ir.IntType(32), ir.IntType(64)
FLOATS, INTS = ir.VectorType(FLOAT, LANES), ir.VectorType(INT32, LANES)
BYTES = INT8.as_pointer()

# exp(x) = 2^n exp(r): polynomial of exp(r) - 1 - r over r^2, highest power first (Cephes)
_EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 0.5)
_LOG2E, _LN2_HIGH, _LN2_LOW = 1.4426950408889634, 0.693359375, -2.12194440e-4
_ROUND = 1.5 * 2.0**23  # adding it leaves a float32 no bits behind the point
EXP_LOWEST = -87.0  # below it a float32 weight is nothing beside 1


def floats(value: float) -> ir.Constant:
    """LANES times the same number."""
    return ir.Constant(FLOATS, [value] * LANES)


def ints(value: int) -> ir.Constant:
    """LANES times the same int32."""
    return ir.Constant(INTS, [value] * LANES)


def number(value: int) -> ir.Constant:
    """An int64."""
    return ir.Constant(INT64, value)


class Emitter:
    """Emits IR where its builder stands."""

    def __init__(self, context: Any, builder: ir.IRBuilder) -> None:
        self.context = context
        self.builder = builder

    # ---- addresses and memory

    def array(self, kind: types.Array, value: ir.Value) -> tuple[ir.Value, list[ir.Value]]:
        """First byte and shape of a C-contiguous array."""
        struct = cgutils.create_struct_proxy(kind)(self.context, self.builder, value)
        shape = cgutils.unpack_tuple(self.builder, struct.shape, kind.ndim)
        return self.builder.bitcast(struct.data, BYTES), shape

    def local(self, kind: ir.Type, count: int = 1) -> ir.Value:
        """Room on the stack for ``count`` of ``kind``; LLVM keeps single ones in registers."""
        room = cgutils.alloca_once(self.builder, ir.ArrayType(kind, count))
        return self.builder.bitcast(room, BYTES)

    def at(self, base: ir.Value, *offsets: ir.Value | int) -> ir.Value:
        """``base`` moved on by bytes."""
        for offset in offsets:
            step = number(offset) if isinstance(offset, int) else offset
            base = self.builder.gep(base, [step])
        return base

    def times(self, value: ir.Value, factor: ir.Value | int) -> ir.Value:
        """Product of two int64."""
        return self.builder.mul(value, number(factor) if isinstance(factor, int) else factor)

    def load(self, place: ir.Value, kind: ir.Type) -> ir.Value:
        """The value at ``place``, of any alignment."""
        return self.builder.load(self.builder.bitcast(place, kind.as_pointer()), align=1)

    def store(self, value: ir.Value, place: ir.Value) -> None:
        """Write ``value`` to ``place``, of any alignment."""
        pointer = self.builder.bitcast(place, value.type.as_pointer())
        self.builder.store(value, pointer, align=1)

    def load_some(self, place: ir.Value, item: ir.Type, count: ir.Value) -> ir.Value:
        """``count`` < LANES items, then zeros; reads nothing beyond them."""
        size = item.width // 8 if isinstance(item, ir.IntType) else 4
        vector = ir.VectorType(item, LANES)

        def body(emit: Emitter, place: ir.Value, count: ir.Value) -> None:
            room = emit.local(vector)
            emit.store(ir.Constant(vector, [item(0)] * LANES), room)
            emit._copy(place, room, item, size, count)
            emit.builder.ret(emit.load(room, vector))

        return self._apart(f"nearfar_load_some_{item}", vector, body, place, count)

    def store_some(self, value: ir.Value, place: ir.Value, count: ir.Value) -> None:
        """Write the first ``count`` of LANES float32."""

        def body(emit: Emitter, value: ir.Value, place: ir.Value, count: ir.Value) -> None:
            room = emit.local(FLOATS)
            emit.store(value, room)
            emit._copy(room, place, FLOAT, 4, count)
            emit.builder.ret_void()

        self._apart("nearfar_store_some", ir.VoidType(), body, value, place, count)

    def _copy(
        self, source: ir.Value, target: ir.Value, item: ir.Type, size: int, count: ir.Value
    ) -> None:
        with self.loop(count) as i:
            offset = self.times(i, size)
            self.store(self.load(self.at(source, offset), item), self.at(target, offset))

    def _apart(self, name: str, result: ir.Type, body: Any, *arguments: ir.Value) -> ir.Value:
        """Call a function with this body that is never inlined: for rare cases."""
        module = self.builder.module
        kind = ir.FunctionType(result, [argument.type for argument in arguments])
        function = cgutils.get_or_insert_function(module, kind, name)
        if not function.blocks:
            function.linkage = "linkonce_odr"
            function.attributes.add("noinline")
            builder = ir.IRBuilder(function.append_basic_block("entry"))
            body(Emitter(self.context, builder), *function.args)
        return self.builder.call(function, arguments)

    def prefetch(self, place: ir.Value) -> None:
        """Prefetch a cache line into the second-level cache.

        The first-level cache is too small for rows that are some microseconds ahead, and a core has
        few places to wait for its lines.
        """
        read, second_level, data = INT32(0), INT32(2), INT32(1)
        self.call("llvm.prefetch.p0", ir.VoidType(), place, read, second_level, data)

    def prefetch_lines(self, place: ir.Value, num_bytes: ir.Value) -> None:
        """Prefetch ``num_bytes`` from ``place`` on."""
        with self.loop(num_bytes, step=LINE_BYTES) as offset:
            self.prefetch(self.at(place, offset))

    # ---- control

    @contextmanager
    def loop(self, stop: ir.Value, step: int = 1) -> Iterator[ir.Value]:
        """The body runs for 0, step, ... below ``stop``."""
        bounds = (number(0), stop, number(step), INT64)
        with cgutils.for_range_slice(self.builder, *bounds) as (index, _):
            yield index

    def when(self, condition: ir.Value) -> Any:
        """The body runs if ``condition``."""
        return self.builder.if_then(condition)

    def choose(
        self, condition: ir.Value, yes: Callable[[], ir.Value], no: Callable[[], ir.Value]
    ) -> ir.Value:
        """The value of ``yes`` or of ``no``, of which only one runs."""
        with self.builder.if_else(condition) as (then, otherwise):
            with then:
                first = yes()
                first_block = self.builder.block
            with otherwise:
                second = no()
                second_block = self.builder.block
        value = self.builder.phi(first.type)
        value.add_incoming(first, first_block)
        value.add_incoming(second, second_block)
        return value

    def call(self, name: str, result: ir.Type, *arguments: ir.Value) -> ir.Value:
        """One of LLVM's own functions."""
        kind = ir.FunctionType(result, [argument.type for argument in arguments])
        function = cgutils.get_or_insert_function(self.builder.module, kind, name)
        return self.builder.call(function, arguments)

    # ---- arithmetic on LANES float32

    def fma(self, x: ir.Value, y: ir.Value, z: ir.Value) -> ir.Value:
        """X times y plus z, in one instruction where there is one."""
        return self.call(f"llvm.fmuladd.v{LANES}f32", FLOATS, x, y, z)

    def maximum(self, x: ir.Value, y: ir.Value) -> ir.Value:
        """The larger of each pair."""
        return self.builder.select(self.builder.fcmp_ordered(">", x, y), x, y)

    def add_to(self, accumulator: ir.Value, x: ir.Value, y: ir.Value) -> None:
        """Add x times y to a vector of `local`."""
        self.store(self.fma(x, y, self.load(accumulator, FLOATS)), accumulator)

    def exp(self, x: ir.Value) -> ir.Value:
        """Exponential of x <= 0, relative error below 3e-7; exactly 0 below EXP_LOWEST."""
        b = self.builder
        shifted = self.fma(self.maximum(x, floats(EXP_LOWEST)), floats(_LOG2E), floats(_ROUND))
        n = b.fsub(shifted, floats(_ROUND))
        r = self.fma(n, floats(-_LN2_HIGH), self.maximum(x, floats(EXP_LOWEST)))
        r = self.fma(n, floats(-_LN2_LOW), r)
        p = floats(_EXP[0])
        for coefficient in _EXP[1:]:
            p = self.fma(p, r, floats(coefficient))
        p = self.fma(b.fmul(p, r), r, b.fadd(r, floats(1.0)))
        # the low bits of `shifted` are n: shifted into the exponent they are a factor 2^n
        power = b.add(b.shl(b.bitcast(shifted, INTS), ints(23)), ints(127 << 23))
        inside = b.fcmp_ordered(">", x, floats(EXP_LOWEST))
        return b.select(inside, b.fmul(p, b.bitcast(power, FLOATS)), floats(0.0))

    # ---- lanes

    def shuffle(self, x: ir.Value, y: ir.Value, lanes: Sequence[int]) -> ir.Value:
        """Lanes of ``x`` and, counted on, of ``y``."""
        return self.builder.shuffle_vector(
            x, y, ir.Constant(ir.VectorType(INT32, len(lanes)), list(lanes))
        )

    def spread(self, scalars: Sequence[ir.Value], lanes: Sequence[int]) -> ir.Value:
        """A vector of float32 whose lane i is ``scalars[lanes[i]]``."""
        vector = ir.Constant(ir.VectorType(FLOAT, len(scalars)), ir.Undefined)
        for i, scalar in enumerate(scalars):
            vector = self.builder.insert_element(vector, scalar, INT32(i))
        return self.shuffle(vector, vector, lanes)

    def splat(self, scalar: ir.Value) -> ir.Value:
        """LANES times the same float32."""
        return self.spread([scalar], [0] * LANES)

    def splat_int(self, scalar: ir.Value) -> ir.Value:
        """LANES times the same int32."""
        vector = self.builder.insert_element(ir.Constant(INTS, ir.Undefined), scalar, INT32(0))
        return self.shuffle(vector, vector, [0] * LANES)

    def splat_whole(self, scalar: ir.Value) -> ir.Value:
        """LANES times the same int64."""
        room = ir.Constant(ir.VectorType(INT64, LANES), ir.Undefined)
        vector = self.builder.insert_element(room, scalar, INT32(0))
        return self.shuffle(vector, vector, [0] * LANES)

    def like(self, other: ir.Value, scalar: ir.Value) -> ir.Value:
        """An int64, as often as ``other`` has lanes."""
        return self.splat_whole(scalar) if isinstance(other.type, ir.VectorType) else scalar

    def lane(self, vector: ir.Value, lane: int) -> ir.Value:
        """One number of a vector."""
        return self.builder.extract_element(vector, INT32(lane))

    def sums(self, vectors: Sequence[ir.Value]) -> ir.Value:
        """Lane i is the sum of all lanes of ``vectors[i]``, of which there are LANES.

        Each round adds halves of two vectors side by side, so that LANES sums take LANES - 1
        additions, not LANES log LANES.
        """
        each = list(vectors)
        groups = 1  # of lanes, one for each of the vectors that went into one
        while len(each) > 1:
            half = LANES // (2 * groups)
            low = [g * 2 * half + i for g in range(groups) for i in range(half)]
            low += [LANES + i for i in low]
            high = [i + half for i in low]
            each = [
                self.builder.fadd(self.shuffle(x, y, low), self.shuffle(x, y, high))
                for x, y in zip(each[::2], each[1::2], strict=True)
            ]
            groups *= 2
        return each[0]

    def over_groups(self, vector: ir.Value, size: int, combine: Any) -> ir.Value:
        """Combine each ``size`` neighbouring lanes (a power of 2) and give all of them the result.

        ``combine`` takes two vectors.
        """
        distance = 1
        while distance < size:
            other = self.shuffle(vector, vector, [i ^ distance for i in range(LANES)])
            vector = combine(vector, other)
            distance *= 2
        return vector

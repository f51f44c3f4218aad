"""A hint to the memory system: the rows that will be read next.

Rows chosen by an index lie anywhere, so no hardware prefetcher can guess them; without the hint a
thread waits for memory row by row.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LINE_BYTES = 64


@intrinsic
def prefetch_row(typing_context, rows, row):  # noqa: ARG001  Numba's calling convention
    """Ask for all cache lines of ``rows[row]``, a row of a C-contiguous 2-D array."""
    if not (isinstance(rows, types.Array) and rows.ndim == 2 and isinstance(row, types.Integer)):
        return None

    def generate(context, builder, signature, arguments):
        array = cgutils.create_struct_proxy(signature.args[0])(context, builder, arguments[0])
        index = context.cast(builder, arguments[1], signature.args[1], types.intp)
        stride = cgutils.unpack_tuple(builder, array.strides, 2)[0]
        byte = ir.IntType(8)
        base = builder.bitcast(array.data, byte.as_pointer())
        start = builder.gep(base, [builder.mul(index, stride)])
        flag = ir.IntType(32)
        hint = builder.module.declare_intrinsic(
            "llvm.prefetch",
            [byte.as_pointer()],
            ir.FunctionType(ir.VoidType(), [byte.as_pointer(), flag, flag, flag]),
        )
        # read, keep in all levels, data cache
        options = [ir.Constant(flag, 0), ir.Constant(flag, 3), ir.Constant(flag, 1)]
        with cgutils.for_range_slice(
            builder,
            ir.Constant(stride.type, 0),
            stride,
            ir.Constant(stride.type, LINE_BYTES),
            stride.type,
        ) as (offset, _):
            builder.call(hint, [builder.gep(start, [offset]), *options])
        return context.get_dummy_value()

    return types.void(rows, row), generate

"""Hints to the memory system about later reads.

Rows chosen by an index are scattered, so no hardware prefetcher can guess them; without the hint a
thread waits for each row.
"""

from __future__ import annotations

from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from nearfar.cpu_kernels.compile import emitted
from nearfar.cpu_kernels.vectors import BYTES, Emitter


@intrinsic
def _prefetch(typing_context, array, index):
    """All cache lines of ``array[index]``, a row or an item of a C-contiguous array."""
    if not isinstance(array, types.Array):
        return None

    def generate(context, builder, signature, arguments):
        emit = Emitter(context, builder)
        struct = cgutils.create_struct_proxy(signature.args[0])(context, builder, arguments[0])
        stride = cgutils.unpack_tuple(builder, struct.strides, array.ndim)[0]
        start = emit.at(builder.bitcast(struct.data, BYTES), emit.times(arguments[1], stride))
        emit.prefetch_lines(start, stride)
        return context.get_dummy_value()

    return types.void(array, types.int64), generate


@emitted
def prefetch(array, index):
    """Prefetch ``array[index]``, a row of a C-contiguous 2-D array or an item of a 1-D one."""
    _prefetch(array, index)

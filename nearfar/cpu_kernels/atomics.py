"""Words that several threads, or a GPU, read and write at the same time.

`store_release` publishes a flag after its data, `load_acquire` reads a flag before its data, and
`fetch_add` counts arrivals. All work on one element of a C-contiguous one-dimensional int64 or
int32 array, which may be in memory that a GPU writes to. `relax` marks a waiting loop for the
processor, `nap` gives the core to others.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from nearfar.cpu_kernels.compile import serial

_usleep = types.ExternalFunction("usleep", types.int32(types.uint32))


def _element(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    """Pointer to ``array[index]``."""
    array = cgutils.create_struct_proxy(signature.args[0])(context, builder, arguments[0])
    index = context.cast(builder, arguments[1], signature.args[1], types.intp)
    return builder.gep(array.data, [index])


@intrinsic
def _load(typing_context, array, index):
    def generate(context, builder, signature, arguments):
        pointer = _element(context, builder, signature, arguments)
        return builder.load_atomic(pointer, "acquire", signature.args[0].dtype.bitwidth // 8)

    return array.dtype(array, index), generate


@intrinsic
def _store(typing_context, array, index, value):
    def generate(context, builder, signature, arguments):
        pointer = _element(context, builder, signature, arguments)
        new = context.cast(builder, arguments[2], signature.args[2], signature.args[0].dtype)
        builder.store_atomic(new, pointer, "release", signature.args[0].dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(array, index, value), generate


@intrinsic
def _add(typing_context, array, index, value):
    def generate(context, builder, signature, arguments):
        pointer = _element(context, builder, signature, arguments)
        addend = context.cast(builder, arguments[2], signature.args[2], signature.args[0].dtype)
        return builder.atomic_rmw("add", pointer, addend, "acq_rel")

    return array.dtype(array, index, value), generate


@intrinsic
def _pause(typing_context):
    def generate(context, builder, signature, arguments):
        if builder.module.triple.startswith(("x86_64", "i686")):  # elsewhere a loop just turns
            void = ir.FunctionType(ir.VoidType(), [])
            builder.call(builder.module.declare_intrinsic("llvm.x86.sse2.pause", (), void), [])
        return context.get_dummy_value()

    return types.void(), generate


@serial
def load_acquire(array, index):
    """``array[index]``; everything written before its store can be read after this load."""
    return _load(array, index)


@serial
def store_release(array, index, value):
    """Set ``array[index]`` after everything that this thread wrote before."""
    _store(array, index, value)


@serial
def fetch_add(array, index, value):
    """Add ``value`` to ``array[index]``; its value before."""
    return _add(array, index, value)


@serial
def relax():
    """One turn of a loop that waits."""
    _pause()


@serial
def nap(microseconds):
    """Sleep, so that another thread may have the core."""
    _usleep(microseconds)

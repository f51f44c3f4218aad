"""Walking through the bits that are set in a word."""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from nearfar.cpu_kernels.compile import emitted


@intrinsic
def _lowest_bit(typing_context, word):
    def generate(context, builder, signature, arguments):
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 1))

    return types.int64(types.uint64), generate


@emitted
def lowest_bit(word):
    """Position of the lowest bit that is set in ``word``, which is not 0."""
    return _lowest_bit(np.uint64(word))

"""Storage types of a row as the kernels see them: unsigned integers and a code.

Numba has no bfloat16 and no float16 on CPUs, so rows travel as their bit patterns (uint16 or
uint32) and are widened to float32 in registers. Widening bfloat16 is a shift. Widening float16 is a
shift and a multiplication that moves the exponent's bias; it is exact for every finite number,
subnormal ones included, and infinities do not occur because stores saturate.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nearfar.cpu_kernels.compile import inlined

FLOAT32, BFLOAT16, FLOAT16 = 0, 1, 2

_CODES = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16, torch.float16: FLOAT16}
_HALF_BIAS = np.float32(2.0**112)


def row_bits(rows: torch.Tensor) -> tuple[NDArray[np.unsignedinteger[Any]], int]:
    """The bit patterns of ``rows`` (CPU, contiguous; not copied) and the code of their type."""
    integers = torch.int32 if rows.dtype == torch.float32 else torch.int16
    bits: NDArray[Any] = rows.view(integers).numpy()
    return bits.view(f"u{bits.itemsize}"), _CODES[rows.dtype]


@inlined
def widen(row, storage, bits, values):
    """Write ``row`` [D], uint16 or uint32, as float32 into ``values``, which views ``bits``."""
    D = row.shape[0]
    if storage == BFLOAT16:
        for d in range(D):
            bits[d] = np.uint32(row[d]) << np.uint32(16)
    elif storage == FLOAT32:
        for d in range(D):
            bits[d] = row[d]
    else:
        for d in range(D):
            bits[d] = (np.uint32(row[d]) & np.uint32(0x7FFF)) << np.uint32(13)
        for d in range(D):
            values[d] *= _HALF_BIAS
        for d in range(D):
            bits[d] |= (np.uint32(row[d]) & np.uint32(0x8000)) << np.uint32(16)

"""Hash codes from the signs of projections.

Knows nothing about the projections. Codes are unsigned 16-bit integers, one per hash table and
vector, stored table by table because tables are built and probed in this order.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from nearfar.cpu_kernels.compile import kernel

Array = NDArray[Any]


@kernel
def pack_codes(
    scores: Array,  # [tables * bits, n] float32: projections of n vectors
    bits: int,
    codes: Array,  # [tables, capacity] uint16, written from column `first` on
    first: int,
) -> None:
    """Bit b of ``codes[t, first + i]`` is set if ``scores[t * bits + b, i]`` is above 0."""
    n = scores.shape[1]
    for t in numba.prange(codes.shape[0]):
        packed = codes[t, first : first + n]
        packed[:] = 0
        for b in range(bits):
            score = scores[t * bits + b]
            for i in range(n):
                if score[i] > 0:
                    packed[i] |= np.uint16(1 << b)

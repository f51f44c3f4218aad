"""A function of the angle between queries and the selected keys, read from a table.

Keys are centred on the way. Rows are scattered: each is prefetched well before it is read.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from nearfar.cpu_kernels.compile import kernel
from nearfar.cpu_kernels.items import prefetch_row, read_key

Array = NDArray[Any]
AHEAD = 8  # keys that are on their way while one is read


@kernel
def interpolate_by_angle(
    rows: Array,  # [Hkv, capacity, 2 D] as `items.row_array` gives them
    centre: Array,  # [Hkv, D] float32, subtracted from keys
    directions: Array,  # [Hq, D] float32: unit vectors, or 0
    indices: Array,  # [M] int32
    offsets: Array,  # [Hq + 1] int64: head r has indices[offsets[r]:offsets[r + 1]]
    table: Array,  # [points] float32 at angles from 0 to pi, evenly spaced
    values: Array,  # [M] float32, written
) -> None:
    """Write the table's value, linearly interpolated, at the angle of each key with its query.

    A zero vector is at a right angle to every vector but another zero vector, as for hashes.
    """
    Hq, D = directions.shape
    group = Hq // rows.shape[0]
    intervals = table.shape[0] - 1
    for row in numba.prange(Hq):
        h = row // group
        direction = directions[row]
        middle = centre[h]
        key = np.empty(D, np.float32)
        query_square = np.float32(0.0)
        for d in range(D):
            query_square += direction[d] * direction[d]
        stop = offsets[row + 1]
        for j in range(offsets[row], stop):
            if j + AHEAD < stop:
                prefetch_row(rows[h], np.int64(indices[j + AHEAD]), key)
            read_key(rows[h], np.int64(indices[j]), key)
            dot = np.float32(0.0)
            square = np.float32(0.0)
            for d in range(D):
                centred = key[d] - middle[d]
                dot += direction[d] * centred
                square += centred * centred
            if square > 0:
                cosine = dot / np.sqrt(square)
            else:
                cosine = np.float32(1.0) if query_square == 0 else np.float32(0.0)
            # rounding may carry a cosine past 1
            cosine = min(max(cosine, np.float32(-1.0)), np.float32(1.0))
            place = np.arccos(cosine) * np.float32(intervals / np.pi)
            below = min(np.int64(place), intervals - 1)
            share = place - np.float32(below)
            values[j] = table[below] + share * (table[below + 1] - table[below])

"""Hash tables in compressed rows: merging codes into them and counting collisions with a query.

A table holds the ids 0 to n - 1 of n <= 65,535 keys, ordered by code: bucket c is
``ids[starts[c]:starts[c + 1]]``. Keys that are not in a table yet are a plain array of codes. What
a collision is worth is not known here.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from nearfar.cpu_kernels.compile import kernel

Array = NDArray[Any]


@kernel
def merge_buckets(
    ids: Array,  # [Hkv, tables, n] uint16
    starts: Array,  # [Hkv, tables, buckets + 1] uint16
    codes: Array,  # [Hkv, tables, capacity] uint16: the first `count` are of keys n, n + 1, ...
    count: int,
    out_ids: Array,  # [Hkv, tables, n + count] uint16, written
    out_starts: Array,  # [Hkv, tables, buckets + 1] uint16, written
) -> None:
    """Tables of the old keys and the new ones; within a bucket ids ascend. A counting sort."""
    Hkv, tables, n = ids.shape
    buckets = starts.shape[2] - 1
    for task in numba.prange(Hkv * tables):
        h = task // tables
        t = task % tables
        cursor = np.zeros(buckets, np.int32)
        for i in range(count):
            cursor[codes[h, t, i]] += 1
        end = 0
        for c in range(buckets):
            out_starts[h, t, c] = end
            for j in range(starts[h, t, c], starts[h, t, c + 1]):
                out_ids[h, t, end] = ids[h, t, j]
                end += 1
            added = cursor[c]
            cursor[c] = end
            end += added
        out_starts[h, t, buckets] = end
        for i in range(count):
            c = codes[h, t, i]
            out_ids[h, t, cursor[c]] = n + i
            cursor[c] += 1


@kernel
def collect_from_buckets(
    ids: Array,  # [Hkv, tables, n] uint16
    starts: Array,  # [Hkv, tables, buckets + 1] uint16
    first: int,  # key 0 of these tables is key `first` of the layer
    query_codes: Array,  # [tables, Hq] uint16
    threshold: int,  # collisions that make a candidate, at least 1
    counts: Array,  # [Hq, >= n], scratch, of a type that holds the number of tables
    found: Array,  # [Hq, room] int32, appended to while there is room
    lengths: Array,  # [Hq] int64: candidates so far, counted on where there is no room for them
) -> None:
    """Append to ``found`` the keys that share a bucket with the query in enough tables."""
    Hkv, tables, n = ids.shape
    Hq, room = found.shape
    for row in numba.prange(Hq):
        h = row // (Hq // Hkv)
        seen = counts[row]
        seen[:n] = 0
        length = lengths[row]
        for t in range(tables):
            code = np.int64(query_codes[t, row])
            for j in range(starts[h, t, code], starts[h, t, code + 1]):
                i = np.int64(ids[h, t, j])
                seen[i] += 1
                if seen[i] == threshold:
                    if length < room:
                        found[row, length] = first + i
                    length += 1
        lengths[row] = length


@kernel
def collect_from_codes(
    codes: Array,  # [Hkv, tables, capacity] uint16
    count: int,  # keys that the codes are of
    first: int,  # key 0 of these codes is key `first` of the layer
    query_codes: Array,  # [tables, Hq] uint16
    threshold: int,
    counts: Array,  # [Hq, >= count], scratch, of a type that holds the number of tables
    found: Array,  # [Hq, room] int32, appended to while there is room
    lengths: Array,  # [Hq] int64: candidates so far, counted on where there is no room for them
) -> None:
    """What `collect_from_buckets` does, for keys that are in no table: code by code."""
    Hkv, tables, _ = codes.shape
    Hq, room = found.shape
    for row in numba.prange(Hq):
        h = row // (Hq // Hkv)
        seen = counts[row]
        seen[:count] = 0
        for t in range(tables):
            code = query_codes[t, row]
            stored = codes[h, t]
            for i in range(count):
                seen[i] += stored[i] == code
        length = lengths[row]
        for i in range(count):
            if seen[i] >= threshold:
                if length < room:
                    found[row, length] = first + i
                length += 1
        lengths[row] = length


@kernel
def keep_random(found: Array, lengths: Array, limit: int, uniforms: Array) -> None:
    """Leave in each row of ``found`` ``limit`` of its ``lengths[row]`` ids, every set as likely.

    The rows are shuffled in place (Fisher and Yates, as far as needed); rows with at most ``limit``
    ids stay as they are. ``uniforms`` [Hq, >= limit] float64 in [0, 1).
    """
    for row in numba.prange(found.shape[0]):
        length = lengths[row]
        if length > limit:
            for j in range(limit):
                # rounding may carry the product to the end of the row
                pick = min(j + np.int64(uniforms[row, j] * (length - j)), length - 1)
                kept = found[row, pick]
                found[row, pick] = found[row, j]
                found[row, j] = kept

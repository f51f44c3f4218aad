"""Hash tables in compressed rows: merging codes into them and counting collisions with a query.

A table holds the ids 0 to n - 1 of n <= 65,535 keys, ordered by code: bucket c is
``ids[starts[c]:starts[c + 1]]``. Keys that are not in a table yet are a plain array of codes. This
module does not weigh collisions.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from nearfar.cpu_kernels.bits import lowest_bit
from nearfar.cpu_kernels.compile import kernel, serial
from nearfar.cpu_kernels.prefetch import prefetch

Array = NDArray[Any]

FAR_AHEAD, NEAR_AHEAD = 16, 8  # tables whose starts, and whose ids, are asked for ahead


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


@serial
def append_set(words, count, first, found, row, length):
    """Append to ``found[row]`` the positions of the bits set in ``words[:count]``, counted on."""
    room = found.shape[1]
    for w in range(count):
        left = words[w]
        while left != 0:
            if length < room:
                found[row, length] = first + 64 * w + lowest_bit(left)
            length += 1
            left &= left - np.uint64(1)
    return length


@serial
def _mark(bits, ids):
    """Count ``ids`` [n] in ``bits`` [threshold, words]."""
    for j in range(len(ids)):
        i = np.uint64(ids[j])
        word = i >> np.uint64(6)
        bit = np.uint64(1) << (i & np.uint64(63))
        for k in range(len(bits) - 1, 0, -1):
            bits[k, word] |= bits[k - 1, word] & bit
        bits[0, word] |= bit


@serial
def _mark_twice(once, twice, ids):
    """`_mark` for two rows, which takes half the time without the inner loop."""
    for j in range(len(ids)):
        i = np.uint64(ids[j])
        word = i >> np.uint64(6)
        bit = np.uint64(1) << (i & np.uint64(63))
        before = once[word]
        twice[word] |= before & bit
        once[word] = before | bit


@kernel
def collect_from_buckets(
    ids: Array,  # [Hkv, tables, n] uint16
    starts: Array,  # [Hkv, tables, buckets + 1] uint16
    first: int,  # key 0 of these tables is key `first` of the layer
    query_codes: Array,  # [tables, Hq] uint16
    threshold: int,  # collisions that make a candidate, at least 1
    seen: Array,  # [Hq, threshold, >= n / 64] uint64, scratch
    found: Array,  # [Hq, room] int32, appended to while there is room
    lengths: Array,  # [Hq] int64: candidates so far, counted on where there is no room for them
) -> None:
    """Append to ``found`` the keys that share a bucket with the query in enough tables, ascending.

    Bit i of ``seen[row, k]`` is set once key i was found more than k times. Two rows of bits,
    enough for two collisions, fit the first-level cache; counters would not. Buckets are scattered:
    those of later tables are prefetched.
    """
    Hkv, tables, n = ids.shape
    Hq = found.shape[0]
    flat_ids = ids.reshape(-1)
    flat_starts = starts.reshape(-1)
    width = starts.shape[2]
    count = (n + 63) // 64
    for row in numba.prange(Hq):
        h = row // (Hq // Hkv)
        bits = seen[row]
        bits[:, :count] = 0
        for t in range(tables + FAR_AHEAD):
            if t < tables:
                prefetch(flat_starts, (h * tables + t) * width + np.int64(query_codes[t, row]))
            near = t - (FAR_AHEAD - NEAR_AHEAD)
            if 0 <= near < tables:
                place = (h * tables + near) * width + np.int64(query_codes[near, row])
                low, high = np.int64(flat_starts[place]), np.int64(flat_starts[place + 1])
                for j in range(low, high, 32):  # of a cache line
                    prefetch(flat_ids, (h * tables + near) * n + j)
            now = t - FAR_AHEAD
            if now >= 0:
                code = np.int64(query_codes[now, row])
                low, high = np.int64(starts[h, now, code]), np.int64(starts[h, now, code + 1])
                if threshold == 2:
                    _mark_twice(bits[0], bits[1], ids[h, now, low:high])
                else:
                    _mark(bits, ids[h, now, low:high])
        lengths[row] = append_set(bits[threshold - 1], count, first, found, row, lengths[row])


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
    """`collect_from_buckets` for keys that are in no table: code by code."""
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
    """Keep ``limit`` of the ``lengths[row]`` ids of each row of ``found``, all sets equally likely.

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

"""The hash-table kernels in plain NumPy and float64, with the same signatures.

Within a row the order of candidates may differ from a kernel's.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nearfar.storage import decode

Array = NDArray[Any]


def pack_codes(scores: Array, bits: int, codes: Array, first: int) -> None:
    """See `hash_codes.pack_codes`."""
    tables, n = codes.shape[0], scores.shape[1]
    set_bits = scores.reshape(tables, bits, n) > 0
    codes[:, first : first + n] = (set_bits << np.arange(bits)[:, None]).sum(1)


def merge_buckets(
    ids: Array, starts: Array, codes: Array, count: int, out_ids: Array, out_starts: Array
) -> None:
    """See `buckets.merge_buckets`."""
    Hkv, tables, n = ids.shape
    buckets = starts.shape[2] - 1
    for h in range(Hkv):
        for t in range(tables):
            code = np.empty(n + count, np.int64)
            code[ids[h, t]] = np.repeat(np.arange(buckets), np.diff(starts[h, t].astype(int)))
            code[n:] = codes[h, t, :count]
            out_ids[h, t] = np.argsort(code, kind="stable")
            out_starts[h, t] = np.searchsorted(np.sort(code), np.arange(buckets + 1))


def _append(found: Array, lengths: Array, row: int, candidates: Array) -> None:
    room = found.shape[1] - lengths[row]
    if room > 0:
        fits = candidates[:room]
        found[row, lengths[row] : lengths[row] + len(fits)] = fits
    lengths[row] += len(candidates)


def collect_from_buckets(
    ids: Array,
    starts: Array,
    first: int,
    query_codes: Array,
    threshold: int,
    seen: Array,
    found: Array,
    lengths: Array,
) -> None:
    """See `buckets.collect_from_buckets`."""
    Hkv, tables, n = ids.shape
    codes = np.empty((Hkv, tables, n), np.uint16)
    buckets = np.arange(starts.shape[2] - 1)
    for h in range(Hkv):
        for t in range(tables):
            codes[h, t, ids[h, t]] = np.repeat(buckets, np.diff(starts[h, t].astype(int)))
    counts = np.empty((len(found), n), np.int64)
    collect_from_codes(codes, n, first, query_codes, threshold, counts, found, lengths)


def collect_from_codes(
    codes: Array,
    count: int,
    first: int,
    query_codes: Array,
    threshold: int,
    counts: Array,
    found: Array,
    lengths: Array,
) -> None:
    """See `buckets.collect_from_codes`."""
    Hq = found.shape[0]
    for row in range(Hq):
        stored = codes[row // (Hq // codes.shape[0]), :, :count]
        counts[row, :count] = (stored == query_codes[:, row, None]).sum(0)
        _append(found, lengths, row, first + np.flatnonzero(counts[row, :count] >= threshold))


def _keys(rows: Array) -> NDArray[np.float64]:
    """Keys [Hkv, N, D] in float64, decoded by torch."""
    kinds = {"u2": torch.bfloat16, "i2": torch.float16, "f4": torch.float32, "i1": torch.int8}
    kind = kinds[rows.dtype.str[1:]]
    items = torch.from_numpy(rows if kind == torch.float32 else rows.view(f"i{rows.itemsize}"))
    D = rows.shape[2] // 2
    return decode(items.view(kind)[..., :D]).double().numpy()


def interpolate_by_angle(
    rows: Array,
    centre: Array,
    directions: Array,
    indices: Array,
    offsets: Array,
    table: Array,
    values: Array,
) -> None:
    """See `angles.interpolate_by_angle`."""
    Hq = directions.shape[0]
    keys = _keys(rows)
    for row in range(Hq):
        h = row // (Hq // rows.shape[0])
        query = directions[row].astype(np.float64)
        for j in range(offsets[row], offsets[row + 1]):
            key = keys[h, indices[j]] - centre[h].astype(np.float64)
            norms = np.linalg.norm(key) * np.linalg.norm(query)
            both_zero = not key.any() and not query.any()
            cosine = np.clip(query @ key / norms, -1, 1) if norms > 0 else float(both_zero)
            values[j] = np.interp(np.arccos(cosine), np.linspace(0, np.pi, len(table)), table)

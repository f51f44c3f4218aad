"""Attention of a few query heads over many rows in host memory, in one pass.

The keys of all rows of a selection (a row is a KV group or a query head with keys of its own) form
one list, which is cut into equal shares, one or more for each thread; a share may begin in one row
and end in another. A share reads its keys a tile at a time and updates the online softmax (Milakov
and Gimelshein, arXiv 1805.02867); then the shares of each row are merged by their log-sum-exp.
Every row of K and V is read once for all the query heads that share it.

Bounds of the arithmetic: logits and sums in float32, a share's sums over at most SHARE_KEYS keys;
exp by a polynomial with relative error below 3e-7, and 0 below -87, where a weight is negligible
beside 1 in float32.
"""

from __future__ import annotations

import numba
import numpy as np
import torch
from numpy.typing import NDArray

from nearfar.cpu_kernels.attend_tile import attend_tile, head_block
from nearfar.cpu_kernels.compile import kernel, serial
from nearfar.cpu_kernels.items import row_array
from nearfar.cpu_kernels.prefetch import prefetch
from nearfar.cpu_kernels.tile_rows import TILE
from nearfar.records import FarView, Partial, Selection

MIN_SHARE_KEYS = 128  # below this another thread costs more than it saves
SHARE_KEYS = 32_768  # above this rounding errors of float32 sums would show


@serial
def attend_range(
    block,  # tuple from `head_block` of as many heads as q has
    rows,  # [N, 2 D] as `items.row_array` gives them
    q,  # [heads, D] float32
    indices,  # [M] int32, or empty: row i is rows[i]
    log_weights,  # [M] float32, or empty: all 0
    start,
    stop,
    out,  # [heads, D] float32, written: sum of exp(logit - top) times value
    top,  # [heads] float32, written: largest logit
    total,  # [heads] float32, written: sum of exp(logit - top)
):
    """Online softmax of ``q`` over the selected rows ``start`` to ``stop``. Allocates nothing."""
    out[:] = 0.0
    top[:] = -np.inf
    total[:] = 0.0
    for i in range(start, min(start + TILE, stop)):
        prefetch(rows, np.int64(indices[i]) if indices.shape[0] > 0 else i)
    for first in range(start, stop, TILE):
        for head in range(0, q.shape[0], len(block)):
            attend_tile(block, rows, indices, log_weights, first, stop, q, head, out, top, total)


@serial
def merge_parts(parts, tops, totals, out, lse):
    """Merge ``parts`` [n, heads, D] of disjoint keys into ``out`` [heads, D] and ``lse``."""
    n, heads, D = parts.shape
    for g in range(heads):
        highest = np.float32(-np.inf)
        for s in range(n):
            highest = max(highest, tops[s, g])
        for d in range(D):
            out[g, d] = 0.0
        if highest == -np.inf:
            lse[g] = -np.inf
            continue
        mass = np.float32(0.0)
        for s in range(n):
            weight = np.exp(tops[s, g] - highest)
            mass += weight * totals[s, g]
            for d in range(D):
                out[g, d] += weight * parts[s, g, d]
        inverse = np.float32(1.0) / mass
        for d in range(D):
            out[g, d] *= inverse
        lse[g] = highest + np.log(mass)


@serial
def count_keys(starts, stops):
    """Keys of all rows of a selection."""
    keys = 0
    for r in range(starts.shape[0]):
        keys += stops[r] - starts[r]
    return keys


@serial
def attend_share(
    block,  # tuple from `head_block` of the heads of a row
    share,  # 0 to shares - 1
    shares,
    rows,  # [Hkv, capacity, 2 D]
    q,  # [Hq, D] float32
    indices,  # [M] int32, or empty: all keys
    starts,  # [R] int64: row r of Hq / R query heads reads indices[starts[r]:stops[r]]
    stops,  # [R] int64
    log_weights,  # [M] float32, or empty
    parts,  # [shares + R, heads, D] float32, written where this share has keys
    tops,  # [shares + R, heads] float32, the same
    totals,  # [shares + R, heads] float32, the same
):
    """One share of the work; its result for row r goes to slot share + r, which is its own."""
    R = starts.shape[0]
    heads = q.shape[0] // R
    group = q.shape[0] // rows.shape[0]
    keys = count_keys(starts, stops)
    shares = min(shares, keys)
    if share >= shares:
        return
    begin, end = keys * share // shares, keys * (share + 1) // shares
    passed = 0
    for r in range(R):
        first = max(begin - passed, 0)
        last = min(end - passed, stops[r] - starts[r])
        if first < last:
            attend_range(
                block,
                rows[r * heads // group],
                q[r * heads : (r + 1) * heads],
                indices,
                log_weights,
                starts[r] + first,
                starts[r] + last,
                parts[share + r],
                tops[share + r],
                totals[share + r],
            )
        passed += stops[r] - starts[r]


@serial
def merge_shares(shares, starts, stops, parts, tops, totals, out, lse):
    """Merge the results of the shares for each row into ``out`` [Hq, D] and ``lse`` [Hq]."""
    R = starts.shape[0]
    heads = out.shape[0] // R
    keys = count_keys(starts, stops)
    shares = min(shares, keys)
    passed = 0
    low = 0
    for r in range(R):
        behind = passed + stops[r] - starts[r]
        while low < shares and keys * (low + 1) // shares <= passed:
            low += 1
        high = low
        while passed < behind and high < shares and keys * high // shares < behind:
            high += 1
        merge_parts(
            parts[low + r : high + r],
            tops[low + r : high + r],
            totals[low + r : high + r],
            out[r * heads : (r + 1) * heads],
            lse[r * heads : (r + 1) * heads],
        )
        passed = behind


@kernel
def attend_rows(
    block,  # tuple from `head_block` of the heads of a row
    shares,
    rows,  # [Hkv, capacity, 2 D] as `items.row_array` gives them
    q,  # [Hq, D] float32
    indices,  # [M] int32, or empty: all keys
    starts,  # [R] int64: row r of Hq / R query heads reads indices[starts[r]:stops[r]]
    stops,  # [R] int64
    log_weights,  # [M] float32, or empty
    out,  # [Hq, D] float32, written
    lse,  # [Hq] float32, written
):
    """Attention of every row of the selection over its keys; see the module's docstring."""
    R = starts.shape[0]
    heads = q.shape[0] // R
    parts = np.empty((shares + R, heads, q.shape[1]), np.float32)
    tops = np.empty((shares + R, heads), np.float32)
    totals = np.empty((shares + R, heads), np.float32)
    for share in numba.prange(shares):
        attend_share(
            block,
            np.int64(share),
            shares,
            rows,
            q,
            indices,
            starts,
            stops,
            log_weights,
            parts,
            tops,
            totals,
        )
    merge_shares(shares, starts, stops, parts, tops, totals, out, lse)


_NO_INDICES: NDArray[np.int32] = np.empty(0, np.int32)
_NO_WEIGHTS: NDArray[np.float32] = np.empty(0, np.float32)


def attend_selected(query: torch.Tensor, far: FarView, selection: Selection) -> Partial:
    """Attention of ``query`` [Hq, D] float32 (scaled) over the selected far rows."""
    starts, stops = selection.offsets[:-1], selection.offsets[1:]
    return _launch(query, far, selection.indices, starts, stops, selection.log_weights)


def attend_all(query: torch.Tensor, far: FarView) -> Partial:
    """Attention of ``query`` [Hq, D] float32 (scaled) over every far row, streamed."""
    starts = np.zeros(far.rows.shape[0], np.int64)
    return _launch(query, far, _NO_INDICES, starts, starts + far.length, _NO_WEIGHTS)


def _launch(
    query: torch.Tensor,
    far: FarView,
    indices: NDArray[np.int32],
    starts: NDArray[np.int64],
    stops: NDArray[np.int64],
    log_weights: NDArray[np.float32],
) -> Partial:
    out = torch.empty(query.shape, dtype=torch.float32)
    lse = torch.empty(query.shape[0], dtype=torch.float32)
    attend_rows(
        head_block(query.shape[0] // len(starts)),
        share_count(starts, stops),
        row_array(far.rows),
        query.numpy(),
        indices,
        starts,
        stops,
        log_weights,
        out.numpy(),
        lse.numpy(),
    )
    return Partial(out, lse)


def share_count(starts: NDArray[np.int64], stops: NDArray[np.int64]) -> int:
    """Number of shares: one a thread, fewer if they would be tiny, more if too long."""
    keys = int((stops - starts).sum())
    threads = int(numba.get_num_threads())
    return max(1, min(threads, keys // MIN_SHARE_KEYS), -(-keys // SHARE_KEYS))

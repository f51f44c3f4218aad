"""Attention of a few query heads over many rows in host memory, in one pass.

The work is cut into tasks: one row of the selection (a KV group or a query head) times one split of
its keys. A task takes its keys a tile at a time: ask for the rows of the next tile, widen those of
this one to float32, take the dot products of all its query heads, update the online softmax
(Milakov and Gimelshein, arXiv 1805.02867), add the values. A second loop merges the splits of each
row by their log-sum-exp. Every row of K and V is read once for all the query heads that share it.

Bounds of the arithmetic: logits in float32, exp by a polynomial with relative error below 3e-7 and
clamped at -87, below which a float32 weight is nothing beside 1.
"""

from __future__ import annotations

import numba
import numpy as np
import torch
from numpy.typing import NDArray

from nearfar.cpu_kernels.compile import inlined, kernel, serial
from nearfar.cpu_kernels.prefetch import prefetch_row
from nearfar.cpu_kernels.storage import row_bits, widen
from nearfar.records import FarView, Partial, Selection

TILE = 32  # keys: a tile of float32 rows of 128 stays in the first-level cache
UNROLL = 4  # rows that share a load of the query or of the accumulator
TASKS_PER_THREAD = 4
MIN_SPLIT_KEYS = 128  # below this a split costs more than it saves

_LOG2E = np.float32(1.4426950408889634)
_LN2_HIGH = np.float32(0.693359375)
_LN2_LOW = np.float32(-2.12194440e-4)


@inlined
def exp_tile(x, count, bits, scale):
    """Replace ``x[:count]``, all <= 0, by its exponential; ``scale`` views ``bits`` int32."""
    for i in range(count):
        y = max(x[i], np.float32(-87.0))
        n = np.floor(y * _LOG2E + np.float32(0.5))
        bits[i] = (np.int32(n) + np.int32(127)) << np.int32(23)
        r = y - n * _LN2_HIGH - n * _LN2_LOW
        p = np.float32(1.9875691500e-4)
        p = p * r + np.float32(1.3981999507e-3)
        p = p * r + np.float32(8.3334519073e-3)
        p = p * r + np.float32(4.1665795894e-2)
        p = p * r + np.float32(1.6666665459e-1)
        p = p * r + np.float32(5.0000001201e-1)
        x[i] = p * r * r + r + np.float32(1.0)
    for i in range(count):
        x[i] *= scale[i]


@serial
def prefetch(rows, row):
    """`prefetch_row`, callable from interpreted code too."""
    prefetch_row(rows, row)


@inlined
def dot_tile(head, tile, padded, logit):
    """Dot products of ``head`` [D] with the keys of ``padded`` rows of ``tile``, four at a time."""
    D = head.shape[0]
    for t in range(0, padded, UNROLL):
        a, b, c, d = tile[t], tile[t + 1], tile[t + 2], tile[t + 3]
        s0 = s1 = s2 = s3 = np.float32(0.0)
        for i in range(D):
            x = head[i]
            s0 += x * a[i]
            s1 += x * b[i]
            s2 += x * c[i]
            s3 += x * d[i]
        logit[t] = s0
        logit[t + 1] = s1
        logit[t + 2] = s2
        logit[t + 3] = s3


@inlined
def add_tile(weight, tile, padded, acc):
    """Add the first ``padded`` rows of ``tile``, weighted, to ``acc`` [D], four at a time."""
    D = acc.shape[0]
    for t in range(0, padded, UNROLL):
        a, b, c, d = tile[t], tile[t + 1], tile[t + 2], tile[t + 3]
        w0, w1, w2, w3 = weight[t], weight[t + 1], weight[t + 2], weight[t + 3]
        for i in range(D):
            acc[i] += (w0 * a[i] + w1 * b[i]) + (w2 * c[i] + w3 * d[i])


@serial
def attend_range(
    rows,  # [N, 2 D] bits
    storage,
    q,  # [heads, D] float32
    indices,  # [M] int32, or empty: every row between start and stop
    log_weights,  # [M] float32, or empty: all 0
    start,
    stop,
    out,  # [heads, D] float32, written: not normalised
    top,  # [heads] float32, written: largest logit
    total,  # [heads] float32, written: sum of exp(logit - top)
):
    """Online softmax of ``q`` over the selected rows ``start`` to ``stop``."""
    heads, D = q.shape
    # zeros: rows between count and padded enter with weight 0, and 0 x NaN is NaN
    bits = np.zeros((TILE, 2 * D), np.uint32)
    tile = bits.view(np.float32)
    weights = np.empty((heads, TILE), np.float32)
    exponents = np.empty(TILE, np.int32)
    scale = exponents.view(np.float32)
    rescale = np.empty(1, np.float32)
    everything = indices.shape[0] == 0
    weighted = log_weights.shape[0] > 0
    out[:] = 0.0
    top[:] = -np.inf
    total[:] = 0.0
    for first in range(start, stop, TILE):
        count = min(TILE, stop - first)
        padded = (count + UNROLL - 1) // UNROLL * UNROLL
        if not everything:
            for t in range(first + TILE, min(first + 2 * TILE, stop)):
                prefetch(rows, np.int64(indices[t]))
        for t in range(count):
            row = first + t if everything else np.int64(indices[first + t])
            widen(rows[row], storage, bits[t], tile[t])
        for g in range(heads):
            logit = weights[g]
            dot_tile(q[g], tile, padded, logit)
            if weighted:
                for t in range(count):
                    logit[t] += log_weights[first + t]
            highest = top[g]
            for t in range(count):
                highest = max(highest, logit[t])
            for t in range(count):
                logit[t] -= highest
            exp_tile(logit, count, exponents, scale)
            for t in range(count, padded):
                logit[t] = 0.0
            if top[g] < highest:
                rescale[0] = max(top[g] - highest, np.float32(-87.0))
                exp_tile(rescale, 1, exponents, scale)
                total[g] *= rescale[0]
                for d in range(D):
                    out[g, d] *= rescale[0]
                top[g] = highest
            for t in range(count):
                total[g] += logit[t]
        for g in range(heads):
            add_tile(weights[g], tile[:, D:], padded, out[g])


@serial
def merge_splits(parts, tops, totals, out, lse):
    """Merge ``parts`` [splits, heads, D] of disjoint keys into ``out`` [heads, D] and ``lse``."""
    splits, heads, D = parts.shape
    for g in range(heads):
        highest = np.float32(-np.inf)
        for s in range(splits):
            highest = max(highest, tops[s, g])
        out[g, :] = 0.0
        if highest == -np.inf:
            lse[g] = -np.inf
            continue
        mass = np.float32(0.0)
        for s in range(splits):
            if totals[s, g] > 0:
                weight = np.exp(tops[s, g] - highest)
                mass += weight * totals[s, g]
                for d in range(D):
                    out[g, d] += weight * parts[s, g, d]
        for d in range(D):
            out[g, d] /= mass
        lse[g] = highest + np.log(mass)


@kernel
def attend_rows(
    rows,  # [Hkv, capacity, 2 D] bits
    storage,
    q,  # [Hq, D] float32
    indices,  # [M] int32, or empty: all keys
    starts,  # [R] int64: row r of Hq / R query heads reads indices[starts[r]:stops[r]]
    stops,  # [R] int64
    log_weights,  # [M] float32, or empty
    splits,
    out,  # [Hq, D] float32, written
    lse,  # [Hq] float32, written
):
    """Attention of every row of the selection over its keys; see the module's docstring."""
    Hkv = rows.shape[0]
    Hq, D = q.shape
    R = starts.shape[0]
    heads = Hq // R
    group = Hq // Hkv
    parts = np.empty((R, splits, heads, D), np.float32)
    tops = np.empty((R, splits, heads), np.float32)
    totals = np.empty((R, splits, heads), np.float32)
    for task in numba.prange(R * splits):
        r = task // splits
        s = task % splits
        count = stops[r] - starts[r]
        attend_range(
            rows[(r * heads) // group],
            storage,
            q[r * heads : (r + 1) * heads],
            indices,
            log_weights,
            starts[r] + count * s // splits,
            starts[r] + count * (s + 1) // splits,
            parts[r, s],
            tops[r, s],
            totals[r, s],
        )
    for r in numba.prange(R):
        first = r * heads
        merge_splits(
            parts[r], tops[r], totals[r], out[first : first + heads], lse[first : first + heads]
        )


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
    bits, storage = row_bits(far.rows)
    out = torch.empty(query.shape, dtype=torch.float32)
    lse = torch.empty(query.shape[0], dtype=torch.float32)
    attend_rows(
        bits,
        storage,
        query.numpy(),
        indices,
        starts,
        stops,
        log_weights,
        split_count(starts, stops),
        out.numpy(),
        lse.numpy(),
    )
    return Partial(out, lse)


def split_count(starts: NDArray[np.int64], stops: NDArray[np.int64]) -> int:
    """Splits of each row: enough tasks that ragged rows balance, none of them tiny."""
    longest = int((stops - starts).max(initial=0))
    threads = int(numba.get_num_threads())
    wanted = -(-TASKS_PER_THREAD * threads // max(1, len(starts)))
    return max(1, min(wanted, longest // MIN_SPLIT_KEYS))

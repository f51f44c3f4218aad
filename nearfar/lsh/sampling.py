"""From scores of all far keys to the keys that are read: by weight at random, or the best."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from nearfar.cpu_kernels.draw import draw_by_weight
from nearfar.records import Selection


def draw_keys(seed: int, layer: int, step: int, rows: int) -> NDArray[np.uint32]:
    """Keys of the random numbers of each row, independent over seed, layer and step."""
    sequence = np.random.SeedSequence([seed, layer, step])
    return sequence.generate_state(rows, np.uint32).astype(np.uint32, copy=False)


def sample_by_weight(
    scores: NDArray[np.float32],
    num_keys: int,
    budget: int,
    temper: float,
    keys: NDArray[np.uint32],
) -> Selection:
    """Poisson sample of about ``budget`` of ``num_keys`` keys a row, in proportion to weight.

    ``scores`` [R, heads, >= num_keys] are logits up to a constant per head and are overwritten; a
    row's weight is the mean over its heads of softmax(temper * scores). A key read with probability
    pi enters with log-weight -log(pi), so sums over the sample are unbiased (Horvitz and Thompson,
    1952).
    """
    R, heads_per_row, _ = scores.shape
    N = num_keys
    weights = np.empty((R, N), np.float32)
    indices = np.empty((R, N), np.int32)
    log_weights = np.empty((R, N), np.float32)
    counts = np.empty(R, np.int64)
    wanted = np.full(R, budget, np.int64)
    draw_by_weight(scores, wanted, temper, keys, weights, indices, log_weights, counts)
    return Selection(
        np.concatenate([row[:n] for row, n in zip(indices, counts, strict=True)]),
        np.concatenate([[0], np.cumsum(counts)]),
        np.concatenate([row[:n] for row, n in zip(log_weights, counts, strict=True)]),
        heads_per_row,
    )


def take_best(scores: NDArray[np.float32], budget: int, heads_per_row: int) -> Selection:
    """The ``budget`` keys a row with the largest ``scores`` [R, N], at log-weight 0."""
    best = np.argpartition(scores, -budget, axis=1)[:, -budget:]
    best.sort(axis=1)
    return Selection(
        best.astype(np.int32).ravel(),
        np.arange(len(best) + 1, dtype=np.int64) * budget,
        np.zeros(best.size, np.float32),
        heads_per_row,
    )

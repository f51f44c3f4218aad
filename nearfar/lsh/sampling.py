"""Draws the keys that are read, at random by weight, from the scores of all far keys."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from nearfar.cpu_kernels.draw import draw_by_weight
from nearfar.cpu_kernels.sketch_codes import RUN_KEYS
from nearfar.cpu_kernels.weigh import padded_keys, weigh_scores
from nearfar.records import Selection


def draw_keys(seed: int, layer: int, step: int, rows: int) -> NDArray[np.uint32]:
    """Keys of the random numbers of each row, independent over seed, layer and step."""
    sequence = np.random.SeedSequence([seed, layer, step])
    return sequence.generate_state(rows, np.uint32).astype(np.uint32, copy=False)


@dataclass
class Weighing:
    """Softmax numerators of all keys for every query head, as `cpu_kernels.weigh` writes them.

    It is also the scratch of drawing, kept from one step to the next to avoid new allocations.
    """

    kv_heads: int  # Hkv
    group: int  # G
    rows: int  # of a selection: Hkv where a group shares its keys, Hkv G where heads have their own
    numerators: NDArray[np.float32] = field(init=False)  # [Hkv, G, padded]
    tops: NDArray[np.float32] = field(init=False)  # [Hkv, runs, G]
    masses: NDArray[np.float32] = field(init=False)  # [Hkv, runs, G]
    weights: NDArray[np.float32] = field(init=False)  # [R, padded]
    indices: NDArray[np.int32] = field(init=False)  # [R, padded]

    def __post_init__(self) -> None:
        self.reserve(0)

    def reserve(self, num_keys: int) -> None:
        """Make room for ``num_keys`` keys; the content is lost."""
        padded = padded_keys(num_keys)
        if hasattr(self, "weights") and padded == self.weights.shape[1]:
            return
        Hkv, G = self.kv_heads, self.group
        numerators = np.empty((Hkv, G, padded), np.float32)
        tops, masses = np.empty((2, Hkv, padded // RUN_KEYS, G), np.float32)
        weights = np.empty((self.rows, padded), np.float32)
        indices = np.empty((self.rows, padded), np.int32)
        # all or, where one was interrupted, none: kernels do not look at sizes
        self.numerators, self.tops, self.masses = numerators, tops, masses
        self.indices, self.weights = indices, weights

    def draw(
        self, budget: int | NDArray[np.int64], temper: float, keys: NDArray[np.uint32]
    ) -> Selection:
        """Poisson sample of about ``budget`` keys a row (or [R] of them), by weight.

        A row's weight is the mean over its heads of softmax(temper * scores). A key read with
        probability pi enters with log-weight -log(pi), so sums over the sample are unbiased
        (Horvitz and Thompson, 1952). The numerators stay as they are.
        """
        counts = np.empty(self.rows, np.int64)
        wanted = np.empty(self.rows, np.int64)
        wanted[:] = budget
        draw_by_weight(
            self.numerators,
            self.tops,
            self.masses,
            wanted,
            temper,
            keys,
            self.weights,
            self.indices,
            counts,
        )
        return Selection(
            np.concatenate([row[:n] for row, n in zip(self.indices, counts, strict=True)]),
            np.concatenate([[0], np.cumsum(counts)]),
            np.concatenate([row[:n] for row, n in zip(self.weights, counts, strict=True)]),
            self.kv_heads * self.group // self.rows,
        )


def weighing_bytes(kv_heads: int, group: int, rows: int, num_keys: int) -> int:
    """Bytes of a `Weighing` of ``num_keys`` keys."""
    padded = padded_keys(num_keys)
    heads = kv_heads * group
    return 4 * (padded * (heads + 2 * rows) + 2 * heads * padded // RUN_KEYS)


def sample_by_weight(
    scores: NDArray[np.float32],
    num_keys: int,
    budget: int,
    temper: float,
    keys: NDArray[np.uint32],
) -> Selection:
    """Poisson sample of about ``budget`` of ``num_keys`` keys a row, see `Weighing.draw`.

    ``scores`` [R, heads, >= num_keys] are logits up to a constant per head.
    """
    R, heads_per_row, _ = scores.shape
    weighing = Weighing(R, heads_per_row, R)
    weighing.reserve(num_keys)
    weigh_scores(scores, num_keys, temper, weighing.numerators, weighing.tops, weighing.masses)
    return weighing.draw(budget, temper, keys)

"""The sampler of MagicPIG written down without tables, in float64.

Every key is compared with the query in every table and the probability is the closed form of the
paper (arXiv 2410.16179, algorithm 1). Slow, short, and independent of the code that it checks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class ReferenceSampler:
    """``planes`` [num_tables * bits_per_table, D] float64 and the rule that makes a candidate."""

    planes: Floats
    bits_per_table: int
    num_tables: int
    min_collisions: int = 2
    probability_floor: float = 0.0

    def codes(self, vectors: Floats) -> NDArray[np.int64]:
        """Codes [n, num_tables] of ``vectors`` [n, D]."""
        above = (vectors @ self.planes.T > 0).reshape(-1, self.num_tables, self.bits_per_table)
        codes: NDArray[np.int64] = above @ (1 << np.arange(self.bits_per_table))
        return codes

    def collisions(self, query: Floats, keys: Floats) -> NDArray[np.int64]:
        """Tables [n] in which ``query`` [D] and each of ``keys`` [n, D] have the same code."""
        same: NDArray[np.int64] = (self.codes(keys) == self.codes(query[None])).sum(1)
        return same

    def probability(self, query: Floats, keys: Floats) -> Floats:
        """Probability u [n] that each of ``keys`` [n, D] is a candidate of ``query`` [D]."""
        norms = np.linalg.norm(keys, axis=1) * np.linalg.norm(query)
        both_zero = ~keys.any(1) & (not query.any())
        cosine = np.where(norms > 0, keys @ query / np.where(norms > 0, norms, 1.0), both_zero)
        cosine = np.clip(cosine, -1.0, 1.0)
        x = (1.0 - np.arccos(cosine) / math.pi) ** self.bits_per_table
        L = self.num_tables
        u: Floats = np.ones(len(keys))
        for hits in range(self.min_collisions):
            u -= math.comb(L, hits) * x**hits * (1.0 - x) ** (L - hits)
        return u

    def sample(
        self, query: Floats, keys: Floats, centre: Floats
    ) -> tuple[NDArray[np.int64], Floats]:
        """Indices [M] of the candidates, ascending, and their log-weights [M]."""
        centred = keys - centre
        found = np.flatnonzero(self.collisions(query, centred) >= self.min_collisions)
        u = self.probability(query, centred[found]) + self.probability_floor
        return found, -np.log(np.minimum(u, 1.0))

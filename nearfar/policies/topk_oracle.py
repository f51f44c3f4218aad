"""The best keys by exact score: no deterministic choice of as many keys has more mass."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from nearfar.config import Budget
from nearfar.policies.base import Policy, Traits, check_per
from nearfar.policies.index import FarIndex, Stateless
from nearfar.records import ALL, AllOrNone, FarView, Geometry, Selection
from nearfar.storage import decoding_bytes

SCORED_BYTES = 2**24  # of float32 keys at a time: more are fresh pages each time, which take longer


@dataclass(frozen=True)
class TopkOracle(Policy):
    """Scores every far key exactly and reads the best; an upper bound, not a fast policy."""

    per: str = "group"  # group: one set for a KV group; head: budget / G keys for each query head

    name = "topk-oracle"
    traits = Traits(
        kind="selects",
        summary="the best far keys by exact score; an upper bound on recovered mass",
        source="exact top-k",
        keeps_far=True,
    )

    def __post_init__(self) -> None:
        check_per(self.name, self.per)

    def predict_working_bytes(self, geometry: Geometry, tokens: int, dtype: torch.dtype) -> int:
        """Exact scores of all keys, and a piece of the keys."""
        return scoring_bytes(geometry, tokens, dtype)

    def new_index(self, geometry: Geometry, budget: Budget, seed: int) -> FarIndex:
        """No index: `select` scores the stored keys themselves."""
        return _ExactScores(budget, self.per)


class _ExactScores(Stateless):
    def __init__(self, budget: Budget, per: str) -> None:
        self._budget = budget
        self._per = per

    def select(
        self, layer: int, query: torch.Tensor, far: FarView, step: int
    ) -> Selection | AllOrNone:
        budget = self._budget.keys(far.length)
        if budget == far.length:
            return ALL
        weights = exact_weights(query, far, self._per)
        if self._per == "head":
            budget = max(1, budget * far.rows.shape[0] // len(query))
        best = weights.topk(budget, sorted=False).indices.sort().values.int()
        return Selection(
            best.numpy().ravel(),
            np.arange(len(best) + 1, dtype=np.int64) * budget,
            np.zeros(best.numel(), np.float32),
            len(query) // len(best),
        )


def exact_weights(query: torch.Tensor, far: FarView, per: str) -> torch.Tensor:
    """Softmax over far keys [rows, N]: of each query head, or the mean over each KV group."""
    Hkv, N, D = far.rows.shape[0], far.length, far.head_dim
    queries = query.view(Hkv, -1, D)
    scores = torch.empty(Hkv, queries.shape[1], N)
    step = max(1, SCORED_BYTES // (4 * Hkv * D))
    for start in range(0, N, step):
        stop = min(N, start + step)
        scores[:, :, start:stop] = queries @ far.keys(start, stop).float().transpose(1, 2)
    weights = scores.softmax(-1)
    return weights.view(-1, N) if per == "head" else weights.mean(1)


def scoring_bytes(geometry: Geometry, tokens: int, dtype: torch.dtype) -> int:
    """Most bytes that `exact_weights` and choosing by them work in."""
    heads, dim = geometry.kv_heads, geometry.head_dim
    piece = min(heads * tokens, SCORED_BYTES // (4 * dim))
    widened = 0 if dtype == torch.float32 else max(4 * dim, decoding_bytes(dtype, dim))
    # scores, their softmax and its mean, pairs that are sorted
    return piece * widened + heads * tokens * (8 * geometry.group + 4 + 24)

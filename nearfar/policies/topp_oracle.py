"""The fewest keys that have a given share of the attention, to measure what a share costs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from nearfar.config import Budget
from nearfar.errors import InvalidOptionError
from nearfar.policies.base import Policy, Traits, check_per
from nearfar.policies.index import FarIndex, Stateless
from nearfar.policies.topk_oracle import exact_weights, scoring_bytes
from nearfar.records import ALL, AllOrNone, FarView, Geometry, Selection


@dataclass(frozen=True)
class ToppOracle(Policy):
    """Scores every far key exactly and reads the heaviest until they have the share `p`.

    The share is of the softmax over far keys; the budget caps how many are read.
    """

    p: float = 0.95
    per: str = "group"  # group: one set for a KV group; head: budget / G keys for each query head

    name = "topp-oracle"
    traits = Traits(
        kind="selects",
        summary="the fewest far keys with a share p of the attention; how many that takes",
        source="exact top-p",
        keeps_far=True,
    )

    def __post_init__(self) -> None:
        check_per(self.name, self.per)
        if not 0 < self.p <= 1:
            raise InvalidOptionError(
                f"topp-oracle's p must be above 0 and at most 1. Got {self.p!r}."
            )

    def predict_working_bytes(self, geometry: Geometry, tokens: int, dtype: torch.dtype) -> int:
        """Exact scores of all keys, and a piece of the keys."""
        return scoring_bytes(geometry, tokens, dtype)

    def new_index(self, geometry: Geometry, budget: Budget, seed: int) -> FarIndex:
        """No index: `select` scores the stored keys themselves."""
        return _ExactShares(self, budget)


class _ExactShares(Stateless):
    def __init__(self, policy: ToppOracle, budget: Budget) -> None:
        self._policy, self._budget = policy, budget

    def select(
        self, layer: int, query: torch.Tensor, far: FarView, step: int
    ) -> Selection | AllOrNone:
        budget = self._budget.keys(far.length)
        if budget == far.length:
            return ALL
        weights = exact_weights(query, far, self._policy.per)
        if self._policy.per == "head":
            budget = max(1, budget * far.rows.shape[0] // len(query))
        heaviest, order = weights.topk(budget)
        # a key is needed while those before it have less than p
        before = heaviest.double().cumsum(-1) - heaviest
        counts = (before < self._policy.p).sum(-1).tolist()
        keys = [row[:count].sort().values for row, count in zip(order, counts, strict=True)]
        return Selection(
            torch.cat(keys).int().numpy(),
            np.concatenate([[0], np.cumsum(counts)]),
            np.zeros(sum(counts), np.float32),
            len(query) // len(keys),
        )

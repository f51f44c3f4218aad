"""SnapKV: the keys that the end of the prompt attends to, chosen once after it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812  its usual name

from nearfar.errors import InvalidOptionError
from nearfar.policies.base import LAST_QUERIES, NearState, PromptQueryStats, Traits
from nearfar.policies.evicting import (
    DropsLightest,
    attention_bytes,
    attention_of,
    group_mean,
)
from nearfar.records import Geometry


@dataclass(frozen=True)
class SnapKV(DropsLightest):
    """Keeps the keys that get most attention from the last queries of the prompt, and neighbours.

    score[j] = the attention that the last `queries` tokens gave to j, summed over them, mean over
    the query heads of the group, then pooled over `kernel` neighbouring tokens. Later tokens are
    kept too, so memory grows with the answer.
    """

    queries: int = 32  # last tokens of the prompt that vote
    kernel: int = 7  # neighbouring tokens that share a score, an odd number
    pool: str = "max"  # max or avg

    name = "snapkv"
    traits = Traits(
        kind="evicts",
        summary="the keys that the end of the prompt attends to, pooled over neighbours",
        source="Li et al., SnapKV, arXiv 2404.14469",
        keeps_far=False,
        evicts_once=True,
        watches="last",
    )

    def __post_init__(self) -> None:
        if not 1 <= self.queries <= LAST_QUERIES:
            raise InvalidOptionError(
                f"{self.name}'s queries must be between 1 and {LAST_QUERIES}. Got {self.queries!r}."
            )
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise InvalidOptionError(
                f"{self.name}'s kernel must be an odd number above 0. Got {self.kernel!r}."
            )
        if self.pool not in ("max", "avg"):
            raise InvalidOptionError(f"{self.name}'s pool must be max or avg. Got {self.pool!r}.")

    def score_prompt(self, near: NearState, stats: PromptQueryStats) -> torch.Tensor:
        """Votes [Hkv, C], pooled over neighbours: the rows of a prompt are in token order."""
        assert stats.last is not None
        votes = attention_of(stats.last[:, -self.queries :], near, lambda head: head.sum(1))
        votes = group_mean(votes, len(near.positions))
        if self.pool == "max":
            return F.max_pool1d(votes, self.kernel, 1, self.kernel // 2)
        return F.avg_pool1d(votes, self.kernel, 1, self.kernel // 2)

    def weighing_bytes(self, geometry: Geometry, tokens: int, dtype: torch.dtype) -> int:
        """The attention of the last queries."""
        return attention_bytes(geometry, tokens, self.queries, dtype)

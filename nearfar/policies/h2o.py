"""H2O: the tokens that got most attention so far, and the most recent ones."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from nearfar.errors import InvalidOptionError
from nearfar.policies.base import NearState, PromptQueryStats, Traits
from nearfar.policies.evicting import DropsLightest, group_mean


@dataclass(frozen=True)
class H2O(DropsLightest):
    """Heavy hitters by accumulated attention, bounded through decode.

    A token's score is the sum of the attention from all later queries, of the prompt and of every
    decoded token, as the mean over the query heads of its KV head. A share of the budget is recent
    tokens (beyond the window), the rest heavy hitters.
    """

    recent_share: float = 0.5  # of the budget

    name = "h2o"
    traits = Traits(
        kind="evicts",
        summary="heavy hitters by accumulated attention, and recent tokens",
        source="Zhang et al., H2O, arXiv 2306.14048",
        keeps_far=False,
        needs_attention=True,
        watches="sums",
    )

    def __post_init__(self) -> None:
        if not 0 <= self.recent_share <= 1:
            raise InvalidOptionError(
                f"{self.name}'s recent_share must be between 0 and 1. Got {self.recent_share!r}."
            )

    def score_prompt(self, near: NearState, stats: PromptQueryStats) -> torch.Tensor:
        """Add the attention that each token got from the whole prompt."""
        assert stats.sums is not None
        old = torch.zeros(near.positions.shape, device=stats.sums.device)
        return self.update_scores(old if near.scores is None else near.scores, stats.sums)

    def update_scores(self, scores: torch.Tensor, attention: torch.Tensor) -> torch.Tensor:
        """Add the attention that each token got, as the mean over the group."""
        return scores + group_mean(attention, len(scores))

    def recent(self, near: NearState) -> int:
        """The window, and a share of the budget."""
        return near.window + round(self.recent_share * (near.limit - near.sinks - near.window))


@dataclass(frozen=True)
class H2OMean(H2O):
    """H2O by the mean attention of the queries that could see a token, not their sum.

    A sum favours early tokens: more queries come after them.
    """

    name = "h2o-mean"
    traits = dataclasses.replace(
        H2O.traits,
        summary="heavy hitters by mean attention, and recent tokens",
        source="H2O (arXiv 2306.14048) by the mean over queries, as kvpress's ObservedAttention",
    )

    def weights(self, near: NearState) -> torch.Tensor:
        """Sums divided by the number of their queries."""
        assert near.scores is not None
        return near.scores / (near.positions.max() + 1 - near.positions)

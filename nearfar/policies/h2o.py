"""H2O: the tokens that got most attention so far, and the most recent ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nearfar.errors import InvalidOptionError
from nearfar.policies.base import NearState, Policy, Traits


@dataclass(frozen=True)
class H2O(Policy):
    """Heavy hitters by accumulated attention, bounded through decode.

    A token's score is the sum of the attention that all queries gave it since it came, over the
    whole prompt and every decoded token, and the mean over the query heads of its KV head. Of the
    budget a share is recent tokens (they add to the window), the rest heavy hitters.
    """

    recent_share: float = 0.5  # of the budget

    name = "h2o"
    traits = Traits(
        kind="evicts",
        summary="heavy hitters by accumulated attention, and recent tokens",
        source="Zhang et al., H2O, arXiv 2306.14048",
        keeps_far=False,
        needs_attention=True,
    )

    def __post_init__(self) -> None:
        if not 0 <= self.recent_share <= 1:
            raise InvalidOptionError(
                f"h2o's recent_share must be between 0 and 1. Got {self.recent_share!r}."
            )

    def update_scores(self, scores: torch.Tensor, attention: torch.Tensor) -> torch.Tensor:
        """Add the mean over the group of what each token got."""
        Hkv, N = scores.shape
        return scores + attention.view(Hkv, -1, N).mean(1)

    def victims(self, near: NearState) -> torch.Tensor:
        """The lightest rows among those that are neither sinks nor recent."""
        assert near.scores is not None
        count = near.positions.shape[1] - near.limit
        budget = near.limit - near.sinks - near.window
        recent = near.window + round(self.recent_share * budget)
        newest = near.positions.max()
        safe = (near.positions < near.sinks) | (near.positions > newest - recent)
        weight = near.scores.masked_fill(safe, torch.inf)
        return weight.topk(count, dim=-1, largest=False, sorted=False).indices

"""What every sequence of an engine has in common, and the near rows that follow from it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nearfar.config import Budget
from nearfar.policies.base import Policy
from nearfar.records import Geometry


@dataclass(frozen=True)
class SequenceSettings:
    """What every sequence of an engine has in common."""

    geometry: Geometry
    policy: Policy
    budget: Budget
    sinks: int
    window: int
    far_dtype: torch.dtype
    capacity_tokens: int  # longest context
    seed: int
    near_selection: bool = False  # whether a policy that can keep its index near does so

    @property
    def spared(self) -> int:
        """Near rows beside a budget: sinks and window."""
        return self.sinks + self.window

    def near_limit(self, first_tokens: int) -> int:
        """Near rows of a layer, in the mean over layers, after a first prompt of so many tokens."""
        if self.budget.value >= 1:
            return self.spared + int(self.budget.value)
        return self.spared + self.budget.keys(first_tokens)

    def layer_limit(self, near_limit: int, layer: int) -> int:
        """Near rows of one layer."""
        budget = near_limit - self.spared
        return self.spared + self.policy.layer_budget(budget, layer, self.geometry.layers)

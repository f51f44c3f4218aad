"""Everything but sinks and window far, and all of it read at every step: exact, and slow."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nearfar.config import Budget
from nearfar.policies.base import Policy, Traits
from nearfar.policies.index import FarIndex, Stateless
from nearfar.records import ALL, AllOrNone, FarView, Geometry, Selection


@dataclass(frozen=True)
class FullFar(Policy):
    """Exact attention over far memory on the host; the budget is not used."""

    name = "full-far"
    traits = Traits(
        kind="exact",
        summary="everything far, exact: the host reads all keys",
        source="scaled dot-product attention, split by log-sum-exp (arXiv 2205.14135)",
        keeps_far=True,
    )

    def new_index(self, geometry: Geometry, budget: Budget, seed: int) -> FarIndex:
        """An index that lists nothing and selects everything."""
        return _Everything()


class _Everything(Stateless):
    def select(
        self, layer: int, query: torch.Tensor, far: FarView, step: int
    ) -> Selection | AllOrNone:
        return ALL

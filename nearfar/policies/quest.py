"""Quest: pages of keys, ranked by an upper bound of a query's logits in them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nearfar.policies.base import Traits
from nearfar.policies.blocks import ReadsBlocks


@dataclass(frozen=True)
class Quest(ReadsBlocks):
    """Keeps the smallest and the largest number of each channel in a page of `size` keys.

    A page's score is the largest logit that a key within those bounds could have:
    sum over d of max(q_d min_d, q_d max_d).
    """

    name = "quest"
    traits = Traits(
        kind="selects",
        summary="pages of far keys by an upper bound of their logits",
        source="Tang et al., Quest, arXiv 2406.10774",
        keeps_far=True,
    )

    def summary_shape(self, head_dim: int) -> tuple[int, int]:
        """The bounds as one vector."""
        return 1, 2 * head_dim

    def summary(self, keys: torch.Tensor) -> torch.Tensor:
        """Largest and then smallest numbers."""
        low, high = keys.aminmax(dim=2)
        return torch.cat([high, low], -1)[:, :, None]

    def features(self, query: torch.Tensor) -> torch.Tensor:
        """Where q_d is positive the largest key counts, elsewhere the smallest."""
        return torch.cat([query.clamp(min=0), query.clamp(max=0)], -1)

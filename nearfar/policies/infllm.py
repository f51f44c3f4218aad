"""InfLLM: blocks of keys, ranked by a few representative ones of each."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nearfar.errors import InvalidOptionError
from nearfar.policies.base import Traits
from nearfar.policies.blocks import ReadsBlocks


@dataclass(frozen=True)
class InfLLM(ReadsBlocks):
    """A block's score is the mean logit of its representatives: the keys farthest from its mean.

    The paper picks the keys that later queries attend to most. An index sees keys alone; keys that
    differ from their neighbours get most attention (KeyDiff's finding).
    """

    size: int = 128
    representatives: int = 4  # keys of a block that stand for it

    name = "infllm"
    traits = Traits(
        kind="selects",
        summary="blocks of far keys by a few representatives of each",
        source="Xiao et al., InfLLM, arXiv 2402.04617; representatives by keys alone",
        keeps_far=True,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.representatives <= self.size:
            raise InvalidOptionError(
                f"infllm's representatives must be between 1 and its size, {self.size}. "
                f"Got {self.representatives!r}."
            )

    def summary_shape(self, head_dim: int) -> tuple[int, int]:
        """The representatives."""
        return self.representatives, head_dim

    def summary(self, keys: torch.Tensor) -> torch.Tensor:
        """The keys farthest from the block's mean, in token order."""
        distance = (keys - keys.mean(2, keepdim=True)).square().sum(-1)
        best = distance.topk(self.representatives, dim=-1).indices.sort(-1).values
        return keys.gather(2, best[..., None].expand(*best.shape, keys.shape[-1]))

    def features(self, query: torch.Tensor) -> torch.Tensor:
        """The query itself."""
        return query

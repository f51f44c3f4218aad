"""StreamingLLM: attention sinks and a recent window, with positions counted in the cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nearfar.policies.base import NearState, Policy, Traits
from nearfar.policies.evicting import DROPPING_BYTES
from nearfar.records import Geometry


@dataclass(frozen=True)
class StreamingLLM(Policy):
    """The first `sinks` tokens and the last window + budget stay; all others are dropped for good.

    A token's rotary position is its place in the cache, so it never exceeds the cache's size and
    generation can go on without end (Xiao et al., section 3.2). The prompt is read with exact
    attention at its true positions, which are the same until the first token is dropped.
    """

    name = "streaming-llm"
    traits = Traits(
        kind="evicts",
        summary="sinks and the most recent tokens, unlimited generation",
        source="Xiao et al., Efficient Streaming Language Models, arXiv 2309.17453",
        keeps_far=False,
        positions="cache-index",
    )

    def predict_working_bytes(self, geometry: Geometry, tokens: int, dtype: torch.dtype) -> int:
        """Ages, and which of them are largest."""
        return geometry.kv_heads * tokens * DROPPING_BYTES

    def victims(self, near: NearState) -> torch.Tensor:
        """The oldest rows that are not sinks."""
        count = near.positions.shape[1] - near.limit
        never = near.positions.max() + 1
        age = near.positions.where(near.positions >= near.sinks, never)
        return age.topk(count, dim=-1, largest=False, sorted=False).indices

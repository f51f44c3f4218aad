"""LoCoCo: tokens that would be dropped are merged into a few rows by a learned convolution."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nearfar.errors import InvalidOptionError
from nearfar.policies.base import LAST_QUERIES, Merger, NearState, Policy, PromptQueryStats, Traits
from nearfar.policies.convolution import (
    LayerConv,
    convolutions,
    merge_in_segments,
    random_convolutions,
)
from nearfar.policies.evicting import DROPPING_BYTES, attention_bytes, attention_of, group_mean
from nearfar.policies.merged_rows import MergedRows
from nearfar.policies.trained import check_trained, load_trained, trained_digest
from nearfar.records import Geometry

SEGMENT_TOKENS = 512  # of a prompt, at a time
SLACK_TOKENS = 16  # decoded between two mergers
MERGING_BYTES = 2**22  # a segment and what it is merged into, in float32


@dataclass(frozen=True)
class LoCoCo(Policy):
    """Sinks and window, the best-scoring rows, and rows that are mixtures of all others.

    A score is the attention of the prompt's last ``queries`` while the prompt is compressed, and
    later of the tokens decoded since the last compression. ``maps`` is a file of
    training/train_lococo.py, or "random" for an untrained convolution; empty for that of
    smollm2-135m-128k. Without ``convolution`` the next-best rows stay instead of mixtures, to
    measure its effect.
    """

    queries: int = 32
    convolution: bool = True
    maps: str = ""

    name = "lococo"
    traits = Traits(
        kind="evicts",
        summary="the best rows, and mixtures of the others by a learned convolution",
        source="Cai et al., LoCoCo, arXiv 2406.05317",
        keeps_far=False,
        needs_attention=True,
        watches="last",
    )

    def __post_init__(self) -> None:
        if not 1 <= self.queries <= LAST_QUERIES:
            raise InvalidOptionError(
                f"{self.name}'s queries must be between 1 and {LAST_QUERIES}. Got {self.queries!r}."
            )

    def score_prompt(self, near: NearState, stats: PromptQueryStats) -> torch.Tensor:
        """The attention of the last queries, the mean over them and their group."""
        assert stats.last is not None
        return scores_of(stats.last[:, -self.queries :], near)

    def update_scores(self, scores: torch.Tensor, attention: torch.Tensor) -> torch.Tensor:
        """Add the attention that each row got, as the mean over the group."""
        return scores + group_mean(attention, len(scores))

    def predict_working_bytes(self, geometry: Geometry, tokens: int, dtype: torch.dtype) -> int:
        """Rows side by side and in token order, and what orders them; before, the attention."""
        heads, width = geometry.kv_heads, 2 * geometry.head_dim * dtype.itemsize
        scoring = attention_bytes(geometry, tokens, self.queries, dtype)
        return max(heads * tokens * (2 * width + DROPPING_BYTES), scoring) + MERGING_BYTES

    def contents(self) -> dict[str, str]:
        """The digest of the maps, in the place of their path."""
        return {"maps": trained_digest(self.name, self.maps)}

    def check_model(self, geometry: Geometry) -> None:
        """The convolutions must be of its sizes."""
        check_trained(self.name, self.maps, geometry)

    def new_merger(self, geometry: Geometry, device: torch.device) -> Merger:
        """Convolutions of all layers."""
        tensors = load_trained(self.name, self.maps, geometry, device, random_convolutions)
        if not self.convolution:
            tensors = tensors | {"blend": torch.zeros_like(tensors["blend"])}
        layers = convolutions(tensors)
        return lambda near: merged(near, layers[near.layer])


def scores_of(last: torch.Tensor, near: NearState) -> torch.Tensor:
    """Scores [Hkv, C] of a prompt's rows by its ``last`` queries [Hq, n, D]."""
    return group_mean(attention_of(last, near, lambda head: head.mean(1)), len(near.keys))


def merged(near: NearState, conv: LayerConv) -> MergedRows:
    """Sinks and window as they are, and the merged rest; scores start again."""
    assert near.scores is not None
    rows = torch.cat([near.keys, near.values], -1)
    every = MergedRows(rows, near.scores, near.positions)
    every = every.pick(near.positions.argsort(dim=-1, stable=True))
    C, window_start = every.scores.shape[1], every.scores.shape[1] - near.window
    budget = near.limit - near.sinks - near.window
    count = budget - min(SLACK_TOKENS, budget // 2)  # room for tokens until the next time
    middle = every.span(near.sinks, window_start)
    middle = merge_in_segments(middle, count, conv, SEGMENT_TOKENS)
    found = every.span(0, near.sinks).join(middle).join(every.span(window_start, C))
    return MergedRows(found.rows, torch.zeros_like(found.scores), found.positions)

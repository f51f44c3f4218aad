"""TOVA: each step drops the token that the newest one attends to least."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nearfar.policies.base import NearState, PromptQueryStats, Traits
from nearfar.policies.evicting import DropsLightest, attention_bytes, attention_of
from nearfar.records import Geometry


@dataclass(frozen=True)
class Tova(DropsLightest):
    """A token weighs what the newest query gives it, as the mean over all heads of the layer.

    All heads of a layer keep the same tokens, and nothing of earlier queries is remembered.
    """

    name = "tova"
    traits = Traits(
        kind="evicts",
        summary="the keys that the newest token attends to, the same for all heads",
        source="Oren et al., Transformers are Multi-State RNNs, arXiv 2401.06104",
        keeps_far=False,
        needs_attention=True,
        watches="last",
    )

    def score_prompt(self, near: NearState, stats: PromptQueryStats) -> torch.Tensor:
        """The attention of the prompt's last token."""
        assert stats.last is not None
        Hkv, C = near.positions.shape
        if bool((near.positions != near.positions[:1]).any()):
            raise AssertionError("heads hold different tokens")
        attention = attention_of(stats.last[:, -1:], near, lambda head: head[:, 0])
        return attention.mean(0).expand(Hkv, C)

    def weighing_bytes(self, geometry: Geometry, tokens: int, dtype: torch.dtype) -> int:
        """The attention of one query."""
        return attention_bytes(geometry, tokens, 1, dtype)

    def update_scores(self, scores: torch.Tensor, attention: torch.Tensor) -> torch.Tensor:
        """The attention of the newest token, which replaces old scores."""
        return attention.mean(0).expand(scores.shape)

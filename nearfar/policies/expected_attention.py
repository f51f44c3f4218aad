"""Expected Attention: the attention that queries like those of the prompt will give next."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nearfar.errors import InvalidOptionError
from nearfar.policies.base import NearState, PromptQueryStats, Traits
from nearfar.policies.evicting import DropsLightest
from nearfar.records import Geometry


@dataclass(frozen=True)
class ExpectedAttention(DropsLightest):
    """Keeps the keys that future queries are expected to attend to, by size of their values.

    Queries before rotation are taken as Gaussian, with the prompt's mean and covariance; rotated to
    the mean of the next `horizon` positions they are N(m, S), scaled by D^-1/2. Then

        E exp(q . k) = exp(m . k + k' S k / 2)
        score = (mean over the group of softmax over keys of its logarithm + epsilon) |v|
    """

    horizon: int = 512  # positions ahead
    epsilon: float = 0.0  # weight of a value that no query is expected to read

    name = "expected-attention"
    traits = Traits(
        kind="evicts",
        summary="the keys that queries like the prompt's will attend to",
        source="Devoto et al., Expected Attention, arXiv 2510.00636",
        keeps_far=False,
        evicts_once=True,
        watches="moments",
    )

    def __post_init__(self) -> None:
        if self.horizon < 1:
            raise InvalidOptionError(
                f"expected-attention's horizon must be 1 or more. Got {self.horizon!r}."
            )
        if not self.epsilon >= 0:
            raise InvalidOptionError(
                f"expected-attention's epsilon must be 0 or more. Got {self.epsilon!r}."
            )

    def score_prompt(self, near: NearState, stats: PromptQueryStats) -> torch.Tensor:
        """Expected attention [Hkv, C] times the norm of the value."""
        assert stats.moments is not None
        Hkv, C = near.positions.shape
        turn = self._mean_rotation(near, stats)
        mean = stats.moments.mean @ turn.T
        covariance = turn @ stats.moments.covariance @ turn.T
        scores = torch.empty(Hkv, C, device=near.keys.device)
        group = len(mean) // Hkv
        for head in range(Hkv):
            keys = near.keys[head].float()
            own = slice(head * group, (head + 1) * group)
            spread = ((keys @ covariance[own]) * keys).sum(-1)  # [G, C]
            expected = (mean[own] @ keys.T + spread / 2).softmax(-1).mean(0)
            scores[head] = (expected + self.epsilon) * near.values[head].float().norm(dim=-1)
        return scores

    def weighing_bytes(self, geometry: Geometry, tokens: int, dtype: torch.dtype) -> int:
        """Keys of a head, and their products with the covariance of each of its queries."""
        wide = 4 * geometry.head_dim
        return tokens * (wide + geometry.group * (2 * wide + 16) + 4 * geometry.kv_heads)

    def _mean_rotation(self, near: NearState, stats: PromptQueryStats) -> torch.Tensor:
        """The mean [D, D] of the rotations to the next positions."""
        D, device = near.keys.shape[2], near.keys.device
        first = near.positions.max() + 1
        cos, sin = stats.angles(first + torch.arange(self.horizon, device=device))
        rolled = torch.eye(D, device=device).roll(D // 2, 0)
        return torch.diag(cos.mean(0)) + sin.mean(0)[:, None] * rolled

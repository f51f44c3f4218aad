"""The base of policies that drop the lightest tokens: a weight for each, and protected tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from nearfar.policies.base import NearState, Policy
from nearfar.records import Geometry

# of a row and KV head: its weight, what it is compared by, pairs that are sorted, slots that go
DROPPING_BYTES = 64


@dataclass(frozen=True)
class DropsLightest(Policy):
    """Keeps sinks, the most recent tokens, and the heaviest of the other tokens.

    A policy of this kind defines the weight of a token: by `weights`, or by the scores that
    `score_prompt` and `update_scores` make of attention. Of two equal weights either may be
    dropped.
    """

    def weights(self, near: NearState) -> torch.Tensor:
        """How much each row [Hkv, C] is worth keeping; only their order counts."""
        assert near.scores is not None
        return near.scores

    def predict_working_bytes(self, geometry: Geometry, tokens: int, dtype: torch.dtype) -> int:
        """Choosing the lightest of a near set, beside what weighing it takes."""
        dropping = geometry.kv_heads * tokens * DROPPING_BYTES
        return dropping + self.weighing_bytes(geometry, tokens, dtype)

    def weighing_bytes(self, geometry: Geometry, tokens: int, dtype: torch.dtype) -> int:
        """Most bytes that `score_prompt` and `weights` work in, as of `predict_working_bytes`."""
        return 0

    def recent(self, near: NearState) -> int:
        """The number of newest tokens that always stay."""
        return near.window

    def spared(self, near: NearState) -> torch.Tensor:
        """Mask [Hkv, C] of rows that stay at any weight."""
        newest = near.positions.max()
        return (near.positions < near.sinks) | (near.positions > newest - self.recent(near))

    def victims(self, near: NearState) -> torch.Tensor:
        """The lightest rows that are not protected."""
        count = near.positions.shape[1] - near.limit
        weights = self.weights(near).masked_fill(self.spared(near), torch.inf)
        return weights.topk(count, dim=-1, largest=False, sorted=False).indices


def group_mean(attention: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """The mean [Hkv, C] of ``attention`` [Hq, C] over the query heads of each KV head."""
    return attention.view(kv_heads, -1, attention.shape[1]).mean(1)


def attention_of(
    last: torch.Tensor, near: NearState, over_queries: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Attention of the ``last`` queries [Hq, n, D] over the near keys.

    ``over_queries`` reduces each KV head's [G, n, C] to [G, C]; the result is [Hq, C]. The n-th
    query is that of the newest token; no query sees a later token than its own.
    """
    Hkv, C, D = near.keys.shape
    n = last.shape[1]
    newest = near.positions.max()
    own = newest - torch.arange(n - 1, -1, -1, device=last.device)
    heads = []
    for head, queries in enumerate(last.reshape(Hkv, -1, D)):  # one at a time: prompts are long
        logits = (queries @ near.keys[head].float().T).view(-1, n, C)
        later = near.positions[head] > own[:, None]
        heads.append(over_queries(logits.masked_fill_(later, -torch.inf).softmax(-1)))
    return torch.cat(heads)


def attention_bytes(geometry: Geometry, tokens: int, queries: int, dtype: torch.dtype) -> int:
    """Peak temporary bytes of `attention_of` for ``queries`` queries over ``tokens`` near rows."""
    logits = geometry.group * queries * 2 * 4 + queries  # and softmax, and who sees whom
    wide = 0 if dtype == torch.float32 else 4 * geometry.head_dim
    return tokens * (logits + wide + 4 * geometry.query_heads * 2 + 16)

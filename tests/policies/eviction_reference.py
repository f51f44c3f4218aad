"""Decoding with a cache that loses tokens, written as its papers say: lists and plain softmax.

Keys are kept unrotated beside their position in the text, and every query attends to what is kept,
key by key. The prompt is read with all of its tokens; then, and after every token, `drop` says
which positions of a KV head go.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from nearfar.policies.base import NearState
from nearfar.runtime.engine.engine import Engine
from nearfar.runtime.models.layers import Attention
from nearfar.runtime.models.rope import rotate


@dataclass
class Kept:
    """A token that one KV head of one layer still has."""

    position: int
    key: torch.Tensor  # [D], unrotated
    value: torch.Tensor  # [D]
    score: float = 0.0  # attention received so far, mean over the query heads of the group


def near_state(
    positions: torch.Tensor, scores: torch.Tensor | None, sinks: int, window: int, limit: int
) -> NearState:
    """What a policy sees that does not look at keys."""
    nothing = torch.full((*positions.shape, 4), torch.nan)
    return NearState(positions, scores, sinks, window, limit, nothing, nothing)


Drop = Callable[[list[Kept]], list[Kept]]  # what goes, of one head


class EvictingReference:
    """A sequence of ``engine``'s model whose heads drop tokens by ``drop``."""

    def __init__(self, engine: Engine, drop: Drop, count_slots: bool) -> None:
        self.decoder = engine.decoder
        self.geometry = engine.model_config.geometry
        self._drop, self._count_slots = drop, count_slots
        self.heads: list[list[list[Kept]]] = [
            [[] for _ in range(self.geometry.kv_heads)] for _ in range(self.geometry.layers)
        ]
        self.tokens = 0

    def kept_positions(self, layer: int, head: int) -> list[int]:
        return sorted(kept.position for kept in self.heads[layer][head])

    def read(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits [V] after ``ids`` [T], which see all before them; only then tokens go."""
        hidden = self.decoder.run(self.decoder.embed(ids), self._mix)
        self.tokens += len(ids)
        return self.decoder.logits(hidden[-1:])[0]

    def _mix(self, mixer: Attention, qkv: torch.Tensor) -> torch.Tensor:
        """Attention [T, Hq D] token by token; then tokens go."""
        q, k, v = mixer.heads(qkv)
        heads, Hkv, D = self.heads[mixer.far_layer], self.geometry.kv_heads, self.geometry.head_dim
        mixed = torch.zeros(len(q), self.geometry.query_heads, D)
        for t in range(len(q)):
            for head, kept in enumerate(heads):
                kept.append(Kept(self.tokens + t, k[t, head], v[t, head]))
                queries = q[t].view(Hkv, -1, D)[head]
                first = head * len(queries)
                mixed[t, first : first + len(queries)] = self._attend(queries, kept)
        for kept in heads:
            gone = {row.position for row in self._drop(kept)}
            kept[:] = [row for row in kept if row.position not in gone]
        return mixed.flatten(1)

    def _attend(self, queries: torch.Tensor, kept: list[Kept]) -> torch.Tensor:
        """Output [G, D] of the newest token's ``queries`` [G, D]; scores grow by what they give."""
        positions = torch.tensor([row.position for row in kept])
        if self._count_slots:
            positions = positions.argsort().argsort()
        keys = rotate(
            torch.stack([row.key for row in kept]), self.decoder.rotary(0).angles(positions)
        )
        newest = self.decoder.rotary(0).angles(positions[-1:].expand(len(queries)))
        logits = rotate(queries, newest).double() @ keys.double().T * self.decoder.softmax_scale
        attention = logits.exp() / logits.exp().sum(1, keepdim=True)
        for row, received in zip(kept, attention.mean(0), strict=True):
            row.score += float(received)
        return (attention @ torch.stack([row.value for row in kept]).double()).float()

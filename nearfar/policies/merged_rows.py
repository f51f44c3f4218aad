"""Rows of a layer's KV heads, some of which replace several others."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class MergedRows:
    """Rows of KV heads, some of them merged of others."""

    rows: Tensor  # [Hkv, n, 2 D]
    scores: Tensor  # [Hkv, n] float32
    positions: Tensor  # [Hkv, n] int64; of merged rows their mean

    def join(self, other: MergedRows) -> MergedRows:
        """Those of both."""
        return MergedRows(
            torch.cat([self.rows, other.rows], 1),
            torch.cat([self.scores, other.scores], 1),
            torch.cat([self.positions, other.positions], 1),
        )

    def span(self, start: int, stop: int) -> MergedRows:
        """Some of them."""
        return MergedRows(
            self.rows[:, start:stop], self.scores[:, start:stop], self.positions[:, start:stop]
        )

    def pick(self, slots: Tensor) -> MergedRows:
        """Those of ``slots`` [Hkv, m]."""
        heads = torch.arange(len(slots), device=slots.device)[:, None]
        rows = self.rows[heads, slots]  # `gather` would want an index of every number
        return MergedRows(rows, self.scores.gather(1, slots), self.positions.gather(1, slots))

    def widened(self) -> MergedRows:
        """The same in float32."""
        return MergedRows(self.rows.float(), self.scores, self.positions)

    def detached(self) -> MergedRows:
        """The same without a gradient."""
        return MergedRows(self.rows.detach(), self.scores, self.positions)

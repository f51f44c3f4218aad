"""What is left near of a prompt where heads keep different numbers of tokens.

Rows of all heads lie end to end, so that a head holds memory for no more than it keeps. They never
change: a ragged policy acts once, and what comes later is near as under any other policy.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch

from nearfar.records import FarView, Selection
from nearfar.runtime.memory.near_store import NearLayer


@dataclass(frozen=True)
class RaggedRows:
    """Kept keys and values of one layer."""

    rows: torch.Tensor  # [M, 2 D]: those of head 0, then of head 1, ...
    positions: torch.Tensor  # [M] int64
    offsets: tuple[int, ...]  # [Hkv + 1]: head h has rows offsets[h] to offsets[h + 1]
    group: int  # G
    number: int = field(default_factory=itertools.count().__next__)  # told apart by it

    @property
    def heads(self) -> list[torch.Tensor]:
        """Rows [M_h, 2 D] of each KV head."""
        return [self.rows[start:stop] for start, stop in itertools.pairwise(self.offsets)]

    @property
    def head_positions(self) -> list[torch.Tensor]:
        """Positions [M_h] of each KV head."""
        return [self.positions[start:stop] for start, stop in itertools.pairwise(self.offsets)]

    def view(self) -> FarView:
        """All rows, for a CPU kernel, as if they were of one head."""
        return FarView(self.rows[None], len(self.rows))

    @cached_property
    def selection(self) -> Selection:
        """Which rows of `view` each KV head reads: its own, all of them."""
        M = len(self.rows)
        offsets = np.array(self.offsets, np.int64)
        return Selection(np.arange(M, dtype=np.int32), offsets, np.zeros(M, np.float32), self.group)


def ragged_rows(
    rows: torch.Tensor, positions: torch.Tensor, kept: torch.Tensor, group: int
) -> RaggedRows:
    """Those of ``rows`` [Hkv, N, 2 D] that the mask ``kept`` [Hkv, N] keeps, copied."""
    offsets = itertools.accumulate(kept.sum(1).tolist(), initial=0)
    return RaggedRows(rows[kept], positions[kept], tuple(offsets), group)


def as_layer(ragged: RaggedRows | None, near: NearLayer) -> NearLayer:
    """``ragged`` rows and then those ``near`` in one layer; short heads end at position -1."""
    if ragged is None:
        return near
    assert near.positions is not None
    rows, positions = [], []
    longest = max(stop - start for start, stop in itertools.pairwise(ragged.offsets))
    for head, own in enumerate(ragged.heads):
        missing = longest - len(own)
        later = near.rows[head, : near.length]
        rows.append(torch.cat([own, later, own.new_zeros(missing, own.shape[1])]))
        own_positions = ragged.head_positions[head]
        ends = (own_positions, near.positions[head, : near.length])
        positions.append(torch.cat([*ends, own_positions.new_full((missing,), -1)]))
    return NearLayer(torch.stack(rows), longest + near.length, torch.stack(positions))

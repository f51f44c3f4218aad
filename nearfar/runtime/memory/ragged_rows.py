"""Near (GPU) rows of a prompt under a policy whose heads keep different numbers of tokens.

The rows of all heads are end to end in memory, so that a head takes memory only for the rows that
it keeps. They never change: a ragged policy evicts once, and later tokens are ordinary near rows.
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

    rows: torch.Tensor  # [M, 2 D]: the rows of head 0, then of head 1, ...
    positions: torch.Tensor  # [M] int64
    offsets: tuple[int, ...]  # [Hkv + 1]: head h has rows offsets[h] to offsets[h + 1]
    group: int  # G
    number: int = field(default_factory=itertools.count().__next__)  # identifies the object

    @property
    def heads(self) -> list[torch.Tensor]:
        """Rows [M_h, 2 D] of each KV head."""
        return [self.rows[start:stop] for start, stop in itertools.pairwise(self.offsets)]

    @property
    def head_positions(self) -> list[torch.Tensor]:
        """Positions [M_h] of each KV head."""
        return [self.positions[start:stop] for start, stop in itertools.pairwise(self.offsets)]

    def view(self) -> FarView:
        """All rows, as if of one head, for a CPU kernel."""
        return FarView(self.rows[None], len(self.rows))

    @cached_property
    def selection(self) -> Selection:
        """The rows of `view` that each KV head reads: all of its own."""
        M = len(self.rows)
        offsets = np.array(self.offsets, np.int64)
        return Selection(np.arange(M, dtype=np.int32), offsets, np.zeros(M, np.float32), self.group)


def ragged_rows(
    rows: torch.Tensor, positions: torch.Tensor, kept: torch.Tensor, group: int
) -> RaggedRows:
    """A copy of the ``rows`` [Hkv, N, 2 D] that the mask ``kept`` [Hkv, N] selects."""
    offsets = itertools.accumulate(kept.sum(1).tolist(), initial=0)
    return RaggedRows(rows[kept], positions[kept], tuple(offsets), group)


def as_layer(ragged: RaggedRows | None, near: NearLayer) -> NearLayer:
    """The ``ragged`` rows, then the ``near`` rows, in one layer; short heads end at position -1."""
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

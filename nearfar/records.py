"""Records that travel between rooms, each defined once.

Axes have one name everywhere: B sequences, Hq query heads, Hkv KV heads, G = Hq / Hkv query heads
of a KV group, T query tokens, N keys, D head dimension, M selected keys. Queries arrive multiplied
by the softmax scale, so a logit is the plain dot product of query and key.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from nearfar.storage import decode_keys, decode_values, gather, head_dim_of


class Partial(NamedTuple):
    """Attention over one set of keys, mergeable with that over any disjoint set.

    ``out`` is [..., Hq, D] float32, ``lse`` [..., Hq] float32: the natural logarithm of the sum of
    exp(logit). Over an empty set ``out`` is 0 and ``lse`` is -inf.
    """

    out: torch.Tensor
    lse: torch.Tensor


@dataclass(frozen=True)
class Selection:
    """Far keys to read in one layer of one sequence, ragged over rows.

    A row serves ``heads_per_row`` consecutive query heads: G where a KV group shares its keys, 1
    where every query head has its own. Row r reads ``indices[offsets[r]:offsets[r + 1]]``; key i
    enters the softmax with logit + ``log_weights[i]``, which is -log(probability of being read).
    """

    indices: NDArray[np.int32]  # [M]
    offsets: NDArray[np.int64]  # [rows + 1]
    log_weights: NDArray[np.float32]  # [M]
    heads_per_row: int
    estimate: Partial | None = None  # attention over keys that are not read, to be merged in


class DrawnKeys(NamedTuple):
    """A selection made in near memory: R rows of heads that select together.

    Far keys are in segments of a fixed size. ``chosen`` [R, segments, size] int64 has the drawn
    indices that the host reads, ascending from the front of each segment: the index in the low
    half, the bits of the float32 log-weight in the high half. ``counts`` [R, segments, 2] int32 are
    their number and that of the other drawn indices. Both are in memory that both processors can
    read.

    The GPU fetches the others itself: they are the last of their segments, in ``fetched`` [R,
    segments, room] int64 and ``fetched_counts`` [R, segments] int32, which are near. It can read
    the first ``readable_tokens`` [B] int32 far rows, and fetches ``gpu_share`` [B] int32 in 256 of
    the keys drawn there, as far as there is room.
    """

    chosen: torch.Tensor
    counts: torch.Tensor
    fetched: torch.Tensor
    fetched_counts: torch.Tensor
    readable_tokens: torch.Tensor
    gpu_share: torch.Tensor


class Verification(NamedTuple):
    """The error estimates of a policy that makes them, over some steps.

    A selection is that of one KV group in one layer and step.
    """

    bound: float  # the largest estimated bound of a selection that was used; 0: all was read
    selections: int
    widened: int  # selections that read more than the budget
    exhausted: int  # of these, selections that read every far key
    missed_mass: float  # largest estimated share of a head's far mass that was not read


class AllOrNone(Enum):
    """Selections that need no list."""

    ALL = "all"
    NONE = "none"


ALL = AllOrNone.ALL
NONE = AllOrNone.NONE


@dataclass(frozen=True)
class FarView:
    """Read access to the far keys and values of one layer of one sequence.

    ``rows`` is [Hkv, capacity, width], C-contiguous, in a format of `nearfar.storage`: for each
    token its key and then its value, 2 D items unless they are packed. Only the first ``length``
    tokens of each head are meaningful.
    """

    rows: torch.Tensor
    length: int

    @property
    def head_dim(self) -> int:
        """D."""
        return head_dim_of(self.rows.dtype, self.rows.shape[2])

    def keys(self, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Keys [Hkv, stop - start, D]: the stored ones, not copied, or float32 decoded ones."""
        return decode_keys(self.rows, start, self.length if stop is None else stop)

    def values(self, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Values [Hkv, stop - start, D], as `keys` gives keys."""
        return decode_values(self.rows, start, self.length if stop is None else stop)

    def gather(self, head: int, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [M, D] float32 of the tokens ``indices`` [M] of a KV head."""
        keys, values = gather(self.rows[head], indices)
        return keys.float(), values.float()


@dataclass(frozen=True)
class Geometry:
    """The sizes that a policy and a store are built for."""

    layers: int
    query_heads: int  # Hq
    kv_heads: int  # Hkv
    head_dim: int  # D

    @property
    def group(self) -> int:
        """G: query heads that share a KV head."""
        return self.query_heads // self.kv_heads

"""Far (host) memory of one sequence: the rows of all layers, and the policy's index."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from nearfar.policies.index import FarIndex, Index, NearIndex
from nearfar.records import ALL, NONE, AllOrNone, FarView, Selection, Verification
from nearfar.runtime.memory.far_store import FarStore
from nearfar.storage import bytes_read


class SelectsFar(Protocol):
    """Selects far keys, as `nearfar.policies.index.FarIndex` does."""

    def select(
        self, layer: int, query: torch.Tensor, far: FarView, step: int
    ) -> Selection | AllOrNone:
        """The far keys that ``query`` [Hq, D] reads."""


@dataclass(frozen=True)
class FarMark:
    """A point to which far memory can return."""

    lengths: tuple[int, ...]  # far tokens of each layer
    index: Any


class FarMemory:
    """Far rows, their selection by a query, and counts of the rows read."""

    def __init__(self, store: FarStore, index: Index | None) -> None:
        self.store = store
        self.index = index  # None: the policy keeps nothing far
        self.tracer: SelectsFar | None = None  # replaces the index until a rewind
        self.rows_read = 0  # rows of one KV head, over all layers and steps
        self.groups_read = 0  # groups of those rows, in formats that store something per group

    @property
    def bytes_read(self) -> int:
        """Bytes of far rows that decode steps have read, all layers."""
        head_dim = self.store.geometry.head_dim
        return bytes_read(self.store.dtype, head_dim, self.rows_read, self.groups_read)

    @property
    def index_bytes(self) -> int:
        """Bytes of the policy's index."""
        return 0 if self.index is None else self.index.index_bytes()

    def announce(self, tokens: int, device: torch.device) -> None:
        """Reserve memory for ``tokens`` far tokens in all, which come from ``device``."""
        new = tokens - self.store.length(0)
        if self.index is not None and new > 0:
            self.index.reserve(tokens)
            self.store.announce(new, device)

    def add(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor, *, is_first: bool = True
    ) -> None:
        """Append tokens [Hkv, n, D] to the rows and the index of one layer.

        ``is_first`` marks the sequence's first prompt: an index on the GPU then takes the keys from
        the GPU while they are copied to the host.
        """
        if keys.shape[1] == 0:
            return
        self.store.append(layer, keys, values)
        if self.index is not None:
            if not (is_first and isinstance(self.index, NearIndex)):
                self.store.settle()
            self.index.extend(layer, self.store.view(layer), keys)

    def select(self, layer: int, query: torch.Tensor, step: int) -> Selection | AllOrNone:
        """The far keys that ``query`` [Hq, D] (float32, on the CPU, scaled) reads.

        ``step`` is the number of tokens that the sequence has read.
        """
        far = self.store.view(layer)
        if far.length == 0:
            return NONE
        assert self.index is not None
        if self.index.form() is None:  # it may read any row
            self.store.verify(layer, ALL)
        selects = self.tracer
        if selects is None:
            assert isinstance(self.index, FarIndex)
            selects = self.index
        selection = selects.select(layer, query, far, step)
        self.store.verify(layer, selection)
        return selection

    def pop_verification(self) -> Verification | None:
        """Errors since the last call, from a policy that estimates its own error."""
        return self.index.pop_verification() if isinstance(self.index, FarIndex) else None

    def mark(self) -> FarMark:
        """A point for `rewind`."""
        return FarMark(self.store.mark(), None if self.index is None else self.index.mark())

    def rewind(self, mark: FarMark) -> None:
        """Drop all rows since ``mark``, and any tracer."""
        self.tracer = None
        self.store.rewind(mark.lengths)
        if self.index is not None:
            self.index.rewind(mark.index)

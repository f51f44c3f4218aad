"""What is far of one sequence: the rows of all layers in host memory, and the policy's index."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from nearfar.policies.index import FarIndex, Index, NearIndex
from nearfar.records import ALL, NONE, AllOrNone, FarView, Selection, Verification
from nearfar.runtime.memory.far_store import FarStore
from nearfar.storage import bytes_read


class SelectsFar(Protocol):
    """What chooses far keys, as `nearfar.policies.index.FarIndex` does."""

    def select(
        self, layer: int, query: torch.Tensor, far: FarView, step: int
    ) -> Selection | AllOrNone:
        """Far keys that ``query`` [Hq, D] reads."""


@dataclass(frozen=True)
class FarMark:
    """A point to which far memory can return."""

    lengths: tuple[int, ...]  # far tokens of each layer
    index: Any


class FarMemory:
    """Far rows, which of them a query reads, and how many were read."""

    def __init__(self, store: FarStore, index: Index | None) -> None:
        self.store = store
        self.index = index  # None: the policy keeps nothing far
        self.tracer: SelectsFar | None = None  # selects in the index's place, until a rewind
        self.rows_read = 0  # rows of one KV head, over all layers and steps
        self.groups_read = 0  # and groups that they are in, where these have something stored

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
        """Make room for ``tokens`` far tokens in all, which come from ``device``."""
        new = tokens - self.store.length(0)
        if self.index is not None and new > 0:
            self.index.reserve(tokens)
            self.store.announce(new, device)

    def add(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor, *, is_first: bool = True
    ) -> None:
        """Put tokens [Hkv, n, D] of one layer behind those that are there, and into the index.

        With ``is_first``, they are of the sequence's first prompt: an index near takes their keys
        from near, while they are copied.
        """
        if keys.shape[1] == 0:
            return
        self.store.append(layer, keys, values)
        if self.index is not None:
            if not (is_first and isinstance(self.index, NearIndex)):
                self.store.settle()
            self.index.extend(layer, self.store.view(layer), keys)

    def select(self, layer: int, query: torch.Tensor, step: int) -> Selection | AllOrNone:
        """Far keys that ``query`` [Hq, D] float32 on the CPU, scaled, shall read.

        ``step`` is the number of tokens that the sequence has read.
        """
        far = self.store.view(layer)
        if far.length == 0:
            return NONE
        assert self.index is not None
        if self.index.form() is None:  # it may look at any row
            self.store.verify(layer, ALL)
        selects = self.tracer
        if selects is None:
            assert isinstance(self.index, FarIndex)
            selects = self.index
        selection = selects.select(layer, query, far, step)
        self.store.verify(layer, selection)
        return selection

    def pop_verification(self) -> Verification | None:
        """What a policy that estimates its own error found since the last call."""
        return self.index.pop_verification() if isinstance(self.index, FarIndex) else None

    def mark(self) -> FarMark:
        """A point for `rewind`."""
        return FarMark(self.store.mark(), None if self.index is None else self.index.mark())

    def rewind(self, mark: FarMark) -> None:
        """Forget what came since ``mark``, and any tracer."""
        self.tracer = None
        self.store.rewind(mark.lengths)
        if self.index is not None:
            self.index.rewind(mark.index)

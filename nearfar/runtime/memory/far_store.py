"""Keys and values in host memory: per layer and KV head, one row of K and V a token.

A format that stores tokens in groups takes and gives back whole groups only.

A layer reserves address space for the longest context once and touches it block by block as tokens
are appended. So rows never move, a growing context copies nothing, and untouched space takes no
memory. Appending past the reserve is the caller's error. Huge pages are advised: a decode step
reads rows at random, and on small pages nearly every read would miss the TLB.

The first tokens of every layer may come from a file that is mapped over the beginning of each
head's reserve (`SavedRows`). They are in the system's page cache and are not charged.
"""

from __future__ import annotations

import math
import mmap
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from nearfar.errors import OutOfMemoryError
from nearfar.records import ALL, AllOrNone, FarView, Geometry, Selection
from nearfar.runtime.memory.host_copy import HostCopies
from nearfar.runtime.memory.host_memory import reserve
from nearfar.runtime.memory.ledger import Ledger
from nearfar.runtime.memory.near_store import are_side_by_side
from nearfar.storage import (
    check_head_dim,
    decode_keys,
    decode_values,
    encode_rows,
    group_tokens,
    row_width,
    token_bytes,
)

BLOCK_TOKENS = 256  # size of the blocks in which memory is charged
ENCODE_TOKENS = 4096  # tokens encoded at a time, held in float32 meanwhile


class SavedRows(Protocol):
    """Rows of all layers in a file, in the form of a store."""

    tokens: int  # in every layer

    def lay_into(self, layer: int, memory: NDArray[np.uint8], head_bytes: int) -> None:
        """Map the rows of ``layer`` over the beginning of each head's part of ``memory``."""

    def verify(self, layer: int, selection: Selection | AllOrNone) -> None:
        """Raise if rows of ``selection`` differ from the rows that were written."""


class FarStore:
    """Far keys and values of one sequence, all layers."""

    def __init__(
        self,
        geometry: Geometry,
        dtype: torch.dtype,
        capacity_tokens: int,
        ledger: Ledger,
        saved: SavedRows | None = None,
    ) -> None:
        check_head_dim(dtype, geometry.head_dim)
        self.geometry = geometry
        self.dtype = dtype
        # heads start at page boundaries, so that a file can be mapped there
        row_bytes = token_bytes(dtype, geometry.head_dim)
        unit = math.lcm(BLOCK_TOKENS, mmap.PAGESIZE // math.gcd(mmap.PAGESIZE, row_bytes))
        self.capacity_tokens = -(-capacity_tokens // unit) * unit
        self._account = ledger.open_account()
        self._saved = saved
        saved_tokens = 0 if saved is None else saved.tokens
        self._lengths = [saved_tokens] * geometry.layers
        self._mapped_tokens = [-(-saved_tokens // BLOCK_TOKENS) * BLOCK_TOKENS] * geometry.layers
        self._charged_tokens = [0] * geometry.layers
        self._rows = [self._reserve(layer) for layer in range(geometry.layers)]
        self._copies: HostCopies | None = None  # from a GPU; made when first needed

    @property
    def token_bytes(self) -> int:
        """Bytes of one token in one layer."""
        return self.geometry.kv_heads * token_bytes(self.dtype, self.geometry.head_dim)

    @property
    def group_tokens(self) -> int:
        """Tokens of a group; the length of every layer is a multiple of it."""
        return group_tokens(self.dtype)

    @property
    def num_bytes(self) -> int:
        """Bytes of the blocks in use, all layers."""
        return sum(self._charged_tokens) * self.token_bytes + self.mapped_bytes

    @property
    def mapped_bytes(self) -> int:
        """Bytes of the blocks mapped from a file."""
        return sum(self._mapped_tokens) * self.token_bytes

    def length(self, layer: int) -> int:
        """Far tokens of ``layer``."""
        return self._lengths[layer]

    def view(self, layer: int) -> FarView:
        """Read access to ``layer`` as it is now."""
        return FarView(self._rows[layer], self._lengths[layer])

    def verify(self, layer: int, selection: Selection | AllOrNone) -> None:
        """Before a read: raise if rows of ``selection`` differ from the rows that were written.

        Only rows of a saved document can be damaged; each is checked once.
        """
        if self._saved is not None:
            self._saved.verify(layer, selection)

    def verify_all(self) -> None:
        """`verify` of all rows of all layers."""
        for layer in range(self.geometry.layers):
            self.verify(layer, ALL)

    def append(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Add tokens, ``keys`` and ``values`` [Hkv, n, D] at the end of ``layer``."""
        target = self._room(layer, keys.shape[1])
        if keys.is_cuda:
            self._copy(target, keys, values)
        else:
            for span in _spans(keys.shape[1]):
                target[:, span] = encode_rows(keys[:, span], values[:, span], self.dtype)
        self._lengths[layer] += keys.shape[1]

    def append_stored(self, layer: int, rows: torch.Tensor) -> None:
        """Add ``rows`` [Hkv, n, width] that come from a view of a store of the same format."""
        self._room(layer, rows.shape[1])[:] = rows
        self._lengths[layer] += rows.shape[1]

    def announce(self, tokens: int, device: torch.device) -> None:
        """Prepare every layer for ``tokens`` more tokens, which a GPU will copy there."""
        if device.type != "cuda" or self.capacity_tokens == 0:
            return
        copies = self._copies_from(device)
        for rows, start in zip(self._rows, self._lengths, strict=True):
            copies.announce(rows[:, start : min(start + tokens, self.capacity_tokens)])

    def bring(self, layer: int, target: torch.Tensor) -> None:
        """Copy the rows of ``layer``, decoded, to ``target`` [Hkv, length, 2 D] on any device."""
        stored = self._rows[layer][:, : self._lengths[layer]]
        if target.is_cuda:
            copies = self._copies_from(target.device)
            if target.dtype == self.dtype:
                copies.bring(target, stored)
                return
            near = torch.empty(stored.shape, dtype=self.dtype, device=target.device)
            copies.bring(near, stored)
            stored = near
        D = self.geometry.head_dim
        for span in _spans(stored.shape[1]):
            target[:, span, :D] = decode_keys(stored, span.start, span.stop)
            target[:, span, D:] = decode_values(stored, span.start, span.stop)

    def readable_tokens(self, device: torch.device) -> int:
        """How many of the first tokens of every layer kernels of ``device`` can read here."""
        if device.type != "cuda":
            return self._lengths[0]
        return 0 if self._copies is None else self._copies.readable_tokens(self._rows)

    def settle(self) -> None:
        """Wait until all copies from a GPU have ended."""
        if self._copies is not None:
            self._copies.settle()

    def mark(self) -> tuple[int, ...]:
        """A point for `rewind`."""
        return tuple(self._lengths)

    def rewind(self, mark: tuple[int, ...]) -> None:
        """Drop the tokens appended since ``mark``; later tokens reuse their blocks."""
        self._lengths = list(mark)

    def close(self) -> None:
        """Give the memory back to the ledger; the rows are freed with their last view."""
        self._account.hold(0)
        self._charged_tokens = [0] * self.geometry.layers
        self._mapped_tokens = [0] * self.geometry.layers
        if self._copies is not None:
            self._copies.close()
        self._rows = []

    def _room(self, layer: int, tokens: int) -> torch.Tensor:
        """The next rows [Hkv, tokens, width] of ``layer``, charged to the ledger."""
        assert tokens % self.group_tokens == 0, "a group is stored whole"
        start = self._lengths[layer]
        stop = start + tokens
        if stop > self.capacity_tokens:
            raise OutOfMemoryError(
                f"Far memory is reserved for {self.capacity_tokens} tokens a layer and token "
                f"{stop} came. Give a shorter text or generate fewer tokens."
            )
        self._charge(layer, stop)
        return self._rows[layer][:, start:stop]

    def _copy(self, target: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        copies = self._copies_from(keys.device)
        # one layer is copied at a time, otherwise the GPU would have to hold several
        copies.settle()
        if keys.dtype == self.dtype:
            copies.copy(target, side_by_side(keys, values))
            return
        rows = torch.empty(target.shape, dtype=self.dtype, device=keys.device)
        for span in _spans(keys.shape[1]):
            rows[:, span] = encode_rows(keys[:, span], values[:, span], self.dtype)
        copies.copy(target, rows)

    def _copies_from(self, device: torch.device) -> HostCopies:
        if self._copies is None:
            self._copies = HostCopies(device)
        return self._copies

    def _charge(self, layer: int, length: int) -> None:
        needed = -(-length // BLOCK_TOKENS) * BLOCK_TOKENS
        charged = needed - self._mapped_tokens[layer]
        new = charged - self._charged_tokens[layer]
        if new > 0:
            self._account.hold((sum(self._charged_tokens) + new) * self.token_bytes)
            self._charged_tokens[layer] = charged

    def _reserve(self, layer: int) -> torch.Tensor:
        Hkv, D = self.geometry.kv_heads, self.geometry.head_dim
        shape = (Hkv, self.capacity_tokens, row_width(self.dtype, D))
        num_bytes = self.token_bytes * self.capacity_tokens
        if num_bytes == 0:
            return torch.empty(shape, dtype=self.dtype)
        memory = reserve(num_bytes)
        if self._saved is not None:
            self._saved.lay_into(layer, memory, num_bytes // Hkv)
        return torch.from_numpy(memory).view(self.dtype).view(shape)


def _spans(tokens: int) -> list[slice]:
    return [
        slice(first, min(first + ENCODE_TOKENS, tokens))
        for first in range(0, tokens, ENCODE_TOKENS)
    ]


def side_by_side(keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Rows [Hkv, n, 2 D] of ``keys`` and ``values`` [Hkv, n, D]; not copied if they are views."""
    Hkv, n, D = keys.shape
    if are_side_by_side(keys, values):
        return keys.as_strided((Hkv, n, 2 * D), (keys.stride(0), 2 * D, 1))
    return torch.cat([keys, values], -1)

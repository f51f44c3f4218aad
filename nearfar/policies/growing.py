"""Indexes that grow in whole blocks of consecutive far keys, and shrink to a mark."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nearfar.policies.index import FarIndex
from nearfar.records import Geometry

SELECTING_BYTES = 2**18  # what is selected, beside what grows with the keys
PIECE_KEYS = 4096  # far keys that are decoded and summarised together: a matter of memory alone
DTYPES = {torch.float32: np.float32, torch.int32: np.int32}


class GrowingBlocks:
    """Named arrays [Hkv, blocks, ...] of one layer; the first ``length`` blocks are in use.

    A block in use never changes, so a mark is a number.
    """

    def __init__(self, kv_heads: int, shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]):
        self._shapes = dict(shapes)
        self._arrays = {
            name: torch.empty((kv_heads, 0, *shape), dtype=dtype)
            for name, (dtype, shape) in shapes.items()
        }
        self.length = 0

    def __getitem__(self, name: str) -> torch.Tensor:
        """The blocks [Hkv, length, ...] in use, not copied."""
        return self._arrays[name][:, : self.length]

    @property
    def num_bytes(self) -> int:
        """Of all arrays, reserves included."""
        return sum(array.nbytes for array in self._arrays.values())

    def reserve(self, blocks: int) -> None:
        """Make room for exactly ``count`` blocks, if there is less."""
        grown = {}
        for name, old in self._arrays.items():
            grown[name] = old
            if blocks > old.shape[1]:
                grown[name] = old.new_empty(old.shape[0], blocks, *old.shape[2:])
                grown[name][:, : self.length] = old[:, : self.length]
        self._arrays = grown  # all at once: growing may be interrupted

    def make_room(self, count: int) -> None:
        """Make room for ``count`` more blocks at least."""
        there = next(iter(self._arrays.values())).shape[1]
        if self.length + count > there:
            # growing by an eighth keeps copying below one block in eight
            self.reserve(max(self.length + count, there + there // 8))

    def append(self, blocks: Mapping[str, torch.Tensor]) -> None:
        """Add ``blocks`` [Hkv, n, ...] of every array."""
        count = next(iter(blocks.values())).shape[1]
        self.make_room(count)
        for name, array in self._arrays.items():
            array[:, self.length : self.length + count] = blocks[name]
        self.length += count

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The blocks in use, to be saved."""
        return {name: self[name].contiguous().numpy() for name in self._arrays}

    def restore(self, arrays: Mapping[str, NDArray[Any]], blocks: int) -> None:
        """Restore what `arrays` returned; ValueError if an array has another type or shape."""
        for name, (dtype, shape) in self._shapes.items():
            kv_heads = self._arrays[name].shape[0]
            array = arrays[name]
            if array.shape != (kv_heads, blocks, *shape) or array.dtype != DTYPES[dtype]:
                raise ValueError(
                    f"{name!r} of the index does not have the {blocks} blocks of its keys"
                )
            self._arrays[name] = torch.from_numpy(array)
        self.length = blocks


class GrowingIndex(FarIndex):
    """An index of blocks of ``block_keys`` consecutive far keys in every layer, and its marks."""

    def __init__(
        self,
        geometry: Geometry,
        block_keys: int,
        shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    ) -> None:
        self._geometry, self._block_keys = geometry, block_keys
        self._layers = [GrowingBlocks(geometry.kv_heads, shapes) for _ in range(geometry.layers)]
        self._num_keys = [0] * geometry.layers

    def new_spans(self, layer: int, num_keys: int) -> Iterator[tuple[int, int]]:
        """First and last far key of the blocks of ``layer`` that are full now, piece by piece."""
        size, blocks = self._block_keys, self._layers[layer]
        self._num_keys[layer] = num_keys
        start, stop = blocks.length * size, num_keys // size * size
        blocks.make_room((stop - start) // size)
        step = max(1, PIECE_KEYS // size) * size
        for first in range(start, stop, step):
            yield first, min(first + step, stop)

    def reserve(self, tokens: int) -> None:
        """Make room in every layer."""
        for layer in self._layers:
            layer.reserve(tokens // self._block_keys)

    def mark(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Numbers of blocks and of keys."""
        return tuple(layer.length for layer in self._layers), tuple(self._num_keys)

    def rewind(self, mark: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
        """Take back those of ``mark``."""
        for layer, length in zip(self._layers, mark[0], strict=True):
            layer.length = length
        self._num_keys = list(mark[1])

    def index_bytes(self) -> int:
        """Bytes of all arrays."""
        return sum(layer.num_bytes for layer in self._layers)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Arrays of all layers, and how many far keys each has seen."""
        layers = enumerate(self._layers)
        found = {f"{i}.{n}": a for i, layer in layers for n, a in layer.arrays().items()}
        return {**found, "num_keys": np.array(self._num_keys, np.int32)}

    def restore(self, arrays: Mapping[str, NDArray[Any]], num_keys: int) -> None:
        """Checks types and shapes; subclasses check numbers."""
        counts = arrays["num_keys"]
        if counts.dtype != np.int32 or counts.tolist() != [num_keys] * len(self._layers):
            raise ValueError(f"the index is not of {num_keys} keys in every layer")
        for i, layer in enumerate(self._layers):
            own = {n.removeprefix(f"{i}."): a for n, a in arrays.items() if n.startswith(f"{i}.")}
            layer.restore(own, num_keys // self._block_keys)
        self._num_keys = [num_keys] * len(self._layers)

"""Arrays of an index that grow in whole blocks of consecutive far keys, and shrink to a mark."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

DTYPES = {torch.float32: np.float32, torch.int32: np.int32}


class GrowingBlocks:
    """Named arrays [Hkv, blocks, ...] of one layer; the first ``length`` blocks are there.

    A block is never changed once it is there, so that a mark is a number.
    """

    def __init__(self, kv_heads: int, shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]):
        self._shapes = dict(shapes)
        self._arrays = {
            name: torch.empty((kv_heads, 0, *shape), dtype=dtype)
            for name, (dtype, shape) in shapes.items()
        }
        self.length = 0

    def __getitem__(self, name: str) -> torch.Tensor:
        """The blocks [Hkv, length, ...] that are there, not copied."""
        return self._arrays[name][:, : self.length]

    @property
    def num_bytes(self) -> int:
        """Of all arrays, with what is set aside."""
        return sum(array.nbytes for array in self._arrays.values())

    def reserve(self, blocks: int) -> None:
        """Make room for exactly so many blocks, if there is less."""
        for name, old in self._arrays.items():
            if blocks > old.shape[1]:
                new = old.new_empty(old.shape[0], blocks, *old.shape[2:])
                new[:, : self.length] = old[:, : self.length]
                self._arrays[name] = new

    def append(self, blocks: Mapping[str, torch.Tensor]) -> None:
        """Add ``blocks`` [Hkv, n, ...] of every array."""
        count = next(iter(blocks.values())).shape[1]
        there = next(iter(self._arrays.values())).shape[1]
        if self.length + count > there:
            # growing by an eighth keeps copying below one block in eight
            self.reserve(max(self.length + count, there + there // 8))
        for name, array in self._arrays.items():
            array[:, self.length : self.length + count] = blocks[name]
        self.length += count

    def arrays(self) -> dict[str, NDArray[Any]]:
        """What is there, to be saved."""
        return {name: self[name].contiguous().numpy() for name in self._arrays}

    def take(self, arrays: Mapping[str, NDArray[Any]], blocks: int) -> None:
        """Become what `arrays` gave; ValueError where an array is not of its type and shape."""
        for name, (dtype, shape) in self._shapes.items():
            kv_heads = self._arrays[name].shape[0]
            array = arrays[name]
            if array.shape != (kv_heads, blocks, *shape) or array.dtype != DTYPES[dtype]:
                raise ValueError(f"the index has not the {blocks} blocks of {name!r} of its keys")
            self._arrays[name] = torch.from_numpy(array)
        self.length = blocks


def layers_as_arrays(layers: list[GrowingBlocks], num_keys: list[int]) -> dict[str, NDArray[Any]]:
    """Arrays of all layers, and how many far keys each has seen."""
    found = {f"{i}.{n}": a for i, layer in enumerate(layers) for n, a in layer.arrays().items()}
    return {**found, "num_keys": np.array(num_keys, np.int32)}


def take_layers(
    layers: list[GrowingBlocks],
    arrays: Mapping[str, NDArray[Any]],
    num_keys: int,
    block_keys: int,
) -> None:
    """Give ``layers`` what `layers_as_arrays` made of ``num_keys`` keys in blocks."""
    counts = arrays["num_keys"]
    if counts.dtype != np.int32 or counts.tolist() != [num_keys] * len(layers):
        raise ValueError(f"the index is not of {num_keys} keys in every layer")
    for i, layer in enumerate(layers):
        own = {n.removeprefix(f"{i}."): a for n, a in arrays.items() if n.startswith(f"{i}.")}
        layer.take(own, num_keys // block_keys)

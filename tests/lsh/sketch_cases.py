"""Far keys, queries and sketches that the tests of `nearfar.lsh.sketch` share."""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray

from nearfar.cpu_kernels.sketch_reference import read_levels
from nearfar.lsh.sketch import LayerSketch
from nearfar.records import FarView

Array = NDArray[Any]
BITS = [1, 2, 3, 4]


def make_far(
    N: int, D: int = 33, Hkv: int = 2, dtype: torch.dtype = torch.float32, offset: float = 2.0
) -> FarView:
    """Far keys around a mean of their own; what lies beyond them is NaN."""
    generator = torch.Generator().manual_seed(D)
    rows = torch.full((Hkv, N + 70, 2 * D), torch.nan)
    centre = offset * torch.randn(Hkv, 1, D, generator=generator)
    # token by token, so that the first keys are the same whatever their number
    keys = torch.stack([torch.randn(Hkv, D, generator=generator) for _ in range(N)], 1)
    rows[:, :N, :D] = keys + centre
    return FarView(rows.to(dtype), N)


def first(far: FarView, length: int) -> FarView:
    return FarView(far.rows, length)


def make_query(heads: int, D: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(heads, D, generator=torch.Generator().manual_seed(seed))


def sketched(far: FarView, bits: int, *lengths: int) -> LayerSketch:
    layer = LayerSketch(far.rows.shape[0], far.head_dim, bits)
    for length in lengths or (far.length,):
        layer.extend(first(far, length))
    return layer


def scores_of(layer: LayerSketch, query: torch.Tensor) -> Array:
    return layer.scores(query)


def levels_of(layer: LayerSketch, D: int) -> Array:
    """Levels [Hkv, length, D] of what is in the sketch."""
    return read_levels(layer.mark().codes.words, layer.bits, D)[:, : layer.length]

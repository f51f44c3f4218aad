from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from kernel_cases import close, poisoned, random
from test_coded_keys import SHAPES, Pair, rotation

from nearfar.gpu_kernels.rotated_query_planes import (
    plane_shape,
    quantise_queries,
    turn_queries_reference,
)


def turned(turn: Callable[..., None], query: torch.Tensor, D: int, bits: int, Hkv: int) -> Pair:
    B, Hq, _ = query.shape
    planes = poisoned(B, Hkv, *plane_shape(D, bits, Hq // Hkv), dtype=torch.int8)
    sums = poisoned(B, Hq, 2)
    turn(query, rotation(D), bits, planes, sums)
    return planes, sums


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize(("G", "Hkv", "D"), SHAPES)
def test_rotated_query_planes(bits: int, G: int, Hkv: int, D: int) -> None:
    query = random(2, Hkv * G, D) * 40
    query[0, 0] = 0.0
    got, got_sums = turned(quantise_queries, query, D, bits, Hkv)
    want, want_sums = turned(turn_queries_reference, query, D, bits, Hkv)

    def coordinates(planes: torch.Tensor) -> torch.Tensor:
        halves = planes.int().unflatten(3, (-1, 2))  # type: ignore[no-untyped-call]
        steps: torch.Tensor = halves[..., 0, :] * 256 + halves[..., 1, :]
        return steps.flip(2).cumsum(2)

    assert (coordinates(got) - coordinates(want)).abs().max() <= 1
    close(got_sums, want_sums, rtol=1e-5, atol=64)

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from kernel_cases import COMPILED, DEVICE, close, poisoned, random

from nearfar.gpu_kernels.coded_keys import (
    ALIGNED_KEYS,
    bytes_per_key,
    write_codes,
    write_codes_reference,
)
from nearfar.lsh import rotation as rotations
from nearfar.lsh.sketch import LEVEL_WIDTH

SHAPES = ((1, 2, 64), (3, 1, 80), (2, 2, 128), (5, 1, 256))  # G, Hkv, D


def rotation(D: int) -> torch.Tensor:
    return rotations.rotation(D).to(DEVICE).contiguous()


Pair = tuple[torch.Tensor, torch.Tensor]


def encoded(
    write: Callable[..., None],
    keys: torch.Tensor,
    bits: int,
    first: int = 0,
    capacity: int = ALIGNED_KEYS,
) -> Pair:
    Hkv, _, D = keys.shape
    codes = torch.full((Hkv, capacity, bytes_per_key(D, bits)), 77, dtype=torch.uint8)
    codes, factors = codes.to(DEVICE), poisoned(Hkv, capacity, dtype=torch.float16)
    mean = keys.float().mean(1) * 0.5
    write(keys, mean, rotation(D), bits, LEVEL_WIDTH[bits], first, codes, factors)
    return codes, factors


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize(("G", "Hkv", "D"), SHAPES)
def test_codes_and_factors(bits: int, G: int, Hkv: int, D: int) -> None:
    n, first = 70, 5
    keys = random(Hkv, n, D)
    keys[0, 3] = keys[0].mean(0) * 0.5  # less the mean, nothing is left
    codes, factors = encoded(write_codes, keys, bits, first)
    want_codes, want_factors = encoded(write_codes_reference, keys, bits, first)
    assert codes[:, :first].eq(77).all()
    assert codes[:, first + n :].eq(77).all()
    # a number on the border of two levels may fall to either side
    assert (codes != want_codes).float().mean() < (0.02 if COMPILED else 0.002)
    close(factors, want_factors, equal_nan=True, rtol=5e-2 if COMPILED else 1e-3, atol=1e-6)

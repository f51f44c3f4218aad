from __future__ import annotations

import pytest
import torch
from kernel_cases import DEVICE, HEADS, TYPES, close, integers, poisoned, random, tolerance

from nearfar.gpu_kernels.place_tokens import place_tokens, place_tokens_reference
from nearfar.gpu_kernels.rows import RowTable
from nearfar.runtime.models.rope import RopeConfig, Rotary


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(("Hq", "Hkv", "D"), HEADS)
@pytest.mark.parametrize("normed", [False, True])
def test_tokens_of_several_sequences(
    Hq: int, Hkv: int, D: int, dtype: torch.dtype, normed: bool
) -> None:
    T = 3
    qkv = random(T, (Hq + 2 * Hkv) * D, dtype=dtype)
    angles = Rotary(RopeConfig(10_000.0), D, DEVICE).angles(
        torch.tensor([0, 7, 131_071], device=DEVICE)
    )
    norms = (random(D, dtype=dtype), random(D, dtype=dtype, seed=1)) if normed else None
    results = []
    for place in (place_tokens, place_tokens_reference):
        rows = RowTable.of([poisoned(Hkv, n, 2 * D, dtype=dtype) for n in (4, 9, 5)])
        query = poisoned(T, Hq, D, dtype=dtype)
        asked, told = poisoned(T, Hq, D), poisoned(T, Hq, D)
        slots = integers(3, 0, 2)
        place(qkv, angles, norms, 1e-5, rows, slots, query, 0.25, asked, told)
        results.append((query, asked, told, *rows.tensors))
    for got, want in zip(*results, strict=True):
        close(got, want, equal_nan=True, **tolerance(dtype))


def test_tokens_of_one_sequence_and_no_copies() -> None:
    T, Hq, Hkv, D = 5, 4, 2, 16
    qkv = random(T, (Hq + 2 * Hkv) * D)
    angles = Rotary(RopeConfig(100.0), D, DEVICE).angles(torch.arange(T, device=DEVICE))
    slots = torch.arange(2, 2 + T, dtype=torch.int32, device=DEVICE)
    results = []
    for place in (place_tokens, place_tokens_reference):
        rows = RowTable.of([poisoned(Hkv, 8, 2 * D)])
        query = poisoned(T, Hq, D)
        place(qkv, angles, None, 0.0, rows, slots, query, 1.0)
        results.append((query, rows.tensors[0]))
    for got, want in zip(*results, strict=True):
        close(got, want, equal_nan=True, rtol=1e-5, atol=1e-5)

from __future__ import annotations

import pytest
import torch
from kernel_cases import DEVICE, HEADS, TYPES, close, poisoned, random, tolerance

from nearfar.gpu_kernels.prefill_attention import attend_prompt, attend_prompt_reference


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(("Hq", "Hkv", "D"), HEADS)
@pytest.mark.parametrize(("T", "N", "causal"), [(70, 70, True), (33, 101, True), (40, 30, False)])
def test_prompts_equal_the_reference(
    Hq: int, Hkv: int, D: int, T: int, N: int, causal: bool, dtype: torch.dtype
) -> None:
    queries = random(T, Hq, D, dtype=dtype).transpose(0, 1)  # as projections lie
    rows = random(Hkv, N, 2 * D, dtype=dtype)
    keys, values = rows[..., :D], rows[..., D:]
    results = []
    for attend in (attend_prompt, attend_prompt_reference):
        out, lse = poisoned(T, Hq, D, dtype=dtype).transpose(0, 1), poisoned(Hq, T)
        attend(queries, keys, values, D**-0.5, out, lse, causal=causal)
        results.append((out, lse))
    for got, want in zip(*results, strict=True):
        close(got, want, **tolerance(dtype))


def test_one_token_and_large_logits() -> None:
    queries, keys = random(2, 1, 64) * 30, random(1, 9, 64) * 10
    values = random(1, 9, 64, seed=4)
    results = []
    for attend in (attend_prompt, attend_prompt_reference):
        out, lse = poisoned(2, 1, 64), poisoned(2, 1)
        attend(queries, keys, values, 1.0, out, lse)
        results.append((out, lse))
    for got, want in zip(*results, strict=True):
        close(got, want, rtol=1e-4, atol=1e-4)


def test_memory_beyond_the_arrays_is_not_read() -> None:
    whole = torch.full((1, 90, 32), torch.nan, device=DEVICE)
    whole[:, :50] = random(1, 50, 32)
    out, lse = poisoned(1, 50, 32), poisoned(1, 50)
    attend_prompt(whole[:, :50], whole[:, :50], whole[:, :50], 0.2, out, lse)
    assert out.isfinite().all()
    assert lse.isfinite().all()

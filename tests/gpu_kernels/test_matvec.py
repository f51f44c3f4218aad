from __future__ import annotations

import pytest
import torch
from kernel_cases import TYPES, close, poisoned, random, tolerance

from nearfar.gpu_kernels.matvec import matvec, matvec_reference, silu_gate, silu_gate_reference


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(("K", "N"), [(75, 37), (16, 8), (2500, 3)])
@pytest.mark.parametrize("form", ["plain", "bias", "norm", "gated", "all", "add"])
def test_products_equal_the_reference(dtype: torch.dtype, K: int, N: int, form: str) -> None:
    gated, add = form in ("gated", "all"), form in ("add", "all")
    weight = random((1 + gated) * N, K, dtype=dtype) * K**-0.5
    bias = random((1 + gated) * N, dtype=dtype) if form in ("bias", "all") else None
    norm = random(K, dtype=dtype, seed=3) if form in ("norm", "all") else None
    x = random(1, K, dtype=dtype, seed=1)
    got = random(1, N, dtype=dtype, seed=2) if add else poisoned(1, N, dtype=dtype)
    want = got.clone()
    matvec(x, weight, bias, got, norm=norm, eps=1e-5, gated=gated, add=add)
    matvec_reference(x, weight, bias, want, norm=norm, eps=1e-5, gated=gated, add=add)
    close(got, want, **tolerance(dtype))


def test_a_result_in_another_type() -> None:
    x, weight = random(1, 40, dtype=torch.float16), random(9, 40, dtype=torch.float16)
    got, want = poisoned(1, 9), poisoned(1, 9)
    matvec(x, weight, None, got)
    matvec_reference(x, weight, None, want)
    close(got, want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_silu_gate(dtype: torch.dtype) -> None:
    gate_up = random(5, 2 * 37, dtype=dtype)
    out, wanted = torch.empty(
        2, len(gate_up), gate_up.shape[1] // 2, dtype=dtype, device=gate_up.device
    )
    silu_gate(gate_up, out)
    silu_gate_reference(gate_up, wanted)
    close(out, wanted, **tolerance(dtype))

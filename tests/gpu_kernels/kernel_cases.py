"""What the tests of GPU kernels share: the device, poisoned memory, odd shapes.

Without a GPU kernels run in Triton's interpreter; `make test-gpu` runs the same tests compiled.
"""

from __future__ import annotations

import os
from typing import Any

import torch

DEVICE = torch.device(os.environ.get("NEARFAR_TEST_DEVICE", "cpu"))
COMPILED = DEVICE.type == "cuda"
# interpreted products of bfloat16 are wrong, so that type is for the GPU
TYPES = (
    (torch.float32, torch.float16, torch.bfloat16) if COMPILED else (torch.float32, torch.float16)
)
HEADS = ((4, 4, 64), (6, 2, 80), (3, 1, 96), (4, 1, 128), (2, 1, 256))  # Hq, Hkv, D


def close(got: Any, want: Any, **options: Any) -> None:
    """assert_close, whatever device the two are on."""
    torch.testing.assert_close(got, want, check_device=False, **options)


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    """Of results whose inputs are of ``dtype`` and whose sums are float32."""
    error = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    return {"rtol": error, "atol": error}


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Normal numbers on the device, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def poisoned(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """NaN, or the largest integer: what a kernel leaves unwritten shows."""
    if dtype.is_floating_point:
        return torch.full(shape, torch.nan, dtype=dtype, device=DEVICE)
    return torch.full(shape, torch.iinfo(dtype).max, dtype=dtype, device=DEVICE)


def integers(*values: int) -> torch.Tensor:
    """[n] int32."""
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def rows_of(
    length: int, capacity: int, Hkv: int, D: int, dtype: torch.dtype, seed: int = 0
) -> torch.Tensor:
    """Rows [Hkv, capacity, 2 D], NaN beyond ``length``."""
    rows = poisoned(Hkv, capacity, 2 * D, dtype=dtype)
    rows[:, :length] = random(Hkv, length, 2 * D, dtype=dtype, seed=seed)
    return rows

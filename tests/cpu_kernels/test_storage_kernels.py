"""Rows travel as bit patterns: not copied, and widened exactly."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nearfar.cpu_kernels.storage import BFLOAT16, FLOAT16, FLOAT32, row_bits, widen

EVERY_16_BITS = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
PATTERNS = torch.from_numpy(
    np.random.default_rng(0).integers(0, 2**32, 20_001, np.uint32).view("i4")
)


@pytest.mark.parametrize(
    ("dtype", "code", "item"),
    [(torch.float32, FLOAT32, 4), (torch.bfloat16, BFLOAT16, 2), (torch.float16, FLOAT16, 2)],
)
def test_bits_are_a_view_of_the_rows(dtype: torch.dtype, code: int, item: int) -> None:
    rows = torch.zeros(2, 3, 10, dtype=dtype)
    bits, storage = row_bits(rows)
    assert storage == code
    assert bits.shape == (2, 3, 10)
    assert bits.dtype == np.dtype(f"u{item}")
    rows[1, 2, 9] = -1
    assert bits[1, 2, 9] >> (8 * item - 1) == 1
    assert not bits[:, :2].any()
    assert bits.ctypes.data == rows.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("how", ["compiled", "interpreted"])
def test_every_number_is_widened_exactly(dtype: torch.dtype, how: str) -> None:
    """Subnormal numbers and signed zeros too; infinities and NaN where a shift keeps them."""
    rows = (PATTERNS if dtype == torch.float32 else EVERY_16_BITS).view(dtype)
    if dtype == torch.float16:
        rows = rows[torch.isfinite(rows)]
    bits, storage = row_bits(rows[None])
    wide = np.full(len(rows), 0xFFFFFFFF, np.uint32)
    function = widen if how == "compiled" else widen.py_func
    function(bits[0], storage, wide, wide.view(np.float32))
    want = rows.float().numpy()
    finite = np.isfinite(want)
    assert finite.sum() > 10_000
    np.testing.assert_array_equal(wide[finite], want.view(np.uint32)[finite])
    np.testing.assert_array_equal(wide.view(np.float32), want)


@pytest.mark.parametrize("D", [1, 7, 16, 33])
def test_short_and_odd_rows(D: int) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        rows = torch.randn(3, D, generator=torch.Generator().manual_seed(D)).to(dtype)
        bits, storage = row_bits(rows)
        wide = np.empty(D, np.uint32)
        widen(bits[1], storage, wide, wide.view(np.float32))
        np.testing.assert_array_equal(wide.view(np.float32), rows[1].float().numpy())

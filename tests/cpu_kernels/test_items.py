"""Rows reach kernels without a copy, and every stored number is widened exactly."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from nearfar.cpu_kernels.items import read_key, row_array
from nearfar.storage import FORMATS, decode, decode_keys, encode, encode_rows

TYPES = {torch.float32: "f4", torch.bfloat16: "u2", torch.float16: "i2", torch.int8: "i1"}
EVERY_16_BITS = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
PATTERNS = torch.from_numpy(
    np.random.default_rng(0).integers(0, 2**32, 20_001, np.uint32).view("i4")
)


@pytest.mark.parametrize("dtype", TYPES)
def test_array_is_a_view_of_the_rows(dtype: torch.dtype) -> None:
    rows = torch.zeros(2, 3, 10, dtype=dtype)
    array = row_array(rows)
    assert array.shape == (2, 3, 10)
    assert array.dtype == np.dtype(TYPES[dtype])
    rows[1, 2, 9] = -1
    assert array[1, 2, 9] != 0
    assert not array[:, :2].any()
    assert array.ctypes.data == rows.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("read", [read_key])
def test_every_number_is_widened_exactly(dtype: torch.dtype, read: Any) -> None:
    """Subnormal numbers and signed zeros too; infinities and NaN as well where kept."""
    items = (PATTERNS if dtype == torch.float32 else EVERY_16_BITS).view(dtype)
    if dtype == torch.float16:
        items = items[torch.isfinite(items)]
    half = len(items) // 2
    items = items[: 2 * half]
    key = np.full(half, np.nan, np.float32)
    for part in (items, items.flip(0)):
        read(row_array(part.contiguous()[None]), 0, key)
        want = part[:half].float().numpy()
        finite = np.isfinite(want)
        np.testing.assert_array_equal(key[finite].view("u4"), want[finite].view("u4"))
        np.testing.assert_array_equal(key, want)


@pytest.mark.parametrize("D", [32, 96, 256])
@pytest.mark.parametrize("name", ["int4", "kivi-4", "kivi-2"])
def test_packed_keys_and_nothing_beyond_them(D: int, name: str) -> None:
    keys, values = torch.randn(2, 96, D, generator=torch.Generator().manual_seed(D)) * 7
    rows = encode_rows(keys, values, FORMATS[name])
    key = np.full(D + 4, np.nan, np.float32)
    for row in (0, 31, 32, 95):
        read_key(row_array(rows), row, key[:D])
        want = decode_keys(rows, row, row + 1)[0].numpy()
        np.testing.assert_allclose(key[:D], want, rtol=2e-6, atol=2e-6 * np.abs(want).max())
    assert np.isnan(key[D:]).all()


@pytest.mark.parametrize("D", [1, 7, 16, 17, 33, 80, 128])
@pytest.mark.parametrize("dtype", TYPES)
def test_short_and_odd_rows_and_nothing_beyond_them(D: int, dtype: torch.dtype) -> None:
    if dtype == torch.int8 and D < 16:
        pytest.skip("no room for a scale")
    values = torch.randn(3, 2, D, generator=torch.Generator().manual_seed(D)) * 7
    rows = encode(values, dtype).view(3, 2 * D)
    key = np.full(D + 4, np.nan, np.float32)
    read_key(row_array(rows), 1, key[:D])
    np.testing.assert_array_equal(key[:D], decode(rows[1, :D]).float().numpy())
    assert np.isnan(key[D:]).all()

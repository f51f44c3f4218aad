"""Rows of every storage type: encoding and decoding, errors of int8, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from nearfar.errors import InvalidOptionError
from nearfar.records import FarView
from nearfar.storage import SCALE_BITS, check_head_dim, decode, encode


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_floating_types_are_their_own_code(dtype: torch.dtype) -> None:
    values = normal(2, 5, 7) * 100
    items = encode(values, dtype)
    assert items.dtype == dtype
    assert decode(items) is items
    assert torch.equal(items, values.to(dtype))


def test_float16_saturates() -> None:
    assert encode(torch.tensor([1e9, -1e9]), torch.float16).tolist() == [65504.0, -65504.0]


@pytest.mark.parametrize("D", [16, 17, 64, 96, 128])
@pytest.mark.parametrize("size", [1e-30, 1e-3, 1.0, 1e4, 1e30])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
def test_int8_errs_by_half_a_step_and_by_one_where_the_scale_is(
    D: int, size: float, given: torch.dtype
) -> None:
    values = (normal(3, 50, D, seed=D) * size).to(given)
    items = encode(values, torch.int8)
    assert items.dtype == torch.int8
    assert items.shape == values.shape
    assert items.abs().max() <= 127
    exact = values.double()
    # a bfloat16 next above the least scale that would do
    step = exact.abs().amax(-1, keepdim=True) / 127 * (1 + 2**-7)
    error = (decode(items).double() - exact).abs() / step
    assert (error[..., SCALE_BITS:] <= 0.501).all()
    assert error.max() <= 1.01


def test_int8_scale_is_the_least_bfloat16_that_covers_the_largest_element() -> None:
    values = normal(1000, 64)
    decoded = decode(encode(values, torch.int8))
    largest = values.abs().amax(-1)
    scale = largest / 127
    # the largest element is 127 or, by its lowest bit, 126 steps of at most 2^-7 more
    found = decoded.abs().amax(-1)
    assert torch.all(found >= 125.5 * scale)
    assert torch.all(found <= 127 * scale * (1 + 2**-7))


def test_int8_relative_error_on_normal_numbers() -> None:
    """Half of bfloat16's bytes for a relative error of 0.7 % in a key or value of 128."""
    values = normal(4000, 128)
    error = (decode(encode(values, torch.int8)) - values).norm(dim=-1) / values.norm(dim=-1)
    assert 0.005 < error.mean() < 0.0085


def test_int8_of_zeros_is_zeros() -> None:
    items = encode(torch.zeros(2, 3, 20), torch.int8)
    assert items.abs().max() == 0
    assert decode(items).abs().max() == 0


def test_one_large_element_does_not_touch_other_rows() -> None:
    values = normal(4, 32)
    values[1, 5] = 1e6
    decoded = decode(encode(values, torch.int8))
    alone = decode(encode(values[[0, 2, 3]], torch.int8))
    assert torch.equal(decoded[[0, 2, 3]], alone)
    assert decoded[1, 5] == pytest.approx(1e6, rel=0.02)


def test_view_decodes_keys_and_values_by_their_own_scales() -> None:
    keys, values = normal(2, 9, 24), normal(2, 9, 24, seed=1) * 100
    rows = torch.full((2, 12, 48), 99, dtype=torch.int8)
    rows[:, :9] = torch.cat([encode(keys, torch.int8), encode(values, torch.int8)], -1)
    view = FarView(rows, 9)
    assert view.head_dim == 24
    assert view.keys().dtype == torch.float32
    torch.testing.assert_close(view.keys(), keys, rtol=0, atol=0.04)
    torch.testing.assert_close(view.values(2, 7), values[:, 2:7], rtol=0, atol=4)


def test_heads_too_small_for_a_scale_are_refused() -> None:
    check_head_dim(torch.int8, 16)
    check_head_dim(torch.bfloat16, 4)
    with pytest.raises(
        InvalidOptionError, match=r"16 dimensions or more, and this model's have 8\."
    ):
        check_head_dim(torch.int8, 8)

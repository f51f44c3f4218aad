"""Packed formats: bytes, errors, groups, and what KIVI promises of keys with outlier channels."""

from __future__ import annotations

import pytest
import torch

from nearfar.errors import InvalidOptionError
from nearfar.packing import GROUP, pack, quantise, restore, unpack
from nearfar.records import FarView
from nearfar.storage import (
    FORMATS,
    bytes_read,
    check_head_dim,
    encode_rows,
    head_dim_of,
    row_width,
    token_bytes,
)

NAMES = ["int4", "kivi-4", "kivi-2"]


Pair = tuple[torch.Tensor, torch.Tensor]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def outlying_keys(Hkv: int, N: int, D: int) -> torch.Tensor:
    """Keys as models have them: a few channels are large, and on one side of zero."""
    keys = normal(Hkv, N, D)
    keys[..., 5] = keys[..., 5] * 3 + 12
    keys[..., D - 9] = keys[..., D - 9] * 4 - 9
    return keys


def far_of(keys: torch.Tensor, values: torch.Tensor, name: str) -> FarView:
    return FarView(encode_rows(keys, values, FORMATS[name]).contiguous(), keys.shape[1])


@pytest.mark.parametrize("bits", [2, 4])
def test_codes_are_packed_for_vectors_of_16(bits: int) -> None:
    codes = torch.randint(2**bits, (3, 5, 48), generator=torch.Generator().manual_seed(0))
    packed = pack(codes.to(torch.uint8), bits)
    assert packed.shape == (3, 5, 48 * bits // 8)
    assert torch.equal(unpack(packed, bits), codes)
    place, width = 16 + 11, 2 * bits  # the second block, its dimension 11
    byte = packed[..., width + 11 % width].int()
    assert torch.equal(byte >> bits * (11 // width) & 2**bits - 1, codes[..., place].int())


@pytest.mark.parametrize("size", [1e-30, 1e-3, 1.0, 1e30])
@pytest.mark.parametrize("bits", [2, 4])
def test_no_number_errs_by_more_than_half_a_step(bits: int, size: float) -> None:
    for shift in (0.0, 40.0, -40.0):
        numbers = (normal(7, 11, 32, seed=3) + shift) * size
        codes, pairs = quantise(numbers, bits, -1)
        steps = (pairs & ~0xFFFF).view(torch.float32)
        spread = numbers.amax(-1) - numbers.amin(-1)
        # a zero of 8 bits reaches further down than the numbers, the more so the further they lie
        reach = spread + numbers.abs().amax(-1) / 128
        assert (steps[..., 0] <= reach / (2**bits - 1) * (1 + 2**-7)).all()
        error = (restore(codes, pairs) - numbers).abs()
        assert (error <= steps / 2 * (1 + 1e-4) + numbers.abs() * 2**-22).all()


def test_equal_numbers_are_no_division_by_zero() -> None:
    for value in (0.0, 1.0, -3.0, 1.2345, -1e-38):
        restored = restore(*quantise(torch.full((4, 32), value), 2, -1))
        torch.testing.assert_close(restored, torch.full((4, 32), value), rtol=2**-8, atol=1e-38)


@pytest.mark.parametrize(
    ("name", "of_64", "of_128"), [("int4", 72, 136), ("kivi-4", 80, 160), ("kivi-2", 48, 96)]
)
def test_a_token_takes_so_many_bytes(name: str, of_64: int, of_128: int) -> None:
    dtype = FORMATS[name]
    assert (token_bytes(dtype, 64), token_bytes(dtype, 128)) == (of_64, of_128)
    for D in range(32, 289, 32):
        rows = encode_rows(normal(2, 64, D), normal(2, 64, D), dtype)
        assert rows.nbytes == 2 * 64 * token_bytes(dtype, D)
        assert head_dim_of(dtype, row_width(dtype, D)) == FarView(rows, 64).head_dim == D


def test_a_key_read_alone_is_read_with_what_its_group_shares() -> None:
    for name in ("kivi-4", "kivi-2"):
        dtype, D = FORMATS[name], 64
        assert bytes_read(dtype, D, GROUP, 1) == GROUP * token_bytes(dtype, D)
        assert bytes_read(dtype, D, 1, 1) == token_bytes(dtype, D) - 8 + 4 * D
    assert bytes_read(FORMATS["int4"], 64, 10, 3) == 10 * 72


@pytest.mark.parametrize("name", NAMES)
def test_any_part_of_the_rows_decodes_alike(name: str) -> None:
    far = far_of(normal(2, 96, 64), normal(2, 96, 64, seed=1), name)
    keys, values = far.keys(), far.values()
    for start, stop in ((0, 0), (17, 45), (31, 33), (64, 96), (95, 96)):
        assert torch.equal(far.keys(start, stop), keys[:, start:stop])
        assert torch.equal(far.values(start, stop), values[:, start:stop])
    indices = torch.tensor([3, 95, 40, 3])
    for got, want in zip(far.gather(1, indices), (keys, values), strict=True):
        assert torch.equal(got, want[1, indices])


def test_groups_do_not_depend_on_how_tokens_come() -> None:
    keys, values = outlying_keys(2, 128, 32), normal(2, 128, 32, seed=1)
    dtype = FORMATS["kivi-2"]
    whole = encode_rows(keys, values, dtype)
    parts = [encode_rows(keys[:, s], values[:, s], dtype) for s in (slice(0, 32), slice(32, 128))]
    assert torch.equal(torch.cat(parts, 1), whole)


def attention_error(keys: torch.Tensor, values: torch.Tensor, near: FarView | Pair) -> float:
    """Relative error of the attention of some queries, over all of them."""
    stored = near if isinstance(near, tuple) else (near.keys(), near.values())
    query = normal(keys.shape[0], 40, keys.shape[2], seed=2) / keys.shape[2] ** 0.5

    def attend(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.bmm(torch.bmm(query, k.transpose(1, 2)).softmax(-1), v)

    want = attend(keys, values)
    return float((attend(*stored) - want).norm() / want.norm())


def test_errors_of_attention_are_in_the_order_of_the_formats() -> None:
    keys, values = outlying_keys(2, 512, 64), normal(2, 512, 64, seed=1)
    names = ("int8", "kivi-4", "int4", "kivi-2")
    errors = [attention_error(keys, values, far_of(keys, values, name)) for name in names]
    assert errors == sorted(errors), errors
    assert errors[0] < 0.05
    assert errors[1] < 0.15
    assert errors[3] < 0.7


def test_keys_by_channel_beat_keys_by_token() -> None:
    """At 2 bits, with as many steps either way: table 2 of the KIVI paper, in kind."""
    keys, values = outlying_keys(2, 512, 64), normal(2, 512, 64, seed=1)
    tokens = restore(*quantise(keys.reshape(2, 512, -1, GROUP), 2, -1)).flatten(-2)
    channels = restore(*quantise(keys.reshape(2, -1, GROUP, 64), 2, -2)).flatten(-3, -2)
    by_token = attention_error(keys, values, (tokens, values))
    assert attention_error(keys, values, (channels, values)) < by_token / 4


@pytest.mark.parametrize(("name", "D"), [("int4", 24), ("kivi-4", 48), ("kivi-2", 80)])
def test_heads_that_do_not_fit_are_refused(name: str, D: int) -> None:
    multiple = 16 if name == "int4" else 32
    message = f"Far memory of {name} needs heads of a multiple of {multiple} dimensions"
    with pytest.raises(InvalidOptionError, match=message):
        check_head_dim(FORMATS[name], D)
    check_head_dim(FORMATS[name], 96)

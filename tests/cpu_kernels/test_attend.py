"""attend_selected and attend_all against their float64 reference, compiled and interpreted."""

from __future__ import annotations

import numba
import numpy as np
import pytest
import torch

from nearfar.cpu_kernels import attend, reference
from nearfar.cpu_kernels.attend_tile import head_block
from nearfar.cpu_kernels.items import row_array
from nearfar.records import FarView, Partial, Selection
from nearfar.storage import FORMATS, encode, encode_rows, row_width

STORAGE = [torch.float32, torch.bfloat16, torch.float16, torch.int8]
PACKED = [FORMATS[name] for name in ("int4", "kivi-4", "kivi-2")]

# a kernel takes seconds to compile; most tests need those of these two types
OFTEN_COMPILED = [
    dtype
    if dtype in (torch.float32, torch.bfloat16)
    else pytest.param(dtype, marks=pytest.mark.slow)
    for dtype in STORAGE
]


def make_far(Hkv: int, N: int, D: int, dtype: torch.dtype, spread: float = 1.0) -> FarView:
    generator = torch.Generator().manual_seed(N * 31 + D)
    poison = torch.full((Hkv, N + 5, 2, D), torch.nan)
    rows = (
        torch.full((Hkv, N + 5, 2, D), 85, dtype=dtype) if dtype == torch.int8 else poison.to(dtype)
    )
    values = torch.randn(Hkv, N, 2, D, generator=generator) * spread
    rows[:, :N] = encode(values, dtype)
    return FarView(rows.view(Hkv, N + 5, 2 * D), N)


def make_selection(far: FarView, rows: int, heads_per_row: int, share: float) -> Selection:
    rng = np.random.default_rng(far.length)
    chosen = [np.flatnonzero(rng.random(far.length) < share) for _ in range(rows)]
    offsets = np.cumsum([0, *map(len, chosen)]).astype(np.int64)
    weights = rng.uniform(0, 5, offsets[-1]).astype(np.float32)
    return Selection(np.concatenate(chosen).astype(np.int32), offsets, weights, heads_per_row)


def check(got: Partial, want: Partial, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(got.out.double(), want.out, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(got.lse.double(), want.lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", OFTEN_COMPILED)
@pytest.mark.parametrize(
    ("Hq", "Hkv", "D", "N"),  # three heads to a group or one, and so two kernels for each type
    [
        (9, 3, 64, 301),
        (1, 1, 7, 1),
        (3, 1, 33, 2000),
        (3, 3, 96, 33),
        (6, 2, 128, 129),
        (3, 1, 17, 95),
        (1, 1, 256, 64),
        (6, 2, 80, 63),
    ],
)
def test_selected_equals_reference(Hq: int, Hkv: int, D: int, N: int, dtype: torch.dtype) -> None:
    if dtype == torch.int8 and D < 16:
        pytest.skip("no room for a scale")
    far = make_far(Hkv, N, D, dtype)
    query = torch.randn(Hq, D, generator=torch.Generator().manual_seed(1)) / D**0.5
    for heads_per_row in {Hq // Hkv, 1}:
        selection = make_selection(far, Hq // heads_per_row, heads_per_row, 0.4)
        check(
            attend.attend_selected(query, far, selection),
            reference.attend_selected(query, far, selection),
        )
    check(attend.attend_all(query, far), reference.attend_all(query, far))


def packed_far(Hkv: int, N: int, D: int, dtype: torch.dtype) -> FarView:
    """Far rows, and behind them poison: bytes that stand for infinities."""
    keys, values = torch.randn(2, Hkv, N, D, generator=torch.Generator().manual_seed(N * 31 + D))
    rows = torch.full((Hkv, N + 32, row_width(dtype, D) * dtype.itemsize), 255, dtype=torch.uint8)
    rows[:, :N] = encode_rows(keys, values + 3, dtype).view(torch.uint8)
    return FarView(rows.view(dtype), N)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", PACKED)
@pytest.mark.parametrize(
    ("Hq", "Hkv", "D", "N"),
    [(9, 3, 64, 320), (1, 1, 32, 32), (3, 3, 96, 2016), (6, 2, 128, 128), (8, 1, 256, 64)],
)
def test_packed_rows_equal_reference(Hq: int, Hkv: int, D: int, N: int, dtype: torch.dtype) -> None:
    far = packed_far(Hkv, N, D, dtype)
    query = torch.randn(Hq, D, generator=torch.Generator().manual_seed(1)) / D**0.5
    for heads_per_row in {Hq // Hkv, 1}:
        for share in (0.01, 0.4):
            selection = make_selection(far, Hq // heads_per_row, heads_per_row, share)
            check(
                attend.attend_selected(query, far, selection),
                reference.attend_selected(query, far, selection),
            )
    check(attend.attend_all(query, far), reference.attend_all(query, far))


@pytest.mark.slow
@pytest.mark.parametrize("heads", [2, 4, 5, 7, 8, 9, 11, 12, 16])
def test_any_number_of_heads_shares_its_keys(heads: int) -> None:
    far = make_far(1, 77, 48, torch.bfloat16)
    query = torch.randn(heads, 48, generator=torch.Generator().manual_seed(heads)) / 7
    rows, none = row_array(far.rows)[0], np.empty(0, np.int32)
    out, top, total = torch.empty(heads, 48), *torch.empty(2, heads)
    results = (out.numpy(), top.numpy(), total.numpy())
    weights = none.astype(np.float32)
    attend.attend_range(head_block(heads), rows, query.numpy(), none, weights, 0, 77, *results)
    got = Partial(out / total[:, None], top + total.log())
    check(got, reference.attend_all(query, far))


def test_a_block_is_the_largest_divisor_that_registers_suffice_for() -> None:
    sizes = [(1, 1), (2, 2), (5, 5), (7, 7), (8, 8), (9, 3), (11, 1), (12, 6), (14, 7), (40, 8)]
    for heads, size in sizes:
        assert len(head_block(heads)) == size


def test_empty_rows_are_zero_with_lse_minus_infinity() -> None:
    far = make_far(2, 50, 16, torch.float32)
    nothing = Selection(np.empty(0, np.int32), np.zeros(3, np.int64), np.empty(0, np.float32), 3)
    partial = attend.attend_selected(torch.ones(6, 16), far, nothing)
    assert partial.out.abs().max() == 0
    assert torch.all(partial.lse == -torch.inf)

    one_row = Selection(
        np.array([7], np.int32), np.array([0, 0, 1], np.int64), np.zeros(1, np.float32), 3
    )
    partial = attend.attend_selected(torch.ones(6, 16), far, one_row)
    assert torch.all(partial.lse[:3] == -torch.inf)
    wanted = far.values()[1, 7].expand(3, 16)
    torch.testing.assert_close(partial.out[3:], wanted, rtol=1e-6, atol=0.0)

    empty = attend.attend_all(torch.ones(6, 16), FarView(far.rows, 0))
    assert empty.out.abs().max() == 0
    assert torch.all(empty.lse == -torch.inf)


@pytest.mark.parametrize("spread", [0.0, 1.0, 30.0, 300.0])
def test_logit_spread_neither_overflows_nor_loses_the_heaviest(spread: float) -> None:
    far = make_far(1, 700, 8, torch.float32)
    far.rows[0, :700, 0] = torch.linspace(0, spread, 700).roll(13)
    far.rows[0, :700, 1:8] = 0
    query = torch.zeros(3, 8)
    query[:, 0] = 1
    check(attend.attend_all(query, far), reference.attend_all(query, far))
    # each key twice, and of weights that differ by twelve orders of magnitude
    indices = np.arange(700, dtype=np.int32).repeat(2)
    log_weights = np.log(np.geomspace(1e-6, 1e6, 1400)).astype(np.float32)
    selection = Selection(indices, np.array([0, 1400]), log_weights, 3)
    check(
        attend.attend_selected(query, far, selection),
        reference.attend_selected(query, far, selection),
    )


@pytest.mark.parametrize("weight", [1e-6, 1.0, 1e6])
def test_weights_count_keys_as_often_as_they_say(weight: float) -> None:
    far = make_far(1, 40, 16, torch.float32)
    indices = np.array([3, 3, 20], np.int32)
    log_weights = np.log(np.array([weight, 1.0, 2.0])).astype(np.float32)
    selection = Selection(indices, np.array([0, 3], np.int64), log_weights, 3)
    query = torch.randn(3, 16, generator=torch.Generator().manual_seed(2))
    check(
        attend.attend_selected(query, far, selection),
        reference.attend_selected(query, far, selection),
    )


def test_equal_logits_average_the_values() -> None:
    far = make_far(2, 333, 24, torch.float32)
    partial = attend.attend_all(torch.zeros(6, 24), far)
    wanted = torch.full((6,), float(np.log(333)))
    torch.testing.assert_close(partial.lse, wanted, rtol=1e-5, atol=0.0)
    mean = far.values().mean(1).repeat_interleave(3, 0)
    torch.testing.assert_close(partial.out, mean, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("N", [1, 31, 32, 33, 64, 127, 1_000_000])
def test_any_number_of_keys(N: int) -> None:
    far = make_far(1, N, 16, torch.bfloat16)
    query = torch.randn(3, 16, generator=torch.Generator().manual_seed(4)) / 4
    check(attend.attend_all(query, far), reference.attend_all(query, far))
    every = Selection(np.arange(N, dtype=np.int32), np.array([0, N]), np.zeros(N, np.float32), 3)
    check(attend.attend_selected(query, far, every), reference.attend_selected(query, far, every))


@pytest.mark.parametrize("dtype", STORAGE)
def test_rows_beside_the_selected_ones_are_not_read(dtype: torch.dtype) -> None:
    """Neither what lies between selected rows nor what lies before, behind and beyond the array."""
    D, N = 33, 70
    clean = make_far(2, N, D, dtype)
    chosen = np.arange(3, N, 4, dtype=np.int32)
    poisoned = FarView(clean.rows.clone(), N)
    others = [i for i in range(N + 5) if i not in chosen]
    poisoned.rows[:, others] = 127 if dtype == torch.int8 else torch.nan
    offsets = np.array([0, len(chosen), 2 * len(chosen)])
    weights = np.zeros(2 * len(chosen), np.float32)
    selection = Selection(np.tile(chosen, 2), offsets, weights, 3)
    query = torch.randn(6, D, generator=torch.Generator().manual_seed(5))
    got = attend.attend_selected(query, poisoned, selection)
    want = attend.attend_selected(query, clean, selection)
    assert torch.equal(got.out, want.out)
    assert torch.equal(got.lse, want.lse)


def test_values_of_one_scale_are_not_weighed_by_another() -> None:
    """Int8 rows whose keys and values differ in size by orders of magnitude."""
    generator = torch.Generator().manual_seed(6)
    sizes = torch.logspace(-3, 3, 90)[:, None, None] * torch.tensor([[0.01], [1.0]])
    rows = encode(torch.randn(1, 90, 2, 64, generator=generator) * sizes, torch.int8)
    far = FarView(rows.view(1, 90, 128), 90)
    query = torch.randn(3, 64, generator=generator) / 8
    got, want = attend.attend_all(query, far), reference.attend_all(query, far)
    torch.testing.assert_close(got.out.double(), want.out, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got.lse.double(), want.lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shares", [1, 2, 7, 50])
@pytest.mark.parametrize("lengths", [(45, 45), (0, 90), (90, 0), (1, 3, 0, 30), (0, 0)])
def test_interpreted_kernel_equals_reference_for_any_shares(
    shares: int, lengths: tuple[int, ...]
) -> None:
    far = make_far(2, 45, 6, torch.bfloat16)
    rng = np.random.default_rng(shares)
    chosen = [rng.integers(0, 45, length).astype(np.int32) for length in lengths]
    offsets = np.cumsum([0, *lengths])
    weights = rng.uniform(0, 5, offsets[-1]).astype(np.float32)
    heads = 3 * len(lengths)
    selection = Selection(np.concatenate(chosen), offsets, weights, 3)
    query = torch.randn(heads, 6, generator=torch.Generator().manual_seed(3))
    want = reference.attend_selected(query, far, selection)
    for function in (attend.attend_rows, attend.attend_rows.py_func):
        out, lse = np.full((heads, 6), np.nan, np.float32), np.full(heads, np.nan, np.float32)
        starts, stops = offsets[:-1], offsets[1:]
        arguments = (selection.indices, starts, stops, selection.log_weights, out, lse)
        block = head_block(selection.heads_per_row)
        function(block, shares, row_array(far.rows), query.numpy(), *arguments)
        check(Partial(torch.from_numpy(out), torch.from_numpy(lse)), want)


def test_interpreted_parts_equal_compiled_ones() -> None:
    far = make_far(1, 75, 20, torch.float16)
    query = torch.randn(3, 20, generator=torch.Generator().manual_seed(7)).numpy()
    rows, none = row_array(far.rows)[0], np.empty(0, np.int32)
    results = []
    for function in (attend.attend_range, attend.attend_range.py_func):
        out, top, total = np.empty((3, 20), np.float32), *np.empty((2, 3), np.float32)
        weights = none.astype(np.float32)
        function(head_block(3), rows, query, none, weights, 3, 75, out, top, total)
        results.append(np.concatenate([out, top[:, None], total[:, None]], 1))
    np.testing.assert_array_equal(results[0], results[1])


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("length", [1, 127, 300, attend.SHARE_KEYS, attend.SHARE_KEYS + 1, 10**6])
def test_shares_are_neither_tiny_nor_too_long(length: int, threads: int) -> None:
    before = numba.get_num_threads()
    numba.set_num_threads(min(threads, before))
    try:
        shares = attend.share_count(np.array([0, 9]), np.array([length, 9]))
    finally:
        numba.set_num_threads(before)
    assert shares * attend.SHARE_KEYS >= length
    assert shares == 1 or shares * attend.MIN_SHARE_KEYS <= length
    assert shares >= min(threads, before, length // attend.MIN_SHARE_KEYS)

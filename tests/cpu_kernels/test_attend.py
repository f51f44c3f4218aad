"""attend_selected and attend_all against their float64 reference, compiled and interpreted."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nearfar.cpu_kernels import attend, reference
from nearfar.cpu_kernels.storage import row_bits, widen
from nearfar.records import FarView, Partial, Selection

STORAGE = [torch.float32, torch.bfloat16, torch.float16]


def make_far(Hkv: int, N: int, D: int, dtype: torch.dtype, spread: float = 1.0) -> FarView:
    generator = torch.Generator().manual_seed(N * 31 + D)
    rows = torch.full((Hkv, N + 5, 2 * D), torch.nan).to(dtype)
    rows[:, :N] = (torch.randn(Hkv, N, 2 * D, generator=generator) * spread).to(dtype)
    return FarView(rows, N)


def make_selection(far: FarView, rows: int, heads_per_row: int, share: float) -> Selection:
    rng = np.random.default_rng(far.length)
    chosen = [np.flatnonzero(rng.random(far.length) < share) for _ in range(rows)]
    offsets = np.cumsum([0, *map(len, chosen)]).astype(np.int64)
    weights = rng.uniform(0, 5, offsets[-1]).astype(np.float32)
    return Selection(np.concatenate(chosen).astype(np.int32), offsets, weights, heads_per_row)


def check(got: Partial, want: Partial, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(got.out.double(), want.out, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(got.lse.double(), want.lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", STORAGE)
@pytest.mark.parametrize(
    ("Hq", "Hkv", "D", "N"),
    [(9, 3, 64, 301), (1, 1, 7, 1), (8, 1, 33, 2000), (4, 4, 96, 33), (28, 4, 128, 129)],
)
def test_selected_equals_reference(Hq: int, Hkv: int, D: int, N: int, dtype: torch.dtype) -> None:
    far = make_far(Hkv, N, D, dtype)
    query = torch.randn(Hq, D, generator=torch.Generator().manual_seed(1)) / D**0.5
    for heads_per_row in {Hq // Hkv, 1}:
        selection = make_selection(far, Hq // heads_per_row, heads_per_row, 0.4)
        check(
            attend.attend_selected(query, far, selection),
            reference.attend_selected(query, far, selection),
        )
    check(attend.attend_all(query, far), reference.attend_all(query, far))


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
    torch.testing.assert_close(partial.out[3:], far.values()[1, 7].expand(3, 16))

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


@pytest.mark.parametrize("weight", [1e-6, 1.0, 1e6])
def test_weights_count_keys_as_often_as_they_say(weight: float) -> None:
    far = make_far(1, 40, 16, torch.float32)
    indices = np.array([3, 3, 20], np.int32)
    log_weights = np.log(np.array([weight, 1.0, 2.0])).astype(np.float32)
    selection = Selection(indices, np.array([0, 3], np.int64), log_weights, 2)
    query = torch.randn(2, 16, generator=torch.Generator().manual_seed(2))
    check(
        attend.attend_selected(query, far, selection),
        reference.attend_selected(query, far, selection),
    )


def test_equal_logits_average_the_values() -> None:
    far = make_far(2, 333, 24, torch.float32)
    partial = attend.attend_all(torch.zeros(4, 24), far)
    torch.testing.assert_close(partial.lse, torch.full((4,), float(np.log(333))))
    mean = far.values().mean(1).repeat_interleave(2, 0)
    torch.testing.assert_close(partial.out, mean, rtol=1e-4, atol=1e-5)


def test_float16_widens_every_finite_number_exactly() -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    finite = every[torch.isfinite(every)]
    half, code = row_bits(finite[None])
    bits = np.empty(len(finite), np.uint32)
    for function in (widen, widen.py_func):
        bits[:] = 0xFFFFFFFF
        function(half[0], code, bits, bits.view(np.float32))
        assert np.array_equal(bits.view(np.float32), finite.float().numpy())


def test_exponential_is_accurate_and_clamped() -> None:
    x = np.concatenate([-np.geomspace(1e-6, 87, 3000), [0.0, -88.0, -1e30]]).astype(np.float32)
    for function in (attend.exp_tile, attend.exp_tile.py_func):
        got = x.copy()
        exponents = np.empty(len(x), np.int32)
        function(got, len(x), exponents, exponents.view(np.float32))
        want = np.exp(x.astype(np.float64))
        assert np.abs(got[:-2] / want[:-2] - 1).max() < 3e-7
        assert np.all(got[-2:] < 2e-38)


@pytest.mark.parametrize("splits", [1, 2, 7])
def test_interpreted_kernel_equals_reference_for_any_split(splits: int) -> None:
    far = make_far(2, 45, 6, torch.bfloat16)
    selection = make_selection(far, 2, 2, 0.7)
    query = torch.randn(4, 6, generator=torch.Generator().manual_seed(3))
    bits, storage = row_bits(far.rows)
    want = reference.attend_selected(query, far, selection)
    for function in (attend.attend_rows, attend.attend_rows.py_func):
        out, lse = np.full((4, 6), np.nan, np.float32), np.full(4, np.nan, np.float32)
        starts, stops = selection.offsets[:-1], selection.offsets[1:]
        arguments = (selection.indices, starts, stops, selection.log_weights, splits, out, lse)
        function(bits, storage, query.numpy(), *arguments)
        check(Partial(torch.from_numpy(out), torch.from_numpy(lse)), want)

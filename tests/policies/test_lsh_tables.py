"""The lsh-tables policy: unbiased, capped, reproducible, and defined in every corner."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numba
import numpy as np
import pytest
import torch

from nearfar.config import Budget
from nearfar.cpu_kernels.compile import set_threads
from nearfar.cpu_kernels.reference import attend_all, attend_selected
from nearfar.errors import InvalidOptionError
from nearfar.lsh.projections import random_projections
from nearfar.lsh.tables_reference import ReferenceSampler
from nearfar.policies.lsh_tables import LshTables, LshTablesIndex
from nearfar.policies.registry import create_policy
from nearfar.records import ALL, NONE, FarView, Geometry, Selection

GEOMETRY = Geometry(layers=2, query_heads=6, kv_heads=2, head_dim=16)
NO_CAP = Budget(0.95)  # too much to be reached in most tests, and not all


def make_far(N: int, dtype: torch.dtype = torch.float32, geometry: Geometry = GEOMETRY) -> FarView:
    generator = torch.Generator().manual_seed(N)
    shape = (geometry.kv_heads, N + 3, 2 * geometry.head_dim)
    offset = torch.randn(shape[0], 1, shape[2], generator=generator)
    return FarView((torch.randn(shape, generator=generator) + offset).to(dtype), N)


def make_query(seed: int = 0, geometry: Geometry = GEOMETRY) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(geometry.query_heads, geometry.head_dim, generator=generator)


def indexed(
    policy: LshTables, far: FarView, budget: Budget = NO_CAP, seed: int = 0
) -> LshTablesIndex:
    bounded = dataclasses.replace(policy, capped=budget is not NO_CAP)
    index = bounded.new_index(GEOMETRY, budget, seed)
    for layer in range(GEOMETRY.layers):
        index.extend(layer, far)
    return index


def chosen(
    index: LshTablesIndex, query: torch.Tensor, far: FarView, step: int = 0, layer: int = 1
) -> Selection:
    selection = index.select(layer, query, far, step)
    assert isinstance(selection, Selection)
    assert selection.heads_per_row == 1
    assert selection.indices.dtype == np.int32
    assert selection.offsets.dtype == np.int64
    assert selection.log_weights.dtype == np.float32
    assert len(selection.offsets) == len(query) + 1
    assert np.isfinite(selection.log_weights).all()
    return selection


def rows_of(selection: Selection) -> list[dict[int, float]]:
    """Log-weight by index for each row; an index that comes twice fails."""
    rows = []
    for start, stop in zip(selection.offsets[:-1], selection.offsets[1:], strict=True):
        indices = selection.indices[start:stop].tolist()
        assert len(set(indices)) == len(indices)
        rows.append(dict(zip(indices, selection.log_weights[start:stop].tolist(), strict=True)))
    return rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("bits", "tables", "minimum", "floor"),
    [(4, 12, 2, 1e-4), (10, 150, 2, 1e-4), (1, 7, 3, 0.0), (16, 300, 2, 0.0), (3, 8, 1, 0.0)],
)
def test_selection_equals_the_reference(
    bits: int, tables: int, minimum: int, floor: float, dtype: torch.dtype
) -> None:
    far, query = make_far(401, dtype), make_query() / 4
    index = indexed(LshTables(bits, tables, minimum, floor), far, seed=11)
    planes = random_projections(16, bits, tables, 11).planes.double().numpy()
    reference = ReferenceSampler(planes, bits, tables, minimum, floor)
    keys = far.keys().double().numpy()
    centre = keys.mean(1).astype(np.float32)
    rows = rows_of(chosen(index, query, far))
    for head, row in enumerate(rows):
        found, log_weights = reference.sample(
            query[head].double().numpy(), keys[head // 3], centre[head // 3]
        )
        assert sorted(row) == found.tolist()
        np.testing.assert_allclose([row[i] for i in found], log_weights, atol=2e-3)
    assert any(rows)


def estimates(policy: LshTables, budget: Budget, seeds: int, weigh: bool) -> np.ndarray:
    """Estimates [seeds, Hq] of the sum over far keys of a positive function of the key."""
    far, query = make_far(90), make_query()
    function = torch.exp(far.keys()[:, :, 0]).numpy()
    sums = []
    for seed in range(seeds):
        rows = rows_of(chosen(indexed(policy, far, budget, seed), query, far))
        sums.append(
            [
                sum(function[head // 3, i] * (np.exp(w) if weigh else 1) for i, w in row.items())
                for head, row in enumerate(rows)
            ]
        )
    return np.asarray(np.array(sums) / function.sum(1).repeat(3))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Thousands of tiny kernels cost more in waiting for each other's threads than in work."""
    threads = numba.get_num_threads()
    set_threads(1)
    yield
    set_threads(threads)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("budget", [NO_CAP, Budget(7)])
@pytest.mark.parametrize(("tables", "minimum"), [(12, 1), (24, 2)])
def test_the_weighted_sum_is_unbiased(budget: Budget, tables: int, minimum: int) -> None:
    policy = LshTables(3, tables, minimum, probability_floor=0.0)

    def deviations(weigh: bool) -> np.ndarray:
        """Of the mean from the truth, in standard errors, for each head."""
        ratios = estimates(policy, budget, 300, weigh)
        errors = ratios.std(0) / np.sqrt(len(ratios))
        return np.asarray(np.abs(ratios.mean(0) - 1) / errors)

    assert deviations(weigh=True).max() < 4
    assert deviations(weigh=False).min() > 4


def test_attention_error_falls_as_tables_grow() -> None:
    far, query = make_far(1500), make_query() / 2
    exact = attend_all(query, far).out
    errors = []
    for tables in (10, 60, 360):
        index = indexed(LshTables(6, tables), far)
        out = attend_selected(query, far, chosen(index, query, far)).out
        errors.append(float((out - exact).norm() / exact.norm()))
    assert errors[0] > 1.5 * errors[1] > 2.25 * errors[2]


def test_a_budget_caps_every_head_and_raises_its_weights() -> None:
    far, query = make_far(301), make_query()
    policy = LshTables(3, 12)
    free = rows_of(chosen(indexed(policy, far), query, far))
    capped = rows_of(chosen(indexed(policy, far, Budget(20)), query, far))
    for all_of_them, kept in zip(free, capped, strict=True):
        assert len(kept) == min(20, len(all_of_them))
        thinning = np.log(len(all_of_them) / len(kept))
        for index, weight in kept.items():
            assert weight == pytest.approx(all_of_them[index] + thinning, abs=1e-5)
    assert all(len(row) == 20 for row in capped)
    # without the option a budget bounds nothing
    unbounded = policy.new_index(GEOMETRY, Budget(20), 0)
    unbounded.extend(1, far)
    assert rows_of(chosen(unbounded, query, far)) == free


def test_draws_depend_on_seed_layer_and_step_alone() -> None:
    far, query = make_far(301), make_query()
    index = indexed(LshTables(3, 12), far, Budget(20))

    def kept(layer: int, step: int) -> list[dict[int, float]]:
        return rows_of(chosen(index, query, far, step, layer))

    first = kept(0, 5)
    assert kept(0, 6) != first
    assert kept(1, 5) != first
    assert kept(0, 5) == first
    again = indexed(LshTables(3, 12), far, Budget(20))
    assert rows_of(chosen(again, query, far, 6)) == kept(1, 6)


def test_few_far_keys_are_all_read_and_none_are_none() -> None:
    index = LshTables().new_index(GEOMETRY, Budget(64), 0)
    far = make_far(65)
    assert index.select(0, make_query(), FarView(far.rows, 0), 0) is NONE
    for length in (1, 64):
        index.extend(0, FarView(far.rows, length))
        assert index.select(0, make_query(), FarView(far.rows, length), 0) is ALL
    index.extend(0, far)
    assert isinstance(index.select(0, make_query(), far, 0), Selection)


def test_parallel_query_and_key_is_read_for_certain_with_no_weight() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        far = make_far(200, dtype)
        index = indexed(LshTables(), far)
        centred = far.keys().float() - far.keys().double().mean(1, keepdim=True).float()
        for token in range(0, 200, 7):
            query = centred[:, token].repeat_interleave(3, 0) * 3e-3
            for row in rows_of(chosen(index, query, far)):
                assert row[token] == pytest.approx(0, abs=1e-4)


def test_zero_query_and_identical_keys() -> None:
    far = make_far(300)
    rows = rows_of(chosen(indexed(LshTables(2, 8, 2, 0.0), far), torch.zeros(6, 16), far))
    right_angle = 1 - 0.75**8 - 8 * 0.25 * 0.75**7
    for row in rows:
        assert row
        assert set(np.round(np.array(list(row.values())), 3)) == {round(-np.log(right_angle), 3)}

    same = FarView(torch.full((2, 300, 32), 0.3).bfloat16(), 300)
    index = indexed(LshTables(2, 20), same)
    assert {len(row) for row in rows_of(chosen(index, make_query(), same))} <= {0, 300}
    for row in rows_of(chosen(index, torch.zeros(6, 16), same)):
        assert len(row) == 300  # zero and zero have the same code in every table
        assert max(row.values()) == pytest.approx(0, abs=1e-4)


def test_a_query_that_finds_nothing_gives_empty_rows() -> None:
    far = make_far(40)
    selection = chosen(indexed(LshTables(16, 2), far), make_query(), far)
    assert len(selection.indices) == 0
    assert attend_selected(make_query(), far, selection).out.abs().max() == 0


def test_tokens_that_come_later_are_found() -> None:
    far = make_far(500)
    index = LshTables(6, 40).new_index(GEOMETRY, NO_CAP, 0)
    for length in (200, 201, 203, 250, 500):
        view = FarView(far.rows, length)
        index.extend(0, view)
        index.extend(1, view)
        newest = far.keys(length - 1, length)[:, 0] - far.keys(0, 200).mean(1)
        for row in rows_of(chosen(index, newest.repeat_interleave(3, 0), view)):
            assert length - 1 in row


def test_rewind_restores_selections() -> None:
    far = make_far(600)
    start = FarView(far.rows, 140)
    index = indexed(LshTables(4, 20), start)
    mark = index.mark()
    before = rows_of(chosen(index, make_query(), start))
    for lengths in ([141], [150, 333], [600]):
        for length in lengths:
            index.extend(1, FarView(far.rows, length))
        assert rows_of(chosen(index, make_query(), FarView(far.rows, lengths[-1]))) != before
        index.rewind(mark)
        assert rows_of(chosen(index, make_query(), start)) == before
    other = FarView(torch.cat([far.rows[:, :140], -far.rows[:, 140:]], 1), 180)
    index.extend(1, other)
    fresh = indexed(LshTables(4, 20), start)
    fresh.extend(1, other)
    assert rows_of(chosen(index, make_query(), other)) == rows_of(
        chosen(fresh, make_query(), other)
    )


def test_rewind_gives_memory_back() -> None:
    far = make_far(3000)
    index = indexed(LshTables(4, 20), FarView(far.rows, 1030))
    mark, size = index.mark(), index.index_bytes()
    index.extend(0, far)
    assert index.index_bytes() > size
    index.rewind(mark)
    assert index.index_bytes() == size


def test_index_bytes_count_every_array() -> None:
    policy = LshTables(4, 20)
    index = policy.new_index(GEOMETRY, NO_CAP, 0)
    fixed = 20 * 4 * 16 * 4 + 4097 * 4
    centres = 2 * 2 * 16 * 4
    assert index.index_bytes() == fixed + centres
    assert policy.predict_index_bytes(GEOMETRY, 0) == fixed + centres - 4097 * 4
    far = make_far(2000)
    index.extend(0, far)
    tables = 2 * 20 * (2000 + 2**4 + 1) * 2
    assert index.index_bytes() == fixed + centres + tables
    index.select(0, make_query(), far, 0)
    assert index.index_bytes() >= fixed + centres + tables + 6 * 2000


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("bits_per_table", 17, "a whole number from 1 to 16"),
        ("bits_per_table", 0, "a whole number from 1 to 16"),
        ("num_tables", 2.5, "a whole number from 1 to 4096"),
        ("min_collisions", 151, "a whole number from 1 to 150"),
        ("probability_floor", 1.0, "0 or more and below 1"),
        ("probability_floor", -0.1, "0 or more and below 1"),
        ("probability_floor", float("nan"), "0 or more and below 1"),
    ],
)
def test_parameters_are_checked(field: str, value: float, rule: str) -> None:
    with pytest.raises(InvalidOptionError) as caught:
        LshTables(**{field: value})  # type: ignore[arg-type]
    assert str(caught.value) == f"lsh-tables: {field} must be {rule}. Got {value!r}."


def test_the_command_line_reaches_the_parameters() -> None:
    policy = create_policy("lsh-tables:bits_per_table=8:num_tables=75:probability_floor=0")
    assert policy == LshTables(8, 75, 2, 0.0)
    assert policy.traits.kind == "selects"
    assert policy.traits.keeps_far

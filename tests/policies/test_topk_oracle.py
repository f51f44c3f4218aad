"""The oracle reads the best keys by exact score: no other choice of as many recovers more mass."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from nearfar.config import Budget
from nearfar.cpu_kernels.reference import attend_all, attend_selected
from nearfar.errors import InvalidOptionError
from nearfar.policies import topk_oracle
from nearfar.policies.registry import create_policy
from nearfar.policies.topk_oracle import TopkOracle, exact_weights
from nearfar.records import ALL, FarView, Geometry, Selection

GEOMETRY = Geometry(layers=1, query_heads=6, kv_heads=2, head_dim=16)


def make_far(N: int, dtype: torch.dtype = torch.float32) -> FarView:
    generator = torch.Generator().manual_seed(N)
    rows = torch.full((2, N + 5, 32), torch.nan)
    rows[:, :N] = torch.randn(2, N, 32, generator=generator)
    return FarView(rows.to(dtype), N)


def make_query(seed: int = 0) -> torch.Tensor:
    return torch.randn(6, 16, generator=torch.Generator().manual_seed(seed)) / 2


def chosen(per: str, budget: float, query: torch.Tensor, far: FarView) -> Selection:
    index = TopkOracle(per).new_index(GEOMETRY, Budget(budget), 0)
    index.extend(0, far)
    selection = index.select(0, query, far, 0)
    assert isinstance(selection, Selection)
    assert not selection.log_weights.any()
    assert selection.heads_per_row == (3 if per == "group" else 1)
    return selection


def rows_of(selection: Selection) -> list[list[int]]:
    return [
        selection.indices[start:stop].tolist()
        for start, stop in itertools.pairwise(selection.offsets)
    ]


def weights_of(query: torch.Tensor, far: FarView) -> torch.Tensor:
    """Softmax weights [Hq, N], float64."""
    keys = far.keys().double()
    return (query.view(2, 3, 16).double() @ keys.transpose(1, 2)).softmax(-1).view(6, -1)


def mass(selection: Selection, weights: torch.Tensor) -> torch.Tensor:
    """Share of its attention [Hq] that each head finds in what it reads."""
    rows = rows_of(selection)
    return torch.stack(
        [weights[head, rows[head // selection.heads_per_row]].sum() for head in range(6)]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("per", "budget"), [("group", 31), ("head", 31), ("head", 2)])
def test_it_equals_brute_force(per: str, budget: int, dtype: torch.dtype) -> None:
    far, query = make_far(301, dtype), make_query()
    weights = weights_of(query, far)
    if per == "group":
        weights, count = weights.view(2, 3, -1).mean(1), budget
    else:
        count = max(1, budget // 3)
    best = weights.argsort(descending=True)[:, :count].sort().values
    assert rows_of(chosen(per, budget, query, far)) == best.tolist()


@pytest.mark.parametrize("at_once", [1, 50, 150, 301, 500])
def test_weights_are_the_softmax_however_many_are_scored_at_once(
    at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    N = 301
    monkeypatch.setattr(topk_oracle, "SCORED_BYTES", 4 * 2 * 16 * at_once)
    far, query = make_far(N, torch.bfloat16), make_query()
    exact = weights_of(query, far)
    wanted = {"head": exact, "group": exact.view(2, 3, -1).mean(1)}
    for per, weights in wanted.items():  # float32 sums of 16 products, then exponentials
        got = exact_weights(query, far, per)
        torch.testing.assert_close(got, weights.float(), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("per", ["group", "head"])
def test_recovered_mass_grows_with_the_budget_up_to_all(per: str) -> None:
    far, query = make_far(200), make_query()
    weights = weights_of(query, far)
    masses = torch.stack(
        [mass(chosen(per, budget, query, far), weights) for budget in range(3, 200, 12)]
    )
    assert (masses.diff(dim=0) > 0 if per == "head" else masses.diff(dim=0) >= 0).all()
    assert masses.max() < 1
    # a group's set is the best for its mean, not for each head
    of_groups = masses.view(-1, 2, 3).mean(2)
    assert (of_groups.diff(dim=0) > 0).all()
    every = TopkOracle(per).new_index(GEOMETRY, Budget(200), 0)
    assert every.select(0, query, far, 0) is ALL


@pytest.mark.parametrize("per", ["group", "head"])
def test_no_other_choice_recovers_more(per: str) -> None:
    far, query = make_far(150), make_query()
    weights = weights_of(query, far)
    best = chosen(per, 30, query, far)
    most = mass(best, weights).view(-1, best.heads_per_row).mean(1)
    rng = np.random.default_rng(0)
    size = len(rows_of(best)[0])
    for _ in range(50):
        others = [rng.permutation(150)[:size] for _ in rows_of(best)]
        # one key of the best exchanged for one that is not
        near = [
            np.append(row[:-1], other[~np.isin(other, row)][:1])
            for row, other in zip(rows_of(best), others, strict=True)
        ]
        for rows in (others, near):
            indices = np.concatenate(rows).astype(np.int32)
            other = Selection(indices, best.offsets, best.log_weights, best.heads_per_row)
            assert (mass(other, weights).view(-1, best.heads_per_row).mean(1) < most).all()


@pytest.mark.parametrize("per", ["group", "head"])
def test_equal_scores_give_any_keys_but_as_many(per: str) -> None:
    far = make_far(64)
    equal_keys = FarView(torch.ones(2, 70, 32), 64)
    for query, view in [(torch.zeros(6, 16), far), (make_query(), equal_keys)]:
        for row in rows_of(chosen(per, 21, query, view)):
            assert len(set(row)) == (21 if per == "group" else 7)
            assert 0 <= min(row) <= max(row) < 64


def test_output_approaches_the_exact_one() -> None:
    far, query = make_far(400), 2 * make_query()
    exact = attend_all(query, far).out
    errors = [
        float((attend_selected(query, far, chosen("group", b, query, far)).out - exact).norm())
        for b in (4, 40, 399)
    ]
    assert errors[0] > 2 * errors[1] > 20 * errors[2]


def test_budgets_at_the_borders() -> None:
    far, query = make_far(9), make_query()
    for per in ("group", "head"):
        assert all(len(row) == 1 for row in rows_of(chosen(per, 1, query, far)))
        for budget in (9, 10, 0.95):
            index = TopkOracle(per).new_index(GEOMETRY, Budget(budget), 0)
            assert index.select(0, query, far, 0) is ALL
            assert index.select(0, query, FarView(far.rows, 0), 0) is ALL
            assert index.select(0, query, FarView(far.rows, 1), 0) is ALL


def test_it_holds_nothing_and_needs_no_rewinding() -> None:
    far, query = make_far(90), make_query()
    index = TopkOracle().new_index(GEOMETRY, Budget(20), 0)
    before = index.select(0, query, far, 0)
    index.extend(0, far)
    mark = index.mark()
    index.extend(0, make_far(95))
    index.rewind(mark)
    after = index.select(0, query, far, 0)
    assert isinstance(before, Selection)
    assert isinstance(after, Selection)
    assert rows_of(before) == rows_of(after)
    assert index.index_bytes() == TopkOracle().predict_index_bytes(GEOMETRY, 10**6) == 0


def test_parameters_are_checked_and_reached_by_name() -> None:
    assert create_policy("topk-oracle:per=head") == TopkOracle(per="head")
    with pytest.raises(InvalidOptionError) as caught:
        TopkOracle(per="heads")
    assert str(caught.value) == "topk-oracle's per must be 'group' or 'head'. Got 'heads'."

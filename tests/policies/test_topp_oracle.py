"""The fewest keys with a share of the attention."""

from __future__ import annotations

import re

import pytest
from test_topk_oracle import GEOMETRY, make_far, make_query, mass, rows_of, weights_of

from nearfar.config import Budget
from nearfar.errors import InvalidOptionError
from nearfar.policies.registry import create_policy
from nearfar.policies.topp_oracle import ToppOracle
from nearfar.records import ALL, Selection


def chosen(policy: ToppOracle, budget: float) -> Selection:
    selection = policy.new_index(GEOMETRY, Budget(budget), 0).select(
        0, make_query(), make_far(200), 0
    )
    assert isinstance(selection, Selection)
    return selection


@pytest.mark.parametrize("p", [0.1, 0.5, 0.95])
@pytest.mark.parametrize("per", ["group", "head"])
def test_no_fewer_keys_have_that_share(per: str, p: float) -> None:
    policy = ToppOracle(p=p, per=per)
    selection = chosen(policy, 199 if per == "group" else 0.99)
    weights = weights_of(make_query(), make_far(200))
    if per == "group":
        weights = weights.view(2, 3, -1).mean(1)
    for row, own in zip(rows_of(selection), weights, strict=True):
        heaviest = own.sort(descending=True)
        count = next(n for n in range(1, 201) if heaviest.values[:n].sum() >= p - 1e-6)
        if per == "head":
            count = min(count, 66)
        assert row == sorted(heaviest.indices[:count].tolist())


def test_the_budget_caps_it() -> None:
    assert [len(row) for row in rows_of(chosen(ToppOracle(p=0.99), 9))] == [9, 9]
    assert [len(row) for row in rows_of(chosen(ToppOracle(p=1.0), 150))] == [150, 150]
    policy = ToppOracle()
    assert (
        policy.new_index(GEOMETRY, Budget(200), 0).select(0, make_query(), make_far(200), 0) is ALL
    )
    shares = mass(chosen(ToppOracle(p=0.6), 199), weights_of(make_query(), make_far(200)))
    assert (shares.view(2, 3).mean(1) >= 0.6 - 1e-6).all()


@pytest.mark.parametrize("p", ["0", "1.1", "nan"])
def test_a_share_outside_its_rule(p: str) -> None:
    text = f"topp-oracle's p must be above 0 and at most 1. Got {float(p)!r}."
    with pytest.raises(InvalidOptionError, match=f"^{re.escape(text)}$"):
        create_policy(f"topp-oracle:p={p}")

"""Policies that read whole blocks, against every block scored by hand."""

from __future__ import annotations

import itertools
import re

import pytest
import torch

from nearfar.config import Budget
from nearfar.cpu_kernels.reference import attend_all, attend_selected
from nearfar.errors import InvalidOptionError
from nearfar.policies.blocks import BlockIndex, ReadsBlocks
from nearfar.policies.infllm import InfLLM
from nearfar.policies.quest import Quest
from nearfar.policies.registry import create_policy
from nearfar.records import ALL, FarView, Geometry, Selection

GEOMETRY = Geometry(layers=2, query_heads=6, kv_heads=2, head_dim=16)


def make_far(N: int, dtype: torch.dtype = torch.float32) -> FarView:
    rows = torch.full((2, N + 5, 32), torch.nan)
    rows[:, :N] = torch.randn(2, N, 32, generator=torch.Generator().manual_seed(N))
    return FarView(rows.to(dtype), N)


def make_query(seed: int = 0) -> torch.Tensor:
    return torch.randn(6, 16, generator=torch.Generator().manual_seed(seed)) / 2


def index_of(policy: ReadsBlocks, budget: float, far: FarView, steps: int = 1) -> BlockIndex:
    index = BlockIndex(policy, GEOMETRY, Budget(budget))
    for i in range(1, steps + 1):
        for layer in range(2):
            index.extend(layer, FarView(far.rows, far.length * i // steps))
    return index


def rows_of(selection: object) -> list[list[int]]:
    assert isinstance(selection, Selection)
    assert not selection.log_weights.any()
    pairs = itertools.pairwise(selection.offsets)
    return [selection.indices[start:stop].tolist() for start, stop in pairs]


def bound(query: torch.Tensor, keys: torch.Tensor) -> float:
    """Quest's score of a page, channel by channel."""
    total = 0.0
    for d in range(16):
        low, high = float(keys[:, d].min()), float(keys[:, d].max())
        total += max(float(query[d]) * low, float(query[d]) * high)
    return total


def representatives(query: torch.Tensor, keys: torch.Tensor) -> float:
    """The mean logit of the four keys farthest from their mean."""
    apart = sorted(keys, key=lambda key: -float((key - keys.mean(0)).norm()))
    return sum(float(query @ key) for key in apart[:4]) / 4


SCORES = {"quest": bound, "infllm": representatives}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("policy", [Quest(size=7), Quest(size=7, per="head"), InfLLM(size=7)])
def test_the_best_blocks_are_read_whole(policy: ReadsBlocks, dtype: torch.dtype) -> None:
    far, query = make_far(95, dtype), make_query()
    got = index_of(policy, 60, far).select(1, query, far, 0)
    keys = far.keys().float()
    scores = torch.tensor(
        [
            [SCORES[policy.name](query[h], keys[h // 3, 7 * b : 7 * b + 7]) for b in range(13)]
            for h in range(6)
        ]
    )
    if policy.per == "group":
        scores = scores.softmax(1).view(2, 3, 13).mean(1)
    rest = list(range(91, 95))  # in no full block
    blocks = (60 - 4) // 7 if policy.per == "group" else (20 - 4) // 7
    for row, weights in zip(rows_of(got), scores, strict=True):
        best = sorted(weights.argsort(descending=True)[:blocks].tolist())
        assert row == [7 * b + i for b in best for i in range(7)] + rest


def test_the_bound_is_one() -> None:
    far, query = make_far(160), make_query()
    index = index_of(Quest(per="head"), 20, far)
    bounds = index._weights(0, query)
    keys = far.keys().repeat_interleave(3, 0)
    logits = (keys @ query[..., None])[..., 0].view(6, 10, 16)
    assert (logits.amax(-1) <= bounds + 1e-5).all()


@pytest.mark.parametrize("policy", [Quest(), InfLLM(size=32)])
def test_it_does_not_matter_how_keys_come(policy: ReadsBlocks) -> None:
    far, query = make_far(333), make_query()
    want = rows_of(index_of(policy, 90, far).select(0, query, far, 0))
    assert rows_of(index_of(policy, 90, far, steps=9).select(0, query, far, 0)) == want
    index = index_of(policy, 90, far)
    mark = index.mark()
    longer = FarView(torch.cat([far.rows[:, :333], make_far(200).rows[:, :200]], 1), 533)
    index.extend(0, longer)
    assert rows_of(index.select(0, query, longer, 0)) != want
    index.rewind(mark)
    assert rows_of(index.select(0, query, far, 0)) == want
    assert index.index_bytes() >= policy.predict_index_bytes(GEOMETRY, 333)


def test_budgets_at_the_borders() -> None:
    far, query = make_far(50), make_query()
    index = index_of(Quest(), 1, far)
    assert [len(row) for row in rows_of(index.select(0, query, far, 0))] == [16 + 2] * 2
    few = FarView(far.rows, 9)  # no block is full
    assert rows_of(index_of(Quest(), 3, few).select(0, query, few, 0)) == [list(range(9))] * 2
    for budget in (50, 51, 0.99):
        assert index_of(Quest(), budget, far).select(0, query, far, 0) is ALL


def test_error_falls_with_the_budget() -> None:
    far, query = make_far(800), make_query()
    exact = attend_all(query, far).out
    for policy in (Quest(), InfLLM(size=16)):
        errors = []
        for budget in (16, 160, 784):
            selection = index_of(policy, budget, far).select(0, query, far, 0)
            assert isinstance(selection, Selection)
            errors.append(float((attend_selected(query, far, selection).out - exact).norm()))
        assert errors[0] > errors[1] > errors[2] > 0


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("quest:size=0", "quest's size must be 1 or more. Got 0."),
        ("quest:per=key", "quest's per must be 'group' or 'head'. Got 'key'."),
        (
            "infllm:representatives=129",
            "infllm's representatives must be between 1 and its size, 128. Got 129.",
        ),
    ],
)
def test_values_that_cannot_be_used(spec: str, text: str) -> None:
    with pytest.raises(InvalidOptionError, match=f"^{re.escape(text)}$"):
        create_policy(spec)

"""Indexes of faiss, against every key compared."""

from __future__ import annotations

import importlib.util
import itertools
import re
from typing import Any

import pytest
import torch

from nearfar.config import Budget
from nearfar.errors import InvalidOptionError
from nearfar.policies.faiss_hnsw import FaissHnsw
from nearfar.policies.faiss_ivfpq import FaissIvfPq
from nearfar.policies.faiss_search import INDEX_KEYS, FaissIndex, FaissSearch
from nearfar.policies.registry import create_policy, policy_class, usable_names
from nearfar.records import ALL, FarView, Geometry, Selection

pytest.importorskip("faiss")
GEOMETRY = Geometry(layers=1, query_heads=6, kv_heads=2, head_dim=16)
POLICIES = [FaissHnsw(), FaissIvfPq()]
every_policy = pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.name)


def make_far(N: int) -> FarView:
    """Keys with an offset that all share, as real ones have."""
    rows = torch.full((2, N + 5, 32), torch.nan)
    rows[:, :N] = torch.randn(2, N, 32, generator=torch.Generator().manual_seed(N))
    rows[:, :N] += 3 * torch.randn(2, 1, 32, generator=torch.Generator().manual_seed(1))
    return FarView(rows, N)


def make_query(seed: int = 0) -> torch.Tensor:
    return torch.randn(6, 16, generator=torch.Generator().manual_seed(seed))


def rows_of(selection: Any) -> list[list[int]]:
    assert isinstance(selection, Selection)
    pairs = itertools.pairwise(selection.offsets)
    return [selection.indices[start:stop].tolist() for start, stop in pairs]


def index_of(policy: FaissSearch, budget: float, *views: FarView) -> FaissIndex:
    index = FaissIndex(policy, GEOMETRY, Budget(budget))
    for view in views:
        index.extend(0, view)
    return index


def best(query: torch.Tensor, far: FarView, count: int) -> list[set[int]]:
    """The union over a group of each head's best keys."""
    logits = query.view(2, 3, 16) @ far.keys().transpose(1, 2)
    return [set(head.topk(count).indices.flatten().tolist()) for head in logits]


@every_policy
def test_most_of_the_best_keys_are_found(policy: FaissSearch) -> None:
    far = make_far(2500)
    index = index_of(policy, 90, far)
    shares = []
    for seed in range(8):
        query = make_query(seed)
        for row, wanted in zip(
            rows_of(index.select(0, query, far, 0)), best(query, far, 30), strict=True
        ):
            assert len(row) <= 90
            assert row == sorted(set(row))
            shares.append(len(wanted & set(row)) / len(wanted))
    assert sum(shares) / len(shares) > 0.7


@every_policy
def test_keys_that_are_not_indexed_yet_are_compared_too(
    policy: FaissSearch,
) -> None:
    far, query = make_far(2900), make_query()
    first = FarView(far.rows, 2000)
    index = index_of(policy, 90, first, far)
    assert [segment.stop for segment in index._layers[0]] == [2000]
    rows = rows_of(index.select(0, query, far, 0))
    for row, wanted in zip(rows, best(query, far, 30), strict=True):
        late = {j for j in wanted if j >= 2000}
        assert late
        assert len(late - set(row)) <= 1  # one of the others may score higher than it is
    longer = make_far(3100)
    index.extend(0, longer)
    assert [segment.stop for segment in index._layers[0]] == [2000, 3100]


@every_policy
def test_few_keys_are_all_compared(policy: FaissSearch) -> None:
    far, query = make_far(INDEX_KEYS - 1), make_query()
    index = index_of(policy, 60, far)
    assert [set(row) for row in rows_of(index.select(0, query, far, 0))] == best(query, far, 20)
    assert index.index_bytes() == policy.predict_index_bytes(GEOMETRY, INDEX_KEYS - 1) == 0
    assert index_of(policy, INDEX_KEYS, far).select(0, query, far, 0) is ALL


@every_policy
def test_a_mark_brings_back_what_was_found(policy: FaissSearch) -> None:
    far, query = make_far(1500), make_query()
    index = index_of(policy, 60, far)
    want, mark = rows_of(index.select(0, query, far, 0)), index.mark()
    longer = FarView(torch.cat([far.rows[:, :1500], make_far(1200).rows[:, :1200]], 1), 2700)
    index.extend(0, longer)
    assert rows_of(index.select(0, query, longer, 0)) != want
    index.rewind(mark)
    assert rows_of(index.select(0, query, far, 0)) == want
    assert rows_of(index_of(policy, 60, far).select(0, query, far, 0)) == want


def test_parts_are_of_equal_size() -> None:
    assert [FaissIvfPq(part=3)._parts(D) for D in (16, 64, 128, 7)] == [8, 32, 64, 7]
    assert FaissIvfPq(part=2)._parts(64) == 32


@pytest.mark.parametrize("name", ["faiss-hnsw", "faiss-ivfpq"])
def test_a_machine_without_faiss_is_told_how_to_get_it(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert policy_class(name).traits.kind == "selects"  # it is listed all the same
    assert not {"faiss-hnsw", "faiss-ivfpq"} & set(usable_names())
    text = f"{name} needs faiss, which is not installed. Run: pip install 'nearfar[rivals]'"
    with pytest.raises(InvalidOptionError, match=f"^{re.escape(text)}$"):
        create_policy(name)


def test_values_that_cannot_be_used() -> None:
    text = "faiss-ivfpq's probed must be above 0. Got 0.0."
    with pytest.raises(InvalidOptionError, match=f"^{re.escape(text)}$"):
        create_policy("faiss-ivfpq:probed=0")

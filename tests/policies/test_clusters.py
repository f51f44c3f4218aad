"""Clusters: what is read is read exactly, what is not is its centroid, and nothing counts twice."""

from __future__ import annotations

import itertools
import re
from functools import partial

import numpy as np
import pytest
import torch
from tiny_engine import decode, read, tiny_engine, tokens

from nearfar.config import Budget
from nearfar.cpu_kernels.reference import attend_all, attend_selected
from nearfar.errors import InvalidOptionError
from nearfar.gpu_kernels.attend_near import merge_partials
from nearfar.lsh.clustering import cluster_by_angle
from nearfar.policies.clusters import SEGMENT_KEYS, ClusterIndex, Clusters
from nearfar.policies.registry import create_policy
from nearfar.records import ALL, FarView, Geometry, Partial, Selection
from nearfar.runtime.steps.stepping import Stepper

GEOMETRY = Geometry(layers=1, query_heads=6, kv_heads=2, head_dim=16)
close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-5)


def make_far(N: int, spread: float = 1.0, count: int = 40) -> FarView:
    """Keys and values about ``count`` places, ``spread`` apart from them."""
    generator = torch.Generator().manual_seed(N)
    places = torch.randn(2, count, 32, generator=generator)
    rows = torch.full((2, N + 5, 32), torch.nan)
    which = torch.randint(count, (N,), generator=generator)
    rows[:, :N] = places[:, which] + spread * torch.randn(2, N, 32, generator=generator)
    return FarView(rows, N)


def make_query(seed: int = 0) -> torch.Tensor:
    return torch.randn(6, 16, generator=torch.Generator().manual_seed(seed)) / 2


def index_of(policy: Clusters, budget: float, far: FarView, steps: int = 1) -> ClusterIndex:
    index = ClusterIndex(policy, GEOMETRY, Budget(budget))
    for i in range(1, steps + 1):
        index.extend(0, FarView(far.rows, far.length * i // steps))
    return index


def chosen(index: ClusterIndex, query: torch.Tensor, far: FarView) -> Selection:
    selection = index.select(0, query, far, 0)
    assert isinstance(selection, Selection)
    return selection


def rows_of(selection: Selection) -> list[list[int]]:
    pairs = itertools.pairwise(selection.offsets)
    return [selection.indices[start:stop].tolist() for start, stop in pairs]


def result(selection: Selection, query: torch.Tensor, far: FarView) -> Partial:
    read = attend_selected(query, far, selection)
    return read if selection.estimate is None else merge_partials(read, selection.estimate)


def test_what_is_read_and_what_is_estimated() -> None:
    """Against clusters taken one by one, in the order of their mean softmax."""
    far, query = make_far(1000), make_query()
    selection = chosen(index_of(Clusters(), 300, far), query, far)
    keys, values = far.keys(), far.values()
    segments = 1000 // SEGMENT_KEYS
    full = keys[:, : segments * SEGMENT_KEYS].reshape(2, segments, SEGMENT_KEYS, 16)
    numbers = cluster_by_angle(full, 16) + torch.arange(segments)[:, None] * 16
    numbers = numbers.reshape(2, -1)
    pending = list(range(segments * SEGMENT_KEYS, 1000))
    assert selection.estimate is not None
    for head, row in enumerate(rows_of(selection)):
        members = [(numbers[head] == c).nonzero()[:, 0].tolist() for c in range(16 * segments)]
        centroids = torch.stack([keys[head, m].mean(0) if m else keys[head, 0] for m in members])
        logits = query[3 * head : 3 * head + 3] @ centroids.T
        logits[:, [not m for m in members]] = -torch.inf
        room, read = 300 - len(pending), []
        for c in logits.softmax(1).mean(0).argsort(descending=True).tolist():
            if len(members[c]) > room:
                break
            room -= len(members[c])
            read.append(c)
        assert row == sorted(j for c in read for j in members[c]) + pending
        left = [c for c in range(16 * segments) if c not in read and members[c]]
        sizes = torch.tensor([len(members[c]) for c in left])
        heavy = logits[:, left] + sizes.log()
        means = torch.stack([values[head, members[c]].mean(0) for c in left])
        close(selection.estimate.lse[3 * head : 3 * head + 3], heavy.logsumexp(1))
        close(selection.estimate.out[3 * head : 3 * head + 3], heavy.softmax(1) @ means)


def test_keys_that_are_alike_are_estimated_without_loss() -> None:
    far, query = make_far(1024, spread=1e-3, count=6), make_query()
    exact = attend_all(query, far)
    got = result(chosen(index_of(Clusters(), 40, far), query, far), query, far)
    blind = result(chosen(index_of(Clusters(estimated=0.0), 40, far), query, far), query, far)
    assert (got.out - exact.out).norm() < 0.05 * (blind.out - exact.out).norm()
    assert (got.lse <= exact.lse + 1e-4).all()  # Jensen: never too much
    assert (blind.lse < got.lse).all()


def test_a_share_of_the_clusters_is_estimated() -> None:
    far, query = make_far(1024), make_query()
    masses = []
    for estimated in (0.0, 0.1, 0.5, 1.0):
        selection = chosen(index_of(Clusters(estimated=estimated), 100, far), query, far)
        assert (selection.estimate is None) == (estimated == 0)
        masses.append(result(selection, query, far).lse)
    for less, more in itertools.pairwise(masses):
        assert (less < more).all()


def test_error_falls_with_the_budget() -> None:
    far, query = make_far(2000), make_query()
    exact = attend_all(query, far)
    errors = [
        float(
            (
                result(chosen(index_of(Clusters(), b, far), query, far), query, far).out - exact.out
            ).norm()
        )
        for b in (250, 900, 1990)
    ]
    assert errors[0] > errors[1] > errors[2]


def test_it_does_not_matter_how_keys_come() -> None:
    far, query = make_far(1300), make_query()
    want = chosen(index_of(Clusters(), 300, far), query, far)
    index = index_of(Clusters(), 300, far, steps=11)
    assert rows_of(chosen(index, query, far)) == rows_of(want)
    mark = index.mark()
    longer = FarView(torch.cat([far.rows[:, :1300], make_far(600).rows[:, :600]], 1), 1900)
    index.extend(0, longer)
    assert rows_of(chosen(index, query, longer)) != rows_of(want)
    index.rewind(mark)
    assert rows_of(chosen(index, query, far)) == rows_of(want)


def test_budgets_at_the_borders() -> None:
    far, query = make_far(600), make_query()
    index = index_of(Clusters(), 1, far)
    rows = rows_of(chosen(index, query, far))
    assert all(88 < len(row) < 600 for row in rows)  # one cluster, and what is in none
    for budget in (600, 700):
        assert index_of(Clusters(), budget, far).select(0, query, far, 0) is ALL
    few = FarView(far.rows, 100)
    selection = chosen(index_of(Clusters(), 50, few), query, few)
    assert rows_of(selection) == [list(range(100))] * 2
    assert selection.estimate is None
    # all clusters are read, so nothing is left to estimate
    whole = FarView(far.rows, 512)
    all_but_one = chosen(index_of(Clusters(), 511, whole), query, whole)
    close(result(all_but_one, query, whole).lse, attend_all(query, whole).lse, atol=0.1, rtol=0.0)


def test_arrays_that_would_lead_astray_are_refused() -> None:
    far = make_far(600)
    index = index_of(Clusters(), 100, far)
    for name, changed in (("0.members", 0), ("0.members", 300), ("0.sizes", -1), ("0.sizes", 17)):
        arrays = {key: np.array(array) for key, array in index.arrays().items()}
        arrays[name][1, 1, :] = changed
        with pytest.raises(ValueError, match=r"cluster"):
            ClusterIndex(Clusters(), GEOMETRY, Budget(100)).restore(arrays, 600)


def test_a_step_merges_what_was_estimated_on_the_cpu_and_between_processors() -> None:
    prompt, answer = tokens(900), tokens(3, seed=1)
    engine = tiny_engine(policy="clusters", budget=400)
    want = decode(engine, read(engine, prompt), answer)
    without = tiny_engine(policy="clusters:estimated=0.0", budget=400)
    assert (decode(without, read(without, prompt), answer) - want).abs().max() > 1e-3
    engine._stepper = Stepper(engine.decoder, 1, by_micro_batches=True)
    torch.testing.assert_close(
        decode(engine, read(engine, prompt), answer), want, rtol=2e-4, atol=2e-4
    )


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("clusters:keys=7", "clusters' keys must divide 256, like 8, 16 or 32. Got 7."),
        ("clusters:estimated=2", "clusters' estimated must be between 0 and 1. Got 2.0."),
    ],
)
def test_values_that_cannot_be_used(spec: str, text: str) -> None:
    with pytest.raises(InvalidOptionError, match=f"^{re.escape(text)}$"):
        create_policy(spec)

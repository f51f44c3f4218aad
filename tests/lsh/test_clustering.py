"""Clusters against k-means written out set by set, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from nearfar.lsh.clustering import ITERATIONS, cluster_by_angle


def unit(x: NDArray[np.float64]) -> NDArray[np.float64]:
    lengths: NDArray[np.float64] = np.linalg.norm(x, axis=-1, keepdims=True)
    return x / lengths


def written_out(keys: NDArray[np.float64], count: int, rounds: int) -> NDArray[np.int64]:
    n = len(keys)
    points = unit(keys - keys.mean(0))
    centres = [points[i * n // count] for i in range(count)]
    for _ in range(rounds):
        member = np.array([np.argmax([p @ c for c in centres]) for p in points])
        for i in range(count):
            if (member == i).any():
                centres[i] = unit(points[member == i].sum(0))
    return np.array([np.argmax([p @ c for c in centres]) for p in points])


@pytest.mark.parametrize("sets", [(), (5,), (2, 3)])
@pytest.mark.parametrize(("n", "D", "count"), [(40, 3, 7), (31, 5, 4), (9, 2, 9)])
def test_clusters_are_those_of_spherical_k_means(
    sets: tuple[int, ...], n: int, D: int, count: int
) -> None:
    rng = np.random.default_rng(n)
    # away from the origin and of other lengths
    keys = rng.standard_normal((*sets, n, D)) * rng.uniform(0.1, 3, (*sets, n, 1)) + 1
    got = cluster_by_angle(torch.from_numpy(keys).float(), count)
    assert got.dtype == torch.int64
    want = [written_out(own, count, ITERATIONS) for own in keys.reshape(-1, n, D)]
    np.testing.assert_array_equal(got.numpy(), np.reshape(want, (*sets, n)))

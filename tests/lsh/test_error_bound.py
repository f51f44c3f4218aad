"""The estimated error of a sample against its formulas, written out key by key in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nearfar.lsh.error_bound import sample_error


@pytest.mark.parametrize(("G", "m", "D"), [(1, 1, 3), (3, 17, 5), (2, 40, 7)])
def test_it_is_that_of_horvitz_and_thompson(G: int, m: int, D: int) -> None:
    rng = np.random.default_rng(m)
    query, keys = rng.standard_normal((G, D)) / D, rng.standard_normal((m, D))
    values, pi = rng.standard_normal((m, D)) + 1, rng.uniform(0.05, 1, m)
    pi[0] = 1  # read for certain
    given = (torch.from_numpy(each).float() for each in (query, keys, values, -np.log(pi)))
    got = sample_error(*given)
    for g in range(G):
        counts = [np.exp(query[g] @ keys[i]) / pi[i] for i in range(m)]
        p = [count / sum(counts) for count in counts]
        out = sum(p[i] * values[i] for i in range(m))
        lone = [(1 - pi[i]) * p[i] ** 2 for i in range(m)]
        variance = sum(lone[i] * ((values[i] - out) ** 2).sum() for i in range(m))
        wanted = (np.sqrt(variance) / np.linalg.norm(out), np.sqrt(sum(lone)), p @ pi)
        for error, want in zip(got, wanted, strict=True):
            # |v - out|^2 is a difference of float32 squares
            assert float(error[g]) == pytest.approx(want, rel=1e-3, abs=1e-4)

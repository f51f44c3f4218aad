from __future__ import annotations

import pytest
from kernel_cases import close, integers, poisoned, random
from test_coded_keys import SHAPES, encoded
from test_rotated_query_planes import turned

from nearfar.gpu_kernels.code_scores import TILE_KEYS, score_codes, score_codes_reference
from nearfar.gpu_kernels.coded_keys import write_codes, write_codes_reference
from nearfar.gpu_kernels.rotated_query_planes import quantise_queries, turn_queries_reference
from nearfar.gpu_kernels.rows import RowTable


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize(("G", "Hkv", "D"), SHAPES)
def test_scores_of_a_ragged_batch(bits: int, G: int, Hkv: int, D: int) -> None:
    lengths, capacity, segments, size = (0, 1, 1024 + 77), 2048, 2, 1024
    tables = [
        encoded(write_codes_reference, random(Hkv, max(n, 1), D, seed=n), bits, 0, room)
        for n, room in zip(lengths, (1024, 1024, 2048), strict=True)
    ]
    codes, factors = (RowTable.of([t[which] for t in tables]) for which in (0, 1))
    planes, sums = turned(turn_queries_reference, random(3, Hkv * G, D), D, bits, Hkv)
    results = []
    for score in (score_codes, score_codes_reference):
        scores, peaks = poisoned(3, Hkv, G, capacity), poisoned(3, Hkv, G, segments, 2)
        score(planes, sums, codes, factors, integers(*lengths), 0.7, size, scores, peaks)
        for b, length in enumerate(lengths):
            scores[b, :, :, length : -(-length // TILE_KEYS) * TILE_KEYS] = 0.0
        results.append((scores, peaks))
    for got, want in zip(*results, strict=True):
        close(got, want, equal_nan=True, rtol=1e-4, atol=1e-4)


def test_a_score_is_near_the_dot_product() -> None:
    D, n = 128, 300
    keys, query = random(1, n, D), random(1, 2, D)
    codes, factors = encoded(write_codes, keys, 4)
    planes, sums = turned(quantise_queries, query, D, 4, 1)
    scores, peaks = poisoned(1, 1, 2, 1024), poisoned(1, 1, 2, 1, 2)
    tables = (RowTable.of([codes]), RowTable.of([factors]))
    score_codes(planes, sums, *tables, integers(n), 1.0, 1024, scores, peaks)
    exact = query[0] @ (keys[0] - keys[0].mean(0) * 0.5).T
    error = (scores[0, 0, :, :n] - exact).std() / (
        query[0].norm(dim=1).mean() * keys.norm(dim=2).mean()
    )
    assert error < 0.0125  # docs/retrieval.md: tan of the code's angle / sqrt(D - 1) is 0.0096

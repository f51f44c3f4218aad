"""Samples have the size and law that was asked for; weighted sums over them are unbiased."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from nearfar.lsh.sampling import Weighing, draw_keys, sample_by_weight, weighing_bytes
from nearfar.lsh.sketch_reference import horvitz_thompson, read_probabilities
from nearfar.records import Selection

Array = NDArray[Any]
DRAWS = 4000
SCRATCH = ("numerators", "tops", "masses", "weights", "indices")


def make_scores(heads: int, N: int, spread: float) -> Array:
    rng = np.random.default_rng(heads * N)
    return (spread * rng.standard_normal((heads, N))).astype(np.float32)


def many_draws(scores: Array, budget: int, temper: float, draws: int = DRAWS) -> Selection:
    """As many rows of equal scores [heads, N], each with a seed of its own."""
    N = scores.shape[1]
    padded = np.full((draws, len(scores), N + 3), np.nan, np.float32)
    padded[..., :N] = scores
    keys = np.concatenate([draw_keys(seed, 3, 5, 4) for seed in range(draws // 4)])
    return sample_by_weight(padded, N, budget, temper, keys)


def rows_of(selection: Selection) -> list[tuple[Array, Array]]:
    """Indices and log-weights of each row."""
    borders = selection.offsets[1:-1]
    indices = np.split(selection.indices, borders)
    return list(zip(indices, np.split(selection.log_weights, borders), strict=True))


def test_random_keys_differ_by_seed_layer_step_and_row() -> None:
    drawn = [
        draw_keys(seed, layer, step, 8)
        for seed in range(6)
        for layer in range(6)
        for step in range(6)
    ]
    keys = np.concatenate(drawn)
    assert keys.dtype == np.uint32
    assert len(set(keys.tolist())) == len(keys)
    assert draw_keys(1, 2, 3, 8).tolist() == drawn[36 + 12 + 3].tolist()
    assert draw_keys(1, 2, 3, 5).tolist() == drawn[36 + 12 + 3][:5].tolist()
    assert draw_keys(2**63, 0, 0, 1) != draw_keys(2**62, 0, 0, 1)


def test_a_sample_is_a_selection() -> None:
    scores = np.stack([make_scores(3, 77, 2.0), make_scores(3, 77, 0.1)])
    selection = sample_by_weight(scores, 77, 20, 1.0, draw_keys(0, 0, 0, 2))
    assert selection.heads_per_row == 3
    assert selection.indices.dtype == np.int32
    assert selection.offsets.dtype == np.int64
    assert selection.log_weights.dtype == np.float32
    assert selection.offsets[0] == 0
    assert selection.offsets[-1] == len(selection.indices) == len(selection.log_weights)
    for indices, log_weights in rows_of(selection):
        assert (np.diff(indices) > 0).all()
        assert 0 <= indices[0] <= indices[-1] < 77
        assert (log_weights >= 0).all()


@pytest.mark.parametrize(
    ("heads", "N", "spread", "budget", "temper"),
    [(1, 60, 1.0, 1, 1.0), (3, 64, 2.0, 13, 1.0), (7, 301, 3.0, 40, 0.7), (2, 33, 1.0, 32, 1.0)],
)
def test_inclusion_follows_the_exact_law(
    heads: int, N: int, spread: float, budget: int, temper: float
) -> None:
    scores = make_scores(heads, N, spread)
    probabilities = read_probabilities(scores.astype(np.float64), budget, temper)
    selection = many_draws(scores, budget, temper)
    share = np.bincount(selection.indices, minlength=N) / DRAWS
    error = np.sqrt(probabilities * (1 - probabilities) / DRAWS)
    assert (np.abs(share - probabilities) <= 5 * error + 2e-3 * (error < 1e-3)).all()
    want = -np.log(probabilities)[selection.indices]
    np.testing.assert_allclose(selection.log_weights, want, rtol=1e-4, atol=1e-5)

    counts = np.diff(selection.offsets)
    variance = (probabilities * (1 - probabilities)).sum()
    assert abs(counts.mean() - budget) <= 4 * np.sqrt(variance / DRAWS)
    assert counts.var() == pytest.approx(variance, rel=0.12)


@pytest.mark.parametrize("budget", [1, 7, 20, 59])
@pytest.mark.parametrize(("heads", "temper", "spread"), [(1, 1.0, 1.0), (3, 1.0, 1.5), (3, 0.7, 2)])
def test_the_weighted_sum_is_unbiased(
    heads: int, temper: float, spread: float, budget: int
) -> None:
    scores = make_scores(heads, 60, spread)
    function = np.random.default_rng(1).uniform(0.2, 2, 60)

    def deviation(log_weights: Array) -> float:
        """Of the mean estimate from the full sum, in standard errors."""
        terms = function[selection.indices] * np.exp(log_weights)
        sums = np.bincount(row, terms, DRAWS)
        return float(abs(sums.mean() - function.sum()) / (sums.std() / np.sqrt(DRAWS)))

    selection = many_draws(scores, budget, temper)
    row = np.repeat(np.arange(DRAWS), np.diff(selection.offsets))
    assert deviation(selection.log_weights) < 4
    assert deviation(np.zeros_like(selection.log_weights)) > 10


def test_the_weighted_sum_is_the_reference_estimate() -> None:
    scores = make_scores(3, 120, 2.0)
    probabilities = read_probabilities(scores.astype(np.float64), 30, 1.0)
    function = np.random.default_rng(2).standard_normal(120)
    for indices, log_weights in rows_of(many_draws(scores, 30, 1.0, 20)):
        got = (function[indices] * np.exp(log_weights)).sum()
        assert got == pytest.approx(horvitz_thompson(function, probabilities, indices), rel=1e-4)


def test_values_in_proportion_to_weight_vary_with_the_count_alone() -> None:
    """Each key that is read then stands for the same amount: the reason to sample by weight."""
    scores = make_scores(1, 500, 1.0)
    function = np.exp(scores[0].astype(np.float64))
    for indices, log_weights in rows_of(many_draws(scores, 25, 1.0, 40)):
        estimate = (function[indices] * np.exp(log_weights)).sum()
        assert estimate / function.sum() == pytest.approx(len(indices) / 25, rel=1e-3)


def test_heavy_keys_are_always_read_and_equal_ones_equally_often() -> None:
    scores = np.zeros((1, 101), np.float32)
    scores[0, [17, 90]] = 30
    selection = many_draws(scores, 12, 1.0)
    for indices, log_weights in rows_of(selection):
        heavy = np.isin(indices, (17, 90))
        assert heavy.sum() == 2
        assert np.abs(log_weights[heavy]).max() < 1e-6
        np.testing.assert_allclose(log_weights[~heavy], np.log(99 / 10), rtol=1e-4)

    flat = many_draws(np.zeros((3, 101), np.float32), 12, 1.0, 8)
    np.testing.assert_allclose(flat.log_weights, np.log(101 / 12), rtol=1e-5)


def test_a_smaller_temper_reads_light_keys_more_often() -> None:
    scores = np.linspace(-4, 4, 200, dtype=np.float32)[None]
    light = [
        (many_draws(scores, 20, temper, 400).indices < 100).mean() for temper in (1.0, 0.7, 0.01)
    ]
    assert light[0] < 0.5 * light[1] < 0.25 * light[2]
    assert light[2] == pytest.approx(0.5, abs=0.03)


def test_a_constant_per_head_changes_nothing() -> None:
    # in eighths, so that sums with the constants are exact
    scores: Array = np.round(8 * make_scores(3, 90, 2.0)) / np.float32(8)
    shifted: Array = scores + np.array([[0], [-64], [128]], np.float32)
    keys = draw_keys(0, 0, 0, 1)
    first = sample_by_weight(scores[None].copy(), 90, 11, 1.0, keys)
    second = sample_by_weight(shifted[None].copy(), 90, 11, 1.0, keys)
    assert first.indices.tolist() == second.indices.tolist()
    np.testing.assert_allclose(first.log_weights, second.log_weights, atol=1e-5)


def test_scratch_is_kept_while_its_size_is_the_same_and_its_bytes_are_known() -> None:
    weighing = Weighing(2, 3, 6)
    assert weighing.draw(5, 1.0, draw_keys(0, 0, 0, 6)).offsets.tolist() == [0] * 7
    for num_keys in (1, 700, 5000):
        weighing.reserve(num_keys)
        arrays = [getattr(weighing, name) for name in SCRATCH]
        weighing.reserve(num_keys)
        for name, array in zip(SCRATCH, arrays, strict=True):
            assert getattr(weighing, name) is array
        assert weighing_bytes(2, 3, 6, num_keys) == sum(array.nbytes for array in arrays)

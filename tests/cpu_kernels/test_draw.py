"""Uniform numbers, the sampling constant and draw_by_weight against float64 and against chance."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import pytest

from nearfar.cpu_kernels import draw, sketch_reference, weigh
from nearfar.cpu_kernels.bits import lowest_bit
from nearfar.cpu_kernels.compile import set_threads
from nearfar.cpu_kernels.sketch_codes import RUN_KEYS
from nearfar.cpu_kernels.sketch_reference import Array, inclusion_probabilities, uniforms
from nearfar.cpu_kernels.vectors import LANES
from nearfar.cpu_kernels.weigh import padded_keys

HOW = pytest.mark.parametrize("how", ["compiled", "interpreted"])
KEYS = [0, 1, 2, 3, 2**31, 2**32 - 1, 0x9E3779B9, 123_456_789]


def pick(function: Any, how: str) -> Any:
    return function if how == "compiled" else function.py_func


@pytest.fixture(autouse=True)
def _hashes_wrap_around() -> Any:
    with np.errstate(over="ignore"):
        yield


@HOW
def test_uniform_equals_its_reference_and_stays_below_one(how: str) -> None:
    for key in KEYS:
        want = uniforms(3000, key)
        got = [float(pick(draw.uniform, how)(counter, np.uint32(key))) for counter in range(3000)]
        assert got == want.tolist()
        assert 0 <= min(got) < max(got) < 1


def chi_square(counts: Array) -> float:
    """Deviations of the statistic from its mean, in standard deviations, for equal cells."""
    expected = counts.sum() / counts.size
    statistic = ((counts - expected) ** 2 / expected).sum()
    freedom = counts.size - 1
    return float((statistic - freedom) / np.sqrt(2 * freedom))


@pytest.mark.parametrize("key", KEYS)
def test_uniform_numbers_fill_the_interval_evenly(key: int) -> None:
    u = uniforms(2**17, key)
    for cells in (2, 10, 128, 1024):
        assert abs(chi_square(np.histogram(u, cells, (0, 1))[0])) < 5
    low = (u * 2**24).astype(np.int64) % 256  # the bits that decide small probabilities
    assert abs(chi_square(np.bincount(low, minlength=256))) < 5


def test_uniform_numbers_of_other_keys_and_counters_are_independent() -> None:
    n = 2**16
    first = uniforms(n + 64, 77)
    others = [uniforms(n, 77 ^ (1 << bit)) for bit in range(32)]
    others += [uniforms(n, 77 + 1), uniforms(n, 0), uniforms(n, 0x9E3779B9 * 5 % 2**32)]
    others += [first[lag : lag + n] for lag in (1, 2, 3, 64)]
    for other in others:
        pairs = np.histogram2d(first[:n], other, 12, [[0, 1], [0, 1]])[0]
        assert abs(chi_square(pairs)) < 5
    assert chi_square(np.histogram2d(first[:n], first[:n], 12, [[0, 1], [0, 1]])[0]) > 1000


WEIGHTS: dict[str, Array] = {
    "equal": np.full(100, 0.01),
    "one dominates": np.array([1.0, *np.full(99, 1e-9)]),
    "two dominate": np.array([*np.full(50, 1e-6), 0.5, *np.full(49, 1e-6), 0.5]),
    "all scales": np.geomspace(1e-30, 1, 100),
    "linear": np.linspace(0.001, 1, 100),
    "gaussian logits": np.exp(3 * np.random.default_rng(1).standard_normal(5001)),
    "three keys": np.array([0.2, 0.5, 0.3]),
    "two keys": np.array([1e-20, 1.0]),
}


@HOW
@pytest.mark.parametrize("name", WEIGHTS)
def test_the_constant_is_the_exact_one(name: str, how: str) -> None:
    weights = (WEIGHTS[name] / WEIGHTS[name].sum()).astype(np.float32)
    N = len(weights)
    for wanted in sorted({1, 2, N // 10, N // 2, N - 2, N - 1} & set(range(1, N))):
        constant = pick(draw.sampling_constant, how)(weights, wanted)
        got = np.minimum(1, np.float64(constant) * weights)
        np.testing.assert_allclose(got, inclusion_probabilities(weights, wanted), rtol=2e-4)
        assert got.sum() == pytest.approx(wanted, rel=2e-4)


def test_the_reference_solves_its_equation() -> None:
    for weights in WEIGHTS.values():
        for wanted in range(1, min(len(weights), 200)):
            probabilities = inclusion_probabilities(weights, wanted)
            assert probabilities.sum() == pytest.approx(wanted, rel=1e-9)
            light = probabilities < 1
            ratios = probabilities[light] / weights[light]
            if light.any():
                np.testing.assert_allclose(ratios, ratios[0], rtol=1e-9)
                # a certain key would be so under the others' constant too
                assert (weights[~light] * ratios[0] >= 1 - 1e-9).all()


@HOW
def test_a_key_without_weight_is_never_read(how: str) -> None:
    weights = np.array([0.5, 0.0, 0.5, 0.0, 0.0], np.float32)
    for wanted in (1, 2, 3, 4):
        constant = pick(draw.sampling_constant, how)(weights, wanted)
        probabilities = np.minimum(1, constant * weights)
        np.testing.assert_allclose(probabilities, weights * 2 * min(wanted, 2) / 2, rtol=1e-6)


def weighed(scores: Array, N: int, temper: float, how: str) -> tuple[Array, Array, Array]:
    """Numerators, tops and masses of scores [R, G, >= N]."""
    R, G, _ = scores.shape
    runs = padded_keys(N) // RUN_KEYS
    numerators = np.full((R, G, padded_keys(N)), np.nan, np.float32)
    tops, masses = np.full((2, R, runs, G), np.nan, np.float32)
    pick(weigh.weigh_scores, how)(scores, N, temper, numerators, tops, masses)
    return numerators, tops, masses


def mean_weights(scores: Array, N: int, temper: float, how: str) -> Array:
    """Of one row of heads [G, >= N]."""
    numerators, tops, masses = weighed(scores[None], N, temper, how)
    weights = np.full((1, padded_keys(N)), np.nan, np.float32)
    mean = pick(draw.mean_weights, how)
    mean(numerators[0], tops[0], masses[0], 0, len(scores), np.float32(temper), 0, weights)
    assert not weights[0, N:].any()
    return weights[0, :N]


@HOW
@pytest.mark.parametrize("N", [1, 2, 255, RUN_KEYS, RUN_KEYS + 1, 2 * RUN_KEYS + 77])
def test_mean_weights_equal_their_reference(N: int, how: str) -> None:
    for G, spread in [(1, 1.0), (3, 10.0), (7, 0.0)]:
        scores = (spread * np.random.default_rng(N).standard_normal((G, N + 9))).astype(np.float32)
        scores[:, N:] = np.nan
        for temper in (1.0, 0.7):
            want = sketch_reference.softmax_mean(scores[:, :N], temper)
            np.testing.assert_allclose(mean_weights(scores, N, temper, how), want, rtol=2e-5)


@HOW
def test_mean_weights_survive_extreme_scores(how: str) -> None:
    for scores in ([[1e30, 0, -1e30]], [[3e4, 3e4, -3e4]], [[-500, -500, -500]], [[0, 0, 0]]):
        array = np.array(scores, np.float32)
        want = sketch_reference.softmax_mean(array, 1.0)
        got = mean_weights(array, 3, 1.0, how)
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-37)


def test_runs_far_apart_are_weighed_together() -> None:
    """The heaviest keys of one run are nothing beside those of another."""
    scores = np.zeros((2, 3 * RUN_KEYS), np.float32)
    scores[0, RUN_KEYS : 2 * RUN_KEYS] = 60
    scores[1, -1] = 300
    got = mean_weights(scores, scores.shape[1], 1.0, "compiled")
    np.testing.assert_allclose(
        got, sketch_reference.softmax_mean(scores, 1.0), rtol=1e-5, atol=1e-37
    )


def drawn(scores: Array, wanted: list[int], N: int, temper: float, how: str) -> list[Any]:
    """Indices and log-weights of each row's keys."""
    R = len(scores)
    numerators, tops, masses = weighed(scores, N, temper, "compiled")
    weights = np.full((R, padded_keys(N)), np.nan, np.float32)
    indices, counts = np.full(weights.shape, -1, np.int32), np.full(R, -1, np.int64)
    arguments = (np.array(wanted, np.int64), temper, row_keys(R), weights, indices, counts)
    pick(draw.draw_by_weight, how)(numerators, tops, masses, *arguments)
    return [(indices[r, :n], weights[r, :n]) for r, n in enumerate(counts)]


def row_keys(R: int) -> Array:
    return np.arange(R, dtype=np.uint32) * np.uint32(7919)


@HOW
@pytest.mark.parametrize("temper", [1.0, 0.7])
def test_draws_equal_the_reference(temper: float, how: str) -> None:
    cases = [(1, 2, [1]), (7, 65, [1, 30, 64]), (3, 301, [150, 299, 20]), (1, 600, [2, 599])]
    for G, N, wanted in cases:
        rng = np.random.default_rng(N)
        scores = (3 * rng.standard_normal((len(wanted), G, N + 5))).astype(np.float32)
        got = drawn(scores, wanted, N, temper, how)
        keys = row_keys(len(wanted))
        want = sketch_reference.draw_by_weight(scores, N, np.array(wanted), temper, keys)
        for (indices, log_weights), (true_indices, true_log_weights) in zip(got, want, strict=True):
            assert indices.tolist() == true_indices.tolist()
            np.testing.assert_allclose(log_weights, true_log_weights, rtol=1e-4, atol=1e-5)


def test_heads_with_rows_of_their_own_draw_as_groups_of_one() -> None:
    scores = np.random.default_rng(5).standard_normal((2, 3, 1500)).astype(np.float32)
    numerators, tops, masses = weighed(scores, 1500, 1.0, "compiled")
    weights = np.full((6, padded_keys(1500)), np.nan, np.float32)
    indices, counts = np.full(weights.shape, -1, np.int32), np.full(6, -1, np.int64)
    arguments = (np.full(6, 40), 1.0, row_keys(6), weights, indices, counts)
    draw.draw_by_weight(numerators, tops, masses, *arguments)
    alone = drawn(scores.reshape(6, 1, 1500), [40] * 6, 1500, 1.0, "compiled")
    for r, (own_indices, own_log_weights) in enumerate(alone):
        assert indices[r, : counts[r]].tolist() == own_indices.tolist()
        np.testing.assert_array_equal(weights[r, : counts[r]], own_log_weights)


def test_lanes_decide_by_the_uniform_numbers() -> None:
    probabilities = np.random.default_rng(0).random((2, 4 * LANES)).astype(np.float32)
    for key in KEYS:
        want = uniforms(4 * LANES, key) < probabilities[1].astype(np.float64)
        for first in range(0, 4 * LANES, LANES):
            mask = draw.drawn_lanes(probabilities, 1, first, np.float32(1), np.uint32(key))
            got = [bool(mask >> lane & 1) for lane in range(LANES)]
            assert got == want[first : first + LANES].tolist()
    masks = (1, 2, 12, 2**31, 3 * 2**40, 2**63)
    assert [lowest_bit(np.uint64(mask)) for mask in masks] == [0, 1, 2, 31, 40, 63]


def test_draws_do_not_depend_on_threads() -> None:
    scores = np.random.default_rng(0).standard_normal((9, 3, 1000)).astype(np.float32)
    runs, before = [], numba.get_num_threads()
    for threads in (1, before):
        set_threads(threads)
        rows = drawn(scores, [50] * 9, 1000, 1.0, "compiled")
        runs.append([(indices.tolist(), weights.tolist()) for indices, weights in rows])
    assert runs[0] == runs[1]
    assert len({str(indices) for indices, _ in runs[0]}) == 9


@HOW
def test_a_light_key_that_is_read_counts_by_the_chance_that_it_had(how: str) -> None:
    """Its number is 0, which is below any probability: so it had the chance of one in 2^24."""
    N, light = 40, 17
    scores = np.zeros((1, 1, N), np.float32)
    scores[..., light] = -30  # 4e-15 of the probability that the other keys have
    numerators, tops, masses = weighed(scores, N, 1.0, "compiled")
    weights = np.full((1, padded_keys(N)), np.nan, np.float32)
    indices, counts = np.full(weights.shape, -1, np.int32), np.full(1, -1, np.int64)
    key = np.array([light * 0x9E3779B9 % 2**32], np.uint32)
    assert uniforms(N, int(key[0]))[light] == 0
    arguments = (np.array([20]), 1.0, key, weights, indices, counts)
    pick(draw.draw_by_weight, how)(numerators, tops, masses, *arguments)
    [place] = np.flatnonzero(indices[0, : counts[0]] == light)
    assert weights[0, place] == pytest.approx(24 * np.log(2), rel=1e-6)

"""write_codes and score_codes against their float64 reference, compiled and interpreted."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from nearfar.cpu_kernels import sketch_codes, sketch_reference
from nearfar.cpu_kernels.sketch_codes import RUN_KEYS, round_queries, words_per_key
from nearfar.cpu_kernels.sketch_reference import Array, read_levels
from nearfar.cpu_kernels.sketch_scan import BLOCK_KEYS
from nearfar.lsh.sketch import LEVEL_WIDTH

HEAD_DIMS = [1, 7, 33, 64, 80, 96, 128, 256]
BITS = [1, 2, 3, 4]
UNTOUCHED = 0xDEADBEEF


def make_keys(n: int, D: int) -> Array:
    sizes = np.random.default_rng(D).uniform(0.1, 10, (n, 1))
    return (np.random.default_rng(n).standard_normal((n, D)) * sizes).astype(np.float32)


def make_queries(Hkv: int, G: int, D: int) -> tuple[Array, Array]:
    """Queries of int8 and their scales."""
    queries = np.random.default_rng(G).standard_normal((Hkv, G, D)).astype(np.float32)
    return round_queries(queries)


def encode(write: Any, y: Array, bits: int, first: int = 0) -> tuple[Array, Array]:
    """Words and factors with room for one block more than is needed, full of a pattern."""
    blocks = -(-(first + len(y)) // BLOCK_KEYS) + 1
    words = np.full((blocks, words_per_key(y.shape[1], bits), BLOCK_KEYS), UNTOUCHED, np.uint32)
    factors = np.full(blocks * BLOCK_KEYS, np.nan, np.float32)
    write(y, first, bits, LEVEL_WIDTH[bits], words, factors)
    return words, factors


def check_codes(y: Array, bits: int, first: int, got: Any, want: Any) -> None:
    """Equal, but that a value within rounding of a border between levels may go either way."""
    span = slice(first, first + len(y))
    levels = [read_levels(words, bits, y.shape[1])[span] for words, _ in (got, want)]
    width = np.sqrt((y.astype(np.float64) ** 2).mean(1, keepdims=True)) * LEVEL_WIDTH[bits]
    border = np.abs(y / width - np.round(y / width)) < 1e-5
    differ = levels[0] != levels[1]
    assert not (differ & ~border).any()
    assert np.abs(levels[0] - levels[1]).max(initial=0) <= 1
    same = ~differ.any(1)
    assert same.mean() > 0.9
    np.testing.assert_array_equal(_words(got[0])[span][same], _words(want[0])[span][same])
    np.testing.assert_allclose(got[1][span][same], want[1][span][same], rtol=1e-5)
    for key in (*range(first), *range(span.stop, len(got[1]))):
        assert (_words(got[0])[key] == UNTOUCHED).all()
        assert np.isnan(got[1][key])


def _words(words: Array) -> Array:
    """Words [keys, W]."""
    return words.transpose(0, 2, 1).reshape(-1, words.shape[1])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("D", HEAD_DIMS)
def test_codes_and_factors_equal_the_reference(bits: int, D: int) -> None:
    for n, first in [(1, 0), (63, 0), (64, 0), (65, 0), (1, 63), (3, 62), (129, 31), (500, 200)]:
        y = make_keys(n, D)
        got = encode(sketch_codes.write_codes, y, bits, first)
        check_codes(y, bits, first, got, encode(sketch_reference.write_codes, y, bits, first))


@pytest.mark.parametrize("bits", BITS)
def test_interpreted_codes_equal_the_reference(bits: int) -> None:
    y = make_keys(70, 33)
    got = encode(sketch_codes.write_codes.py_func, y, bits, 61)
    check_codes(y, bits, 61, got, encode(sketch_reference.write_codes, y, bits, 61))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("D", HEAD_DIMS)
def test_scores_equal_the_reference(bits: int, D: int) -> None:
    for length, G in [(1, 1), (63, 3), (64, 1), (65, 7), (600, 2)]:
        check_scores(sketch_codes.score_codes, length, G, D, bits)


def test_scores_of_many_blocks_equal_the_reference() -> None:
    check_scores(sketch_codes.score_codes, 3 * RUN_KEYS - 1, 1, 7, 4)


@pytest.mark.parametrize("bits", BITS)
def test_interpreted_scores_equal_the_reference(bits: int) -> None:
    check_scores(sketch_codes.score_codes.py_func, 70, 3, 33, bits)


def check_scores(score: Any, length: int, G: int, D: int, bits: int) -> None:
    blocks = -(-length // BLOCK_KEYS)
    coded = [encode(sketch_codes.write_codes, make_keys(length + h, D), bits) for h in range(2)]
    words = np.stack([words[:blocks] for words, _ in coded])
    factors = np.stack([factors[: blocks * BLOCK_KEYS] for _, factors in coded])
    queries, scales = make_queries(2, G, D)
    got, want = (np.full((2, G, blocks * BLOCK_KEYS), np.nan, np.float32) for _ in range(2))
    score(words, factors, queries, scales, length, bits, got)
    sketch_reference.score_codes(words, factors, queries, scales, length, bits, want)
    assert np.isnan(got[..., length:]).all()
    got, want = got[..., :length], want[..., :length]
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("coordinate", [127, -127, -128])
def test_the_largest_sums_are_exact(bits: int, coordinate: int) -> None:
    """Highest levels against the largest coordinates: no sum of the way may overflow."""
    D, n = 256, 2 * BLOCK_KEYS
    words = np.full((1, 2, words_per_key(D, bits), BLOCK_KEYS), 0xFFFFFFFF, np.uint32)
    queries = np.full((1, 3, D), coordinate, np.int8)
    queries[0, 1, ::3] = -queries[0, 1, ::3]
    inputs = (words, np.ones((1, n), np.float32), queries, np.ones((1, 3), np.float32), n, bits)
    got, want = np.empty((2, 1, 3, n), np.float32)
    sketch_codes.score_codes(*inputs, got)
    sketch_reference.score_codes(*inputs, want)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    assert abs(want[0, 0, 0]) == D * abs(coordinate) * (2**bits - 1) / 2


@pytest.mark.parametrize("bits", BITS)
def test_a_key_takes_its_bits_and_no_more(bits: int) -> None:
    assert words_per_key(128, bits) == 4 * bits
    assert words_per_key(1, bits) == (2 if bits == 3 else 1)
    assert words_per_key(33, bits) == {1: 2, 2: 3, 3: 5, 4: 5}[bits]


def test_queries_are_rounded_to_a_127th_of_their_largest_coordinate() -> None:
    queries = np.random.default_rng(0).standard_normal((2, 3, 45)).astype(np.float32)
    queries[1, 2] = 0
    rounded, scales = round_queries(queries)
    assert rounded.shape == (2, 3, 64)
    assert rounded.dtype == np.int8
    assert not rounded[..., 45:].any()
    assert np.abs(rounded).max(2).ravel().tolist() == [127] * 5 + [0]
    np.testing.assert_allclose(scales[:, :2], np.abs(queries[:, :2]).max(2) / 127, rtol=1e-6)
    assert (
        np.abs(rounded[..., :45] * scales[..., None] - queries) <= 0.501 * scales[..., None]
    ).all()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("D", [1, 33, 128])
def test_parallel_vectors_have_their_true_dot_product(bits: int, D: int) -> None:
    """But for the rounding of the query."""
    y = make_keys(65, D)
    words, factors = encode(sketch_codes.write_codes, y, bits)
    for key in (0, 40, 64):
        queries, scales = round_queries(np.outer([1, -2.5], y[key])[None].astype(np.float32))
        scores = np.empty((1, 2, len(factors)), np.float32)
        sketch_codes.score_codes(words[None], factors[None], queries, scales, 65, bits, scores)
        square = np.square(y[key], dtype=np.float64).sum()
        np.testing.assert_allclose(scores[0, :, key], [square, -2.5 * square], rtol=5e-3)


@pytest.mark.parametrize("function", ["compiled", "interpreted"])
@pytest.mark.parametrize("bits", BITS)
def test_a_zero_key_scores_zero(bits: int, function: str) -> None:
    y = make_keys(66, 7)
    y[[0, 64]] = 0
    write = sketch_codes.write_codes
    words, factors = encode(write if function == "compiled" else write.py_func, y, bits)
    assert (factors[[0, 64]] == 0).all()
    assert (factors[[1, 63, 65]] > 0).all()
    scores = np.empty((1, 3, len(factors)), np.float32)
    queries, scales = make_queries(1, 3, 7)
    sketch_codes.score_codes(words[None], factors[None], queries, scales, 66, bits, scores)
    assert (scores[..., [0, 64]] == 0).all()
    assert (scores[..., 1] != 0).all()


@pytest.mark.parametrize("bits", BITS)
def test_scaling_a_key_scales_its_factor_alone(bits: int) -> None:
    y = make_keys(30, 80)
    words, factors = encode(sketch_codes.write_codes, y, bits)
    for scale in (2.0**-20, 2.0**20):
        scaled = encode(sketch_codes.write_codes, y * np.float32(scale), bits)
        np.testing.assert_array_equal(_words(scaled[0])[:30], _words(words)[:30])
        np.testing.assert_allclose(scaled[1][:30], factors[:30] * scale, rtol=1e-6)


@pytest.mark.parametrize("bits", BITS)
def test_blocks_written_piece_by_piece_equal_one_go(bits: int) -> None:
    y = make_keys(300, 33)
    once = encode(sketch_codes.write_codes, y, bits)
    words, factors = np.zeros_like(once[0]), np.zeros_like(once[1])
    borders = [0, 1, 63, 64, 65, 190, 193, 256, 300]
    for start, stop in itertools.pairwise(borders):
        step = LEVEL_WIDTH[bits]
        sketch_codes.write_codes(y[start:stop], start, bits, step, words, factors)
    np.testing.assert_array_equal(_words(words)[:300], _words(once[0])[:300])
    np.testing.assert_array_equal(factors[:300], once[1][:300])

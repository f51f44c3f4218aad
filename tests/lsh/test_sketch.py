"""Sketches of far keys: equal to brute force, grown in any pieces, and exact to rewind."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sketch_cases import BITS, first, levels_of, make_far, make_query, scores_of, sketched

from nearfar.cpu_kernels.sketch_scan import BLOCK_KEYS
from nearfar.lsh import sketch
from nearfar.lsh.rotation import rotation
from nearfar.lsh.sketch import LEVEL_WIDTH, LayerSketch, sketch_bytes
from nearfar.lsh.sketch_reference import ReferenceSketch, sketch_keys
from nearfar.records import FarView


def brute_force(far: FarView, centred_over: int, bits: int) -> list[ReferenceSketch]:
    keys = far.keys().double().numpy()
    turn = rotation(far.head_dim).double().numpy()
    means = keys[:, :centred_over].mean(1)
    width = LEVEL_WIDTH[bits]
    return [sketch_keys(k, mean, turn, bits, width) for k, mean in zip(keys, means, strict=True)]


def check_against_brute_force(layer: LayerSketch, far: FarView, centred_over: int) -> None:
    query = make_query(3 * far.rows.shape[0], far.head_dim)
    got = scores_of(layer, query)
    assert got.shape == (far.rows.shape[0], 3, far.length)
    middle = (2**layer.bits - 1) / 2
    for head, reference in enumerate(brute_force(far, centred_over, layer.bits)):
        levels = levels_of(layer, far.head_dim)[head] - middle
        off = np.abs(levels - reference.levels)
        assert off.max() <= 1  # a value within rounding of a border
        assert off.mean() < 1e-3
        same = off.sum(1) == 0
        want = reference.scores(query[3 * head : 3 * head + 3].double().numpy())
        scale = np.abs(want).max()
        np.testing.assert_allclose(got[head][:, same], want[:, same], rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("D", [7, 33, 64, 80, 96, 128, 256])
def test_estimates_equal_brute_force(D: int, bits: int) -> None:
    far = make_far(131, D)
    for N in (2, 63, 64, 65, 131):
        check_against_brute_force(sketched(far, bits, N), first(far, N), N)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_estimates_are_those_of_the_stored_keys(dtype: torch.dtype) -> None:
    far = make_far(129, 64, dtype=dtype)
    check_against_brute_force(sketched(far, 4), far, 129)


@pytest.mark.parametrize("bits", BITS)
def test_odd_blocks_equal_one_go_with_the_same_mean(bits: int) -> None:
    far = make_far(397)
    lengths = [100, 101, 127, 128, 129, 192, 300, 301, 397]
    layer = sketched(far, bits, *lengths)
    check_against_brute_force(layer, far, centred_over=100)
    once = sketched(far, bits, 100, 397)
    assert layer.length == once.length == 397
    off = np.abs(levels_of(layer, 33) - levels_of(once, 33))
    assert off.max() <= 1
    assert off.mean() < 1e-4
    query = make_query(6, 33)
    got, want = scores_of(layer, query), scores_of(once, query)
    same = np.broadcast_to((off.sum(2) == 0)[:, None], got.shape)
    np.testing.assert_allclose(got[same], want[same], rtol=1e-4, atol=1e-4)


def test_keys_are_encoded_a_part_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    far = make_far(300)
    monkeypatch.setattr(sketch, "ENCODE_TOKENS", 77)
    check_against_brute_force(sketched(far, 3), far, 300)


def test_extending_by_nothing_changes_nothing() -> None:
    far = make_far(90)
    layer = sketched(far, 4)
    words = layer.mark().codes.words
    layer.extend(far)
    after = layer.mark()
    assert after.length == 90
    assert after.codes.words is words
    empty = LayerSketch(2, 33, 4)
    empty.extend(first(far, 0))
    assert empty.length == 0
    assert empty.num_bytes == 0
    empty.extend(far)
    np.testing.assert_array_equal(
        scores_of(empty, make_query(6, 33)), scores_of(layer, make_query(6, 33))
    )


@pytest.mark.parametrize("bits", BITS)
def test_equal_keys_score_zero(bits: int) -> None:
    """They are their own mean, so a score, which is up to a constant, says nothing of them."""
    for value in (0.0, 0.3, -700.0):
        rows = torch.full((2, 65, 66), value)
        layer = sketched(FarView(rows, 65), bits)
        scores = scores_of(layer, make_query(4, 33))
        assert np.isfinite(scores).all()
        assert np.abs(scores).max() <= 1e-5 * abs(value) * 33


@pytest.mark.parametrize("bits", BITS)
def test_one_key_scores_zero(bits: int) -> None:
    far = make_far(1)
    assert (scores_of(sketched(far, bits), make_query(2, 33)) == 0).all()


def test_keys_are_centred_anew_at_four_times_as_many() -> None:
    far = make_far(420)
    layer = sketched(far, 4, 100, 399, 400)
    assert layer.mark().centred_over == 100
    check_against_brute_force(layer, first(far, 400), centred_over=100)
    layer.extend(first(far, 401))
    assert layer.mark().centred_over == 401
    check_against_brute_force(layer, first(far, 401), centred_over=401)
    for length in (401, 420):
        layer.extend(first(far, length))
        check_against_brute_force(layer, first(far, length), centred_over=401)
    fresh, query = sketched(far, 4, 401, 420), make_query(6, 33)
    np.testing.assert_array_equal(scores_of(layer, query), scores_of(fresh, query))


@pytest.mark.parametrize("bits", BITS)
def test_rewinding_restores_the_sketch_across_a_new_mean(bits: int) -> None:
    far, query = make_far(700), make_query(6, 33)
    layer = sketched(far, bits, 70, 130)
    before, mark = scores_of(layer, query), layer.mark()
    mean = mark.mean
    for lengths in ([131], [140, 280], [150, 281], [700], [131, 699, 700]):
        for length in lengths:
            layer.extend(first(far, length))
        assert scores_of(layer, query).shape[2] == lengths[-1]
        layer.rewind(mark)
        assert layer.length == 130
        np.testing.assert_array_equal(scores_of(layer, query), before)
    assert layer.mark().mean is mean

    other = FarView(torch.cat([far.rows[:, :130], -far.rows[:, 130:290]], 1), 270)
    layer.extend(other)
    never = sketched(far, bits, 70, 130)
    never.extend(other)
    np.testing.assert_array_equal(scores_of(layer, query), scores_of(never, query))
    empty = LayerSketch(2, 33, bits)
    start = empty.mark()
    empty.extend(far)
    empty.rewind(start)
    empty.extend(first(far, 80))
    np.testing.assert_array_equal(
        scores_of(empty, query), scores_of(sketched(far, bits, 80), query)
    )


def test_a_new_mean_leaves_the_codes_of_a_mark_alone() -> None:
    """Also where its last block has room for four times its keys."""
    far, query = make_far(64), make_query(6, 33)
    layer = sketched(far, 4, 5)
    before, mark = scores_of(layer, query), layer.mark()
    layer.extend(first(far, 21))
    assert layer.mark().centred_over == 21
    layer.rewind(mark)
    np.testing.assert_array_equal(scores_of(layer, query), before)


def test_bytes_are_those_of_words_and_factors() -> None:
    for bits, words in [(1, 4), (2, 8), (3, 12), (4, 16)]:
        for N in (0, 1, 64, 65, 1000):
            blocks = -(-N // BLOCK_KEYS)
            assert sketch_bytes(8, 128, bits, N) == 8 * blocks * BLOCK_KEYS * (words + 1) * 4
    assert sketch_bytes(1, 128, 4, 64) == 64 * 68  # at 4 bits a key takes 68 bytes
    far = make_far(257)
    layer = sketched(far, 4)
    mark = layer.mark()
    assert (
        layer.num_bytes
        == sketch_bytes(2, 33, 4, 257)
        == mark.codes.words.nbytes + mark.codes.factors.nbytes
    )


def test_a_mark_keeps_no_copy_of_codes_that_grew() -> None:
    far = make_far(1100)
    layer = sketched(far, 4, 1024)
    mark = layer.mark()
    want = scores_of(layer, make_query(6, 33))
    layer.extend(far)
    grown = layer.mark().codes.words
    layer.rewind(mark)
    assert layer.length == 1024
    assert mark.codes.words is layer.mark().codes.words is grown
    np.testing.assert_array_equal(scores_of(layer, make_query(6, 33)), want)


def test_growing_takes_room_for_an_eighth_more() -> None:
    far = make_far(1100)
    layer = sketched(far, 4, 1024)
    exact = layer.num_bytes
    assert exact == sketch_bytes(2, 33, 4, 1024)
    layer.extend(first(far, 1025))
    assert layer.num_bytes == exact * 9 // 8
    grown = layer.mark().codes.words
    layer.extend(far)
    assert layer.mark().codes.words is grown

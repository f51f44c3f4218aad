"""The hash-table kernels against their NumPy references, compiled and interpreted."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from nearfar.cpu_kernels import angles, buckets, hash_codes, hash_reference
from nearfar.cpu_kernels.items import row_array

Array = np.ndarray[Any, Any]


def interpreted(module: Any) -> SimpleNamespace:
    kernels = {name: f.py_func for name, f in vars(module).items() if hasattr(f, "py_func")}
    return SimpleNamespace(**kernels)


MODES = [
    pytest.param(lambda module: module, id="compiled"),
    pytest.param(interpreted, id="interpreted"),
]
Mode = Callable[[Any], Any]


def random_codes(heads: int, tables: int, n: int, bits: int, seed: int = 0) -> Array:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 2**bits, (heads, tables, n)).astype(np.uint16)


def empty_segment(heads: int, tables: int, bits: int) -> tuple[Array, Array]:
    ids = np.empty((heads, tables, 0), np.uint16)
    return ids, np.zeros((heads, tables, 2**bits + 1), np.uint16)


def merge(module: Any, ids: Array, starts: Array, codes: Array, count: int) -> tuple[Array, Array]:
    heads, tables, n = ids.shape
    out = np.full((heads, tables, n + count), 9999, np.uint16), np.full_like(starts, 9999)
    module.merge_buckets(ids, starts, codes, count, *out)
    return out


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bits", [1, 5, 16])
def test_pack_codes(mode: Mode, bits: int) -> None:
    scores = np.random.default_rng(bits).standard_normal((3 * bits, 7)).astype(np.float32)
    scores[0, 0] = 0.0
    got, want = np.full((2, 3, 11), 77, np.uint16)
    mode(hash_codes).pack_codes(scores, bits, got, 2)
    hash_reference.pack_codes(scores, bits, want, 2)
    np.testing.assert_array_equal(got, want)
    assert (got[:, :2] == 77).all()
    assert (got[:, 9:] == 77).all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("old", "new", "bits"), [(0, 1, 3), (0, 45, 4), (31, 17, 2), (5, 0, 1)])
def test_merge_buckets(mode: Mode, old: int, new: int, bits: int) -> None:
    codes = random_codes(2, 3, old + new + 4, bits)
    ids, starts = merge(hash_reference, *empty_segment(2, 3, bits), codes, old)
    later = codes[:, :, old:].copy()
    got = merge(mode(buckets), ids, starts, later, new)
    want = merge(hash_reference, ids, starts, later, new)
    np.testing.assert_array_equal(got[0], want[0])
    np.testing.assert_array_equal(got[1], want[1])
    # merging in two steps is building in one
    whole = merge(hash_reference, *empty_segment(2, 3, bits), codes, old + new)
    np.testing.assert_array_equal(got[0], whole[0])


def test_a_full_segment_fits_sixteen_bits() -> None:
    n = 65_535
    codes = np.full((1, 1, n), 3, np.uint16)
    ids, starts = merge(buckets, *empty_segment(1, 1, 2), codes, n)
    np.testing.assert_array_equal(ids[0, 0], np.arange(n))
    np.testing.assert_array_equal(starts[0, 0], [0, 0, 0, 0, n])


def collect(module: Any, codes: Array, query: Array, threshold: int, room: int, bits: int) -> Any:
    """Half of the keys from buckets and the others from codes."""
    heads, tables, n = codes.shape
    Hq = query.shape[1]
    half = n // 2
    counts = np.full((Hq, n), 250, np.uint8 if tables < 256 else np.uint16)
    seen = np.full((Hq, threshold, n // 64 + 1), 2**64 - 1, np.uint64)
    found, lengths = np.full((Hq, room), -1, np.int32), np.zeros(Hq, np.int64)
    segment = merge(hash_reference, *empty_segment(heads, tables, bits), codes, half)
    tail = codes[:, :, half:].copy()
    place = (found, lengths)
    module.collect_from_buckets(*segment, 100_000, query, threshold, seen, *place)
    module.collect_from_codes(tail, n - half, 100_000 + half, query, threshold, counts, *place)
    return found, lengths


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("heads", "group", "tables", "n", "bits", "threshold"),
    [
        (3, 3, 5, 61, 1, 2),
        (1, 7, 9, 40, 2, 3),
        (2, 1, 300, 13, 3, 30),
        (1, 1, 4, 1, 16, 1),
        (2, 2, 40, 500, 3, 2),
    ],
)
def test_collect(
    mode: Mode, heads: int, group: int, tables: int, n: int, bits: int, threshold: int
) -> None:
    codes = random_codes(heads, tables, n, bits)
    query = random_codes(1, tables, heads * group, bits, seed=1)[0]
    found, lengths = collect(mode(buckets), codes, query, threshold, n, bits)
    want, want_lengths = collect(hash_reference, codes, query, threshold, n, bits)
    np.testing.assert_array_equal(lengths, want_lengths)
    np.testing.assert_array_equal(np.sort(found), np.sort(want))


@pytest.mark.parametrize("mode", MODES)
def test_a_key_that_collides_in_every_one_of_many_tables_is_found_once(mode: Mode) -> None:
    codes = np.full((1, 520, 4), 6, np.uint16)
    query = np.full((520, 1), 6, np.uint16)
    found, lengths = collect(mode(buckets), codes, query, 2, 4, 3)
    assert lengths[0] == 4
    assert sorted(found[0]) == [100_000, 100_001, 100_002, 100_003]


@pytest.mark.parametrize("mode", MODES)
def test_candidates_without_room_are_counted_and_not_written(mode: Mode) -> None:
    codes = np.zeros((1, 3, 20), np.uint16)
    found, lengths = collect(mode(buckets), codes, np.zeros((3, 2), np.uint16), 2, 7, 1)
    np.testing.assert_array_equal(lengths, [20, 20])
    assert found.shape == (2, 7)
    assert len(set(found[1])) == 7


@pytest.mark.parametrize("mode", MODES)
def test_keep_random_keeps_subsets_of_the_right_size(mode: Mode) -> None:
    found = np.tile(np.arange(30, dtype=np.int32), (4, 1))
    lengths = np.array([30, 11, 10, 0])
    uniforms = np.random.default_rng(0).random((4, 10))
    uniforms[0, :] = 1 - 2.0**-53  # the largest there is
    mode(buckets).keep_random(found, lengths, 10, uniforms)
    for row in found:
        np.testing.assert_array_equal(np.sort(row), np.arange(30))  # shuffled, nothing lost
    assert set(found[1, :10]) < set(range(11))
    np.testing.assert_array_equal(found[2:], np.tile(np.arange(30), (2, 1)))


def test_keep_random_keeps_each_equally_often() -> None:
    rows, length, limit = 6000, 7, 3
    found = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    uniforms = np.random.default_rng(1).random((rows, limit))
    buckets.keep_random(found, np.full(rows, length), limit, uniforms)
    kept = np.bincount(found[:, :limit].ravel(), minlength=length) / rows
    p = limit / length
    assert np.abs(kept - p).max() < 4 * np.sqrt(p * (1 - p) / rows)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("Hkv", "group", "D"), [(2, 3, 33), (1, 1, 8)])
def test_interpolate_by_angle(mode: Mode, dtype: torch.dtype, Hkv: int, group: int, D: int) -> None:
    rng = np.random.default_rng(D)
    rows = torch.from_numpy(rng.standard_normal((Hkv, 40, 2 * D))).to(dtype)
    centre = rng.standard_normal((Hkv, D)).astype(np.float32)
    query = rng.standard_normal((Hkv * group, D)).astype(np.float32)
    query /= np.linalg.norm(query, axis=1, keepdims=True)
    lengths = rng.integers(0, 30, Hkv * group)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    indices = rng.integers(0, 40, offsets[-1]).astype(np.int32)
    table = np.sqrt(np.arange(50.0)).astype(np.float32)
    got, want = np.empty((2, len(indices)), np.float32)
    arguments = (row_array(rows), centre, query, indices, offsets, table)
    mode(angles).interpolate_by_angle(*arguments, got)
    hash_reference.interpolate_by_angle(*arguments, want)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_angles_that_have_no_cosine(mode: Mode) -> None:
    key = torch.tensor([0.1, 0.7, -0.3, 0.2])
    values = torch.zeros(4)
    rows = torch.stack([torch.cat([row, values]) for row in (key, torch.zeros(4), -key)])[None]
    direction = (key / key.norm()).numpy()
    directions = np.stack([direction, np.zeros(4, np.float32)])
    table = np.array([0.0, 1.0, 2.0], np.float32)  # right angle: 1, opposite: 2
    got = np.empty(6, np.float32)
    mode(angles).interpolate_by_angle(
        row_array(rows),
        np.zeros((1, 4), np.float32),
        directions,
        np.array([0, 1, 2, 0, 1, 2], np.int32),
        np.array([0, 3, 6]),
        table,
        got,
    )
    np.testing.assert_allclose(got, [0, 1, 2, 1, 0, 1], atol=1e-3)

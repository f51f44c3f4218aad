"""Tables that grow, in any blocks, give the candidates of the brute-force reference."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from nearfar.lsh import tables as module
from nearfar.lsh.projections import Projections, random_projections
from nearfar.lsh.tables import LayerTables, Workspace, empty_tables, extend_tables, find_candidates
from nearfar.lsh.tables_reference import ReferenceSampler
from nearfar.records import FarView

HKV, GROUP, D, BITS, TABLES = 2, 3, 16, 4, 9
close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-6)
HASHING = random_projections(D, BITS, TABLES, 3)


@pytest.fixture
def small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SEGMENT_TOKENS", 50)
    monkeypatch.setattr(module, "MIN_TAIL_TOKENS", 6)


def make_rows(capacity: int, kv_heads: int = HKV, dim: int = D) -> torch.Tensor:
    generator = torch.Generator().manual_seed(capacity)
    offset = 2 * torch.randn(kv_heads, 1, 2 * dim, generator=generator)
    return torch.randn(kv_heads, capacity, 2 * dim, generator=generator) + offset


def empty() -> LayerTables:
    return empty_tables(HKV, D, TABLES)


def build(rows: torch.Tensor, lengths: list[int], centre: np.ndarray | None = None) -> LayerTables:
    """Tables extended to each of ``lengths`` in turn, around a centre that stays if given."""
    tables = empty()
    if centre is not None:
        tables = replace(tables, centre=centre, centred_on=10**9)
    for length in lengths:
        tables = extend_tables(tables, HASHING, FarView(rows, length))
    return tables


def candidates(tables: LayerTables, query: torch.Tensor, threshold: int = 2) -> list[list[int]]:
    workspace = Workspace(len(query), TABLES, threshold)
    lengths = find_candidates(tables, HASHING.codes(query), workspace)
    return [row[:n].tolist() for row, n in zip(workspace.found, lengths, strict=True)]


def queries() -> torch.Tensor:
    return torch.randn(HKV * GROUP, D, generator=torch.Generator().manual_seed(9))


def expected(rows: torch.Tensor, tables: LayerTables, threshold: int) -> list[list[int]]:
    sampler = ReferenceSampler(HASHING.planes.double().numpy(), BITS, TABLES, threshold)
    keys = rows[:, : tables.length, :D].double().numpy()
    return [
        sampler.sample(query, keys[head // GROUP], tables.centre[head // GROUP])[0].tolist()
        for head, query in enumerate(queries().double().numpy())
    ]


@pytest.mark.usefixtures("small_segments")
@pytest.mark.parametrize("threshold", [1, 2, 4])
@pytest.mark.parametrize("lengths", [[1], [6], [7], [49], [50], [51], [100], [3, 17, 163]])
def test_candidates_equal_the_reference(lengths: list[int], threshold: int) -> None:
    rows = make_rows(170)
    tables = build(rows, lengths)
    found = candidates(tables, queries(), threshold)
    assert found == expected(rows, tables, threshold)
    if lengths[-1] > 50:
        assert any(found)


@pytest.mark.usefixtures("small_segments")
def test_odd_blocks_give_the_candidates_of_one_build() -> None:
    rows = make_rows(333)
    centre = rows[:, :, :D].mean(1).numpy()
    whole = build(rows, [333], centre)
    steps = np.cumsum([1, 1, 2, 5, 7, 31, 50, 3, 100, 99, 34]).tolist()
    blocks = build(rows, steps, centre)
    assert blocks.length == whole.length == 333
    assert [s.tokens for s in blocks.segments][:6] == [50] * 6
    assert candidates(blocks, queries()) == candidates(whole, queries())


def test_long_inputs_are_cut_into_segments_of_sixteen_bit_ids() -> None:
    rows = make_rows(65_537, kv_heads=1, dim=4)
    hashing = random_projections(4, 5, 3, 0)
    tables = extend_tables(empty_tables(1, 4, 3), hashing, FarView(rows, 65_537))
    assert [segment.tokens for segment in tables.segments] == [65_535]
    assert tables.tail_tokens == 2
    assert tables.segments[0].ids.dtype == tables.segments[0].starts.dtype == np.uint16
    query = rows[0, [0, 65_534, 65_535, 65_536], :4] - torch.from_numpy(tables.centre)
    workspace = Workspace(4, 3, 3)
    lengths = find_candidates(tables, hashing.codes(query), workspace)
    sampler = ReferenceSampler(hashing.planes.double().numpy(), 5, 3, 3)
    keys = (rows[0, :, :4] - torch.from_numpy(tables.centre)).double().numpy()
    for row, token in enumerate([0, 65_534, 65_535, 65_536]):
        found = np.sort(workspace.found[row, : lengths[row]])
        collisions = sampler.collisions(query[row].double().numpy(), keys)
        np.testing.assert_array_equal(found, np.flatnonzero(collisions == 3))
        assert token in found


@pytest.mark.usefixtures("small_segments")
def test_older_tables_stay_what_they_were() -> None:
    rows, other = make_rows(150), make_rows(150) + 1.0
    for length in (0, 3, 20, 50, 77):
        before = extend_tables(empty(), HASHING, FarView(rows, length)) if length else empty()
        seen = candidates(before, queries())
        arrays = [a.tobytes() for s in before.segments for a in (s.ids, s.starts)]
        for further in (length + 1, length + 5, 150):
            branch = torch.cat([rows[:, :length], other[:, length:]], 1)
            extend_tables(before, HASHING, FarView(branch, further))
            assert candidates(before, queries()) == seen
            assert [a.tobytes() for s in before.segments for a in (s.ids, s.starts)] == arrays
        again = extend_tables(before, HASHING, FarView(rows, length + 4))
        assert candidates(again, queries()) == expected(rows, again, 2)


@pytest.mark.usefixtures("small_segments")
def test_the_centre_is_the_mean_and_is_taken_anew_at_four_times_the_keys() -> None:
    rows = make_rows(100)
    tables = build(rows, [10, 25, 39])
    assert tables.centred_on == 10
    close(torch.from_numpy(tables.centre), rows[:, :10, :D].mean(1))
    tables = extend_tables(tables, HASHING, FarView(rows, 40))
    assert tables.centred_on == 40
    close(torch.from_numpy(tables.centre), rows[:, :40, :D].mean(1))
    assert candidates(tables, queries()) == candidates(build(rows, [40]), queries())


def test_centred_keys_of_one_value_are_exactly_zero() -> None:
    rows = torch.full((1, 777, 8), 0.3).bfloat16()
    centre = module.mean_key(FarView(rows, 777))
    np.testing.assert_array_equal(centre, rows[:, 0, :4].float().numpy())


def test_no_new_keys_change_nothing_and_fewer_are_refused() -> None:
    rows = make_rows(30)
    tables = build(rows, [30])
    assert extend_tables(tables, HASHING, FarView(rows, 30)) is tables
    message = "Far memory has 29 tokens, the index 30. Rewind it first."
    with pytest.raises(ValueError, match=message):
        extend_tables(tables, HASHING, FarView(rows, 29))


def test_merging_waits_for_a_long_tail() -> None:
    rows = make_rows(1300)
    tables = build(rows, [1000])
    assert tables.segments == ()
    assert tables.tail_tokens == 1000
    tables = extend_tables(tables, HASHING, FarView(rows, 1025))
    assert [s.tokens for s in tables.segments] == [1025]
    assert tables.tail.nbytes == 0
    tables = extend_tables(tables, HASHING, FarView(rows, 1300))
    assert tables.tail_tokens == 275


@pytest.mark.usefixtures("small_segments")
def test_nbytes_are_those_of_the_arrays() -> None:
    tables = build(make_rows(120), [119])
    assert len(tables.segments) == 3
    ids = HKV * TABLES * 119 * 2
    starts = 3 * HKV * TABLES * (2**BITS + 1) * 2
    assert tables.tail_tokens == 0
    assert tables.nbytes == ids + starts + HKV * D * 4


@pytest.mark.usefixtures("small_segments")
@pytest.mark.parametrize("tokens", [1, 6, 7, 50, 55, 57, 100])
def test_bytes_are_predicted(tokens: int) -> None:
    predicted = module.tables_bytes(HKV, D, BITS, TABLES, tokens)
    assert predicted == build(make_rows(100), [tokens]).nbytes


def test_index_is_smaller_than_keys_and_values_at_the_published_size() -> None:
    hashing = Projections(torch.zeros(1500, 128), 10, 150)
    far = FarView(torch.zeros(1, 4096, 256, dtype=torch.bfloat16), 4096)
    tables = extend_tables(empty_tables(1, 128, 150), hashing, far)
    assert tables.nbytes < 0.8 * far.rows.nbytes


def test_workspace_counts_are_as_wide_as_the_number_of_tables() -> None:
    assert Workspace(2, 255, 2).counts.dtype == np.uint8
    assert Workspace(2, 256, 2).counts.dtype == np.uint16


def test_tables_of_no_keys_hold_a_centre_alone_and_the_first_keys_are_centred() -> None:
    assert empty().nbytes == empty().centre.nbytes
    rows = make_rows(2)
    for length in (1, 2):
        tables = build(rows, [length])
        assert tables.centred_on == length
        close(torch.from_numpy(tables.centre), rows[:, :length, :D].mean(1))

"""Hash tables as arrays: taken back as they were, and refused wherever a search could stumble."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from nearfar.lsh import tables as tables_module
from nearfar.lsh import tables_state
from nearfar.lsh.projections import random_projections
from nearfar.lsh.tables import LayerTables, empty_tables, extend_tables
from nearfar.records import FarView

HKV, D, BITS, TABLES, LENGTH = 2, 16, 4, 3, 109  # two segments of 50 and a tail of 9
Arrays = dict[str, NDArray[Any]]


@pytest.fixture(autouse=True)
def _small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables_module, "SEGMENT_TOKENS", 50)
    monkeypatch.setattr(tables_state, "SEGMENT_TOKENS", 50)
    monkeypatch.setattr(tables_module, "MIN_TAIL_TOKENS", 10)


def made(length: int = LENGTH) -> LayerTables:
    rows = torch.randn(HKV, length, 2 * D, generator=torch.Generator().manual_seed(1))
    hashing = random_projections(D, BITS, TABLES, 3)
    return extend_tables(empty_tables(HKV, D, TABLES), hashing, FarView(rows, length))


def copied() -> Arrays:
    return {name: array.copy() for name, array in tables_state.tables_arrays(made()).items()}


def taken(arrays: Arrays, length: int = LENGTH) -> LayerTables:
    return tables_state.tables_from_arrays(arrays, empty_tables(HKV, D, TABLES), 1 << BITS, length)


@pytest.mark.parametrize("length", [0, 1, 9, 50, 61, LENGTH])
def test_what_was_saved_is_taken_back(length: int) -> None:
    tables = made(length)
    arrays = tables_state.tables_arrays(tables)
    again = taken(arrays, length)
    assert (again.length, again.centred_on) == (length, tables.centred_on)
    assert len(again.segments) == len(tables.segments) == length // 50 + (length == 61)
    for name, array in tables_state.tables_arrays(again).items():
        np.testing.assert_array_equal(array, arrays[name])


def put(name: str, place: Any, value: int) -> Callable[[Arrays], Any]:
    return lambda arrays: arrays[name].__setitem__(place, value)


def become(name: str, make: Callable[[NDArray[Any]], NDArray[Any]]) -> Callable[[Arrays], Any]:
    return lambda arrays: arrays.__setitem__(name, make(arrays[name]))


def as_type(dtype: Any) -> Callable[[NDArray[Any]], NDArray[Any]]:
    return lambda array: array.astype(dtype)


@pytest.mark.parametrize(
    "damage",
    [
        put("counts", 0, -1),
        put("counts", 1, -1),
        put("counts", 1, 1),
        put("counts", 1, 4),
        become("counts", as_type(np.int32)),
        become("counts", as_type(np.float64)),
        become("counts", lambda counts: np.append(counts, 0)),
        become("centre", as_type(np.float64)),
        become("centre", lambda centre: centre[:, 1:]),
        put("tail", (1, 2, 8), 1 << BITS),
        become("tail", as_type(np.int32)),
        become("tail", lambda tail: tail[..., None]),
        become("tail", lambda tail: tail[:, 1:]),
        become("tail", lambda tail: tail[..., 1:]),
        put("ids.1", (1, 2, 49), 50),
        become("ids.0", as_type(np.int32)),
        become("ids.0", lambda ids: ids[1:]),
        become("ids.0", lambda ids: ids[..., 0]),
        become("ids.0", lambda ids: ids[..., 1:]),
        become("ids.1", lambda ids: np.concatenate([ids, ids], -1)),
        become("ids.1", lambda ids: ids[..., :0]),
        put("starts.0", (0, 1, 0), 1),
        put("starts.1", (1, 2, -1), 49),
        put("starts.1", (1, 2, -1), 51),
        put("starts.0", (0, 1, 7), 51),
        become("starts.0", as_type(np.int32)),
        become("starts.0", lambda starts: starts[..., 1:]),
        become("starts.0", lambda starts: np.delete(starts, 5, -1)),
    ],
)
def test_what_a_search_could_stumble_over_is_refused(damage: Callable[[Arrays], Any]) -> None:
    arrays = copied()
    assert taken(arrays).length == LENGTH
    damage(arrays)
    with pytest.raises(ValueError, match=r"^hash tables are not as they can be$"):
        taken(arrays)


@pytest.mark.parametrize("length", [0, LENGTH - 1, LENGTH + 1])
def test_tables_of_other_keys_are_refused(length: int) -> None:
    with pytest.raises(ValueError, match=r"^hash tables are not as they can be$"):
        taken(copied(), length)

"""`LayerTables` as named arrays and back.

The search follows ids and bucket starts without checks, so tables from a file are checked once
before use, at the speed of memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nearfar.lsh.tables import SEGMENT_TOKENS, LayerTables, Segment

LAYOUT = 1  # of the arrays below; another one where hashing or their order changes


def tables_arrays(tables: LayerTables) -> dict[str, NDArray[Any]]:
    """The state of one layer."""
    kept = tables.tail[:, :, : tables.tail_tokens]
    arrays: dict[str, NDArray[Any]] = {
        "centre": tables.centre,
        "tail": np.ascontiguousarray(kept),
        "counts": np.array([tables.centred_on, len(tables.segments)]),
    }
    for i, segment in enumerate(tables.segments):
        arrays |= {f"ids.{i}": segment.ids, f"starts.{i}": segment.starts}
    return arrays


def tables_from_arrays(
    arrays: Mapping[str, NDArray[Any]], empty: LayerTables, buckets: int, length: int
) -> LayerTables:
    """Tables of ``length`` keys and the sizes of ``empty``; ValueError otherwise."""
    centre, tail, counts = arrays["centre"], arrays["tail"], arrays["counts"]
    Hkv, num_tables, _ = empty.tail.shape
    _require(counts.dtype == np.int64 and counts.shape == (2,))
    _require(counts[0] >= 0 and 0 <= counts[1] <= -(-length // SEGMENT_TOKENS))
    _require(centre.dtype == np.float32 and centre.shape == empty.centre.shape)
    _require(tail.dtype == np.uint16 and tail.ndim == 3 and tail.shape[:2] == (Hkv, num_tables))
    _require(not tail.size or int(tail.max()) < buckets)
    segments = []
    for i in range(int(counts[1])):
        segment = Segment(arrays[f"ids.{i}"], arrays[f"starts.{i}"])
        _require(segment.ids.ndim == 3 and segment.ids.shape[:2] == (Hkv, num_tables))
        _require(i + 1 == counts[1] or segment.tokens == SEGMENT_TOKENS)
        _require(segment.starts.shape == (Hkv, num_tables, buckets + 1))
        _check_segment(segment)
        segments.append(segment)
    tables = LayerTables(centre, int(counts[0]), tuple(segments), tail, tail.shape[2])
    _require(tables.length == length)
    return tables


def _check_segment(segment: Segment) -> None:
    ids, starts, tokens = segment.ids, segment.starts, segment.tokens
    _require(ids.dtype == np.uint16 and starts.dtype == np.uint16)
    _require(0 < tokens <= SEGMENT_TOKENS and int(ids.max()) < tokens)
    _require(bool((starts[:, :, 0] == 0).all() and (starts[:, :, -1] == tokens).all()))
    _require(bool((starts[:, :, 1:] >= starts[:, :, :-1]).all()))


def _require(holds: bool | np.bool_) -> None:
    if not holds:
        raise ValueError("hash tables are not as they can be")

"""The facts in a header: what was written is read, and impossible values are refused."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from typing import Any

import pytest
from saved_cases import FACTS

from nearfar.records import Geometry
from nearfar.runtime.saved.facts import Kept, parse_facts

PLAIN = replace(
    FACTS,
    geometry=Geometry(layers=2, query_heads=6, kv_heads=3, head_dim=5),
    tokens=700,
    row_format="bfloat16",
    rest="\n",
    kept=Kept({"name": "h2o", "recent_share": 0.5}, 16, None),
    indexes=({"index": "sketch"},),
)
COUNTS = (-1, 0.5, True, None, "1", 2**31)
SIZES = (*COUNTS, 0)
SECONDS = (-0.1, True, None, "1")
WRONG: dict[str, tuple[Any, ...]] = {
    "geometry.layers": SIZES,
    "geometry.query_heads": (*SIZES, 7),
    "geometry.kv_heads": (*SIZES, 4),
    "geometry.head_dim": SIZES,
    "model": (1, None, "\ud800"),
    "model_identity": (1, None),
    "tokenizer_identity": (1, None),
    "rest": (1, None, "\udfff"),
    "text_sha256": ("", "0" * 63, "0" * 65),
    "tokens": COUNTS,
    "sinks": COUNTS,
    "window": SIZES,
    "near_dtype": ("float64", "", "int8"),
    "row_format": ("float64", ""),
    "read_seconds": SECONDS,
    "kept.policy": ({}, {"name": None}, {"name": 1}),
    "kept.budget": (*SECONDS, 0),
    "kept.near_limit": (-1, 0.5, True, "1"),
}


def header() -> dict[str, Any]:
    """The facts as a file's header gives them back."""
    values: dict[str, Any] = json.loads(json.dumps(PLAIN.as_json()))
    return values


def test_facts_are_those_that_were_written() -> None:
    values = header()
    before = copy.deepcopy(values)
    assert parse_facts(values) == PLAIN
    assert values == before  # it is the container's
    assert parse_facts(values | {"kept": None}).kept is None
    least = {"tokens": 0, "sinks": 0, "window": 1, "read_seconds": 0}
    assert parse_facts(values | least).window == 1


@pytest.mark.parametrize(("name", "value"), [(n, value) for n in WRONG for value in WRONG[n]])
def test_a_value_that_cannot_be_is_refused(name: str, value: object) -> None:
    values = header()
    *outer, last = name.split(".")
    node = values[outer[0]] if outer else values
    assert last in node
    node[last] = value
    with pytest.raises(ValueError, match=r"impossible$|surrogates not allowed$"):
        parse_facts(values)


@pytest.mark.parametrize("name", ["geometry", "kept", "indexes", "model"])
def test_a_value_that_is_missing_is_refused(name: str) -> None:
    values = header()
    del values[name]
    with pytest.raises((KeyError, TypeError), match=name):
        parse_facts(values)

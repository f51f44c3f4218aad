"""Verdicts of benchmarks/orderings.py, and all of it on a tiny model."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from ordered_pair import Setting, ordering, table
from orderings import ORDERINGS
from tiny_comparison import tiny_engine_of
from tiny_folder import make_folder

from nearfar.evaluation.haystack import Haystack
from nearfar.evaluation.tasks.base import Material
from nearfar.policies import registry

ABOUT = ("name", "source", "measure")


def scores(*values: float) -> dict[tuple[int, int], float]:
    return {(case, 0): value for case, value in enumerate(values)}


@pytest.mark.parametrize(
    ("better", "higher", "holds"),
    [
        ((1.0, 2.0, 3.0, 4.0, 5.0), False, "yes"),
        ((1.0, 2.0, 3.0, 4.0, 5.0), True, "no, the other way"),
        ((3.0, 2.0, 5.0, 4.0, 7.0), False, "not decided"),
        ((2.0, 3.0, 4.0, 5.0, 6.0), True, "not decided"),  # equal
    ],
)
def test_what_is_judged_is_the_difference_of_each_sample(
    better: tuple[float, ...], higher: bool, holds: str
) -> None:
    worse = scores(2.0, 3.0, 4.0, 5.0, 6.0)
    found = ordering(ABOUT, ("a", scores(*better), ""), ("b", worse, ""), higher=higher)
    assert found.holds == holds
    assert found.worse.value.low < found.better.value.value < found.worse.value.high


def test_perplexities_are_shown_and_their_logarithms_judged() -> None:
    ours, theirs = scores(1.0, 3.0), scores(2.0, 4.0)
    found = ordering(
        ABOUT, ("a", ours, "1 MiB"), ("b", theirs, "2 MiB"), exact=scores(0.0), logs=True
    )
    assert found.better.value.value == pytest.approx(math.e**2)
    assert (found.exact, found.gain.value, found.holds) == (1.0, 1.0, "yes")
    row = table([found]).splitlines()[-1]
    assert row.startswith("| name | measure | a: 7.39 (2.72 to 20.1), 1 MiB | b: 20.1 ")
    assert row.endswith("| 1 | 1 (1 to 1) | yes |")


@pytest.mark.parametrize("name", ORDERINGS)
def test_every_ordering_is_measured(name: str, tmp_path: Path) -> None:
    make_folder(tmp_path, hidden_size=128, num_attention_heads=4, head_dim=32)
    engine = tiny_engine_of(tmp_path, policy="full", window=16)
    material = Material(engine.tokenizer, Haystack(), 0)
    before = dict(registry.BUILT_IN)
    found = ORDERINGS[name](Setting(engine, material, 1024, 1))
    assert before == registry.BUILT_IN
    assert found
    for each in found:
        assert each.name == name
        assert each.better.value.samples == each.worse.value.samples == 1
        assert each.better.name != each.worse.name
        assert math.isfinite(each.gain.value)

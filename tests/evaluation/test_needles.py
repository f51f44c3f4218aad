"""Planted facts: as many as asked for, at even depths, in a text of the wanted length."""

from __future__ import annotations

import pytest

from nearfar.evaluation.needles import make_needles, needle_document

TEXT = "The cat sat on the mat. It was warm! Was it late? Nobody said so."


def words(text: str) -> int:
    return len(text.split())


@pytest.mark.parametrize("context", [300, 1000])
def test_length_and_depths(context: int) -> None:
    text, needles = needle_document(TEXT, words, context, facts=10)
    assert context - 5 <= words(text) <= context
    depths = [words(text.partition(needle.sentence)[0]) / words(text) for needle in needles]
    assert depths == sorted(depths)
    for number, depth in enumerate(depths):
        assert depth == pytest.approx((number + 0.5) / 10, abs=0.05)


def test_facts_are_told_once_and_apart() -> None:
    text, needles = needle_document(TEXT, words, 800, facts=20, seed=3)
    assert len({needle.value for needle in needles}) == 20
    assert len({needle.question for needle in needles}) == 20
    for needle in needles:
        assert text.count(needle.sentence) == 1
        assert text.count(needle.value) == 1


def test_another_seed_plants_other_facts() -> None:
    assert make_needles(5, seed=1) == make_needles(5, seed=1)
    assert make_needles(5, seed=1) != make_needles(5, seed=2)

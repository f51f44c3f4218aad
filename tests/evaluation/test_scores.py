from __future__ import annotations

import pytest

from nearfar.evaluation import scores


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  The  Code, is:\n'7421'. ", "the code is 7421"),
        ("1,000,000", "1000000"),
        ("1,00", "1 00"),
        ("STRASSE", "strasse"),
        ("Straße", "strasse"),
        ("ﬁne、世界。", "fine 世界"),
        ("well-known", "well known"),
        ("...", ""),
        ("", ""),
    ],
)
def test_normalise(text: str, expected: str) -> None:
    assert scores.normalise(text) == expected


@pytest.mark.parametrize(
    ("ours", "reference", "share"),
    [
        ((), (), 1.0),
        ((), (1,), 0.0),
        ((1,), (), 0.0),
        ((1, 2, 3), (1, 2, 3), 1.0),
        ((1, 2), (1, 2, 3, 4), 0.5),
        ((1, 2, 3, 4), (1, 2), 0.5),
        ((9, 2, 3), (1, 2, 3), 0.0),
        ((1, 9, 3, 4), (1, 2, 3, 4), 0.25),
    ],
)
def test_agreement(ours: tuple[int, ...], reference: tuple[int, ...], share: float) -> None:
    assert scores.agreement(ours, reference) == share


def test_ruler_counts_references_in_the_prediction_whatever_their_case() -> None:
    said = " Blue-Fox\x00and 7654321."
    assert scores.share_found(said, ("blue-fox", "7654321")) == 100
    assert scores.share_found(said, ("blue-fox", "7654322")) == 50
    assert scores.any_found(said, ("no", "7654321")) == 100
    assert scores.any_found(said, ("no", "nor")) == 0
    assert scores.clean(said) == "Blue-Fox\nand 7654321."


def test_contained_as_whole_words_only() -> None:
    assert scores.contains("It is 7,421!", ("7421",)) == 100
    assert scores.contains("It is 7421.", ("742",)) == 0


@pytest.mark.parametrize(
    ("prediction", "reference", "f1"),
    [
        ("the oil store", "oil store", 80.0),
        ("store oil", "oil store", 100.0),
        ("oil oil oil", "oil store", 40.0),
        ("", "oil", 0.0),
        ("", "...", 100.0),
        ("桃园里", "桃园", 80.0),
    ],
)
def test_f1(prediction: str, reference: str, f1: float) -> None:
    assert scores.best_f1(prediction, ("something else", reference)) == pytest.approx(f1)


@pytest.mark.parametrize(
    ("prediction", "reference", "recall"),
    [
        ("He went home.", "he went home", 100.0),
        ("home went he", "he went home", 100 / 3),
        ("he then went slowly home again", "he went home", 100.0),
        ("", "he went home", 0.0),
        ("天下大势", "天下分久", 50.0),
    ],
)
def test_recall_is_in_order(prediction: str, reference: str, recall: float) -> None:
    assert scores.share_recalled(prediction, (reference,)) == pytest.approx(recall)

from __future__ import annotations

from typing import Any, cast

import pytest

from nearfar.config import SamplingConfig
from nearfar.errors import OutOfMemoryError
from nearfar.evaluation.compare import (
    Question,
    Row,
    agreement,
    compare,
    normalise,
    with_reference,
)
from nearfar.runtime.engine import Engine
from nearfar.runtime.results import Answer, MemoryReport

MEMORY = MemoryReport(1, 2, 3, 4, 5, 6)
TOKENS = {"full": (1, 2, 3, 4), "sketch": (1, 2, 9, 4), "streaming-llm": ()}


class CannedEngine:
    """Answers with the token ids of its policy."""

    def __init__(self, policy: str = "sketch") -> None:
        self.policy = policy
        self.read_texts: list[str] = []

    def with_policy(self, policy: str) -> CannedEngine:
        return CannedEngine(policy)

    def read(self, _text: str) -> CannedEngine:
        if self.policy not in TOKENS:
            raise OutOfMemoryError("too little")
        return self

    prefill_seconds = 0.5

    def ask(self, question: str, _sampling: SamplingConfig) -> Answer:
        if question == "defect":
            raise ZeroDivisionError("division by zero")
        ids = TOKENS[self.policy]
        return Answer("It is 7,421!", ids, "stop", 1, 0.1, 0.1, 9.0, 0.0, question)

    def memory_report(self) -> MemoryReport:
        return MEMORY


def run(questions: list[Question], policies: list[str], **more: Any) -> list[Row]:
    return compare(cast(Engine, CannedEngine()), "text", questions, policies, **more)


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
    assert normalise(text) == expected


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
    assert agreement(ours, reference) == share


def test_the_reference_runs_first_and_nothing_twice() -> None:
    assert with_reference(["sketch", "full", "sketch", "h2o"]) == ["full", "sketch", "h2o"]
    assert with_reference([]) == ["full"]


def test_rows() -> None:
    seen: list[str] = []
    rows = run(
        [Question("What?", "7421"), Question("And?")],
        ["sketch", "gone", "streaming-llm"],
        on_row=lambda row: seen.append(row.policy),
    )
    assert seen == [row.policy for row in rows] == ["full", "sketch", "gone", "streaming-llm"]
    full, sketch, gone, streaming = rows
    assert [outcome.agreement for outcome in full.outcomes] == [1.0, 1.0]
    assert [outcome.agreement for outcome in sketch.outcomes] == [0.5, 0.5]
    assert streaming.outcomes[0].agreement == 0.0
    assert sketch.outcomes[0].contains is True
    assert sketch.outcomes[0].exact_match is False
    assert sketch.outcomes[1].exact_match is sketch.outcomes[1].contains is None
    assert sketch.memory == MEMORY
    assert sketch.prefill_seconds == 0.5
    assert gone == Row("gone", error="too little")


def test_an_answer_holds_the_expected_one_as_whole_words_only() -> None:
    [full] = run([Question("What?", "742"), Question("What?", "it is 7421")], [])
    assert [outcome.contains for outcome in full.outcomes] == [False, True]
    assert [outcome.exact_match for outcome in full.outcomes] == [False, True]


def test_a_defect_is_a_row_too() -> None:
    rows = run([Question("defect")], ["sketch"])
    assert [row.error for row in rows] == ["ZeroDivisionError: division by zero"] * 2


def test_without_the_reference_there_is_no_agreement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(TOKENS, "full")
    full, sketch = run([Question("What?")], ["sketch"])
    assert full.error == "too little"
    assert sketch.outcomes[0].agreement is None

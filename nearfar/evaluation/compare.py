"""The same questions under several policies, beside the exact answer.

`full` always runs first: it is the reference of `agreement`. Nothing here knows how to print.
Seconds and bytes.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from nearfar.config import SamplingConfig
from nearfar.errors import NearfarError
from nearfar.runtime.engine import Engine
from nearfar.runtime.results import Answer, MemoryReport

REFERENCE = "full"


@dataclass(frozen=True)
class Question:
    """A question, and what a right answer says where that is known."""

    text: str
    expected: str | None = None


@dataclass(frozen=True)
class Outcome:
    """One answer and how good it is; None where there is nothing to compare with."""

    answer: Answer
    exact_match: bool | None  # the answer is the expected one, after `normalise`
    contains: bool | None  # ... or holds it as whole words
    agreement: float | None  # with the reference, see `agreement`


@dataclass(frozen=True)
class Row:
    """One policy: its outcomes in the order of the questions, or the reason why it failed."""

    policy: str
    outcomes: tuple[Outcome, ...] = ()
    prefill_seconds: float = 0.0
    memory: MemoryReport | None = None
    error: str | None = None


def normalise(text: str) -> str:
    """``text`` without case, punctuation and surplus space; ``1,000`` becomes ``1000``."""
    text = unicodedata.normalize("NFKC", text).casefold()
    text = re.sub(r"(?<=\d),(?=\d{3})", "", text)
    kept = (" " if unicodedata.category(char)[0] in "PZC" else char for char in text)
    return " ".join("".join(kept).split())


def agreement(tokens: Sequence[int], reference: Sequence[int]) -> float:
    """Share of the longer answer that both have in common from its start.

    Only tokens before the first difference count: after it the two answers continue different
    texts, so that equal tokens at equal positions would be chance. 1 means equal, end included.
    """
    longest = max(len(tokens), len(reference))
    if longest == 0:
        return 1.0
    common = 0
    for ours, theirs in zip(tokens, reference, strict=False):
        if ours != theirs:
            break
        common += 1
    return common / longest


def with_reference(policies: Iterable[str]) -> list[str]:
    """The policies in order, without repetition, and `full` before all others."""
    return list(dict.fromkeys([REFERENCE, *policies]))


def compare(
    engine: Engine,
    text: str,
    questions: Sequence[Question],
    policies: Iterable[str],
    sampling: SamplingConfig | None = None,
    on_row: Callable[[Row], None] | None = None,
) -> list[Row]:
    """Ask every question under every policy; a row each, also handed to ``on_row`` as it is made.

    The document is read anew for each policy. Whatever stops a policy becomes its row's error, and
    the others go on. Agreement means most with greedy sampling.
    """
    rows: list[Row] = []
    for policy in with_reference(policies):
        reference = rows[0].outcomes if rows else ()
        try:
            row = _run(engine, text, questions, policy, sampling or SamplingConfig(), reference)
        except NearfarError as error:
            row = Row(policy, error=str(error))
        except Exception as error:  # a policy may come from anywhere; its defect is a result too
            row = Row(policy, error=f"{type(error).__name__}: {error}")
        rows.append(row)
        if on_row is not None:
            on_row(row)
    return rows


def _run(
    engine: Engine,
    text: str,
    questions: Sequence[Question],
    policy: str,
    sampling: SamplingConfig,
    reference: Sequence[Outcome],
) -> Row:
    document = engine.with_policy(policy).read(text)
    outcomes = []
    for number, question in enumerate(questions):
        answer = document.ask(question.text, sampling)
        if policy == REFERENCE:
            share: float | None = 1.0
        else:
            share = (
                agreement(answer.token_ids, reference[number].answer.token_ids)
                if reference
                else None
            )
        outcomes.append(_judge(answer, question.expected, share))
    return Row(policy, tuple(outcomes), document.prefill_seconds, document.memory_report())


def _judge(answer: Answer, expected: str | None, share: float | None) -> Outcome:
    if expected is None:
        return Outcome(answer, None, None, share)
    ours, wanted = normalise(answer.text), normalise(expected)
    return Outcome(answer, ours == wanted, f" {wanted} " in f" {ours} ", share)

"""Damaged and hostile files: a clear error or the right answer, and nothing worse.

NEARFAR_MUTATIONS is how many of each kind are tried; the suite tries few.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from saved_cases import NINE, QUESTION, TEXT, hostile_change, random_damage, tiny_engine
from specs import LSH

from nearfar.config import SamplingConfig
from nearfar.errors import NearfarError, SavedDocumentError
from nearfar.runtime.engine.accounting import peak_rss_bytes
from nearfar.runtime.engine.answering import QuestionMode
from nearfar.runtime.engine.engine import Engine

MUTATIONS = int(os.environ.get("NEARFAR_MUTATIONS", "100"))
TARGETS = 5
FIVE = SamplingConfig(max_new_tokens=5)
Ids = tuple[int, ...]


@dataclass(frozen=True)
class Target:
    """A whole file, what is done with one like it, and what comes of that."""

    data: bytes = field(repr=False)
    use: Callable[[Path, QuestionMode, int], Ids]  # of a path, with so many sources


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> list[Target]:
    """A document under policies of every kind, and a conversation about it."""
    folder = tmp_path_factory.mktemp("model")
    base = tiny_engine(folder)
    tables, evicting = base.with_policy(LSH), base.with_policy("h2o")
    path, kept, talk = folder / "all", folder / "kept", folder / "talk"
    base.read(TEXT).save(path)
    tables.open(path).save(path)  # with the indexes of both
    evicting.read(TEXT).save(kept)
    document = base.open(path)
    conversation = document.conversation()
    conversation.ask(QUESTION, NINE)
    conversation.save(talk)

    def asking(engine: Engine) -> Callable[[Path, QuestionMode, int], Ids]:
        def use(where: Path, reading: QuestionMode, sources: int) -> Ids:
            opened = engine.open(where)
            answer = opened.ask(QUESTION, FIVE, reading=reading, sources=sources)
            return answer.token_ids

        return use

    def going_on(where: Path, reading: QuestionMode, sources: int) -> Ids:
        going = document.conversation(where)
        return going.ask(QUESTION, FIVE, reading=reading, sources=sources).token_ids

    return [
        Target(path.read_bytes(), asking(base)),
        Target(path.read_bytes(), asking(tables)),
        Target(path.read_bytes(), asking(base.with_policy("full"))),
        Target(kept.read_bytes(), asking(evicting)),
        Target(talk.read_bytes(), going_on),
    ]


@pytest.fixture(scope="module")
def right(
    targets: list[Target], tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[int, QuestionMode], Ids]:
    """Answers from the whole files."""
    answers: dict[tuple[int, QuestionMode], Ids] = {}
    readings: tuple[QuestionMode, ...] = ("exact", "policy")
    for which, target in enumerate(targets):
        path = tmp_path_factory.mktemp("whole") / "a.nearfar"
        path.write_bytes(target.data)
        answers |= {(which, how): target.use(path, how, 0) for how in readings}
    assert len(targets) == TARGETS
    return answers


def mutations(test: Callable[..., None]) -> Callable[..., None]:
    """Have hypothesis run a test with so many mutations; the same ones every time."""
    how = {"deadline": None, "derandomize": True, "database": None}
    unused = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    sized = settings(max_examples=MUTATIONS, suppress_health_check=unused, **how)  # type: ignore[arg-type]
    drawn: Callable[..., None] = sized(
        given(
            which=st.integers(0, TARGETS - 1),
            how=st.sampled_from(["exact", "policy"]),
            rng=st.randoms(use_true_random=True),
        )(test)
    )
    return drawn


class Seen:
    """Messages of the errors that mutations led to."""

    def __init__(self) -> None:
        self.tried, self.messages = 0, list[str]()


@pytest.fixture(scope="module")
def seen() -> dict[str, Seen]:
    return {"damage": Seen(), "hostile": Seen()}


@mutations
def test_a_damaged_file_is_an_error_or_answers_right(
    targets: list[Target],
    right: dict[tuple[int, QuestionMode], Ids],
    seen: dict[str, Seen],
    tmp_path: Path,
    which: int,
    how: QuestionMode,
    rng: random.Random,
) -> None:
    path, noted = tmp_path / "a.nearfar", seen["damage"]
    path.unlink(missing_ok=True)  # the old one is still mapped
    path.write_bytes(random_damage(targets[which].data, rng))
    noted.tried += 1
    try:
        got = targets[which].use(path, how, 0)
    except SavedDocumentError as error:
        noted.messages.append(str(error))
    else:
        assert got == right[which, how]


@mutations
def test_a_hostile_file_does_no_harm(
    targets: list[Target],
    seen: dict[str, Seen],
    tmp_path: Path,
    which: int,
    how: QuestionMode,
    rng: random.Random,
) -> None:
    path, noted, before = tmp_path / "a.nearfar", seen["hostile"], peak_rss_bytes()
    sources = rng.choice([0, 0, 2]) if which not in (2, 3) else 0
    path.unlink(missing_ok=True)
    path.write_bytes(hostile_change(targets[which].data, rng))
    noted.tried += 1
    try:
        targets[which].use(path, how, sources)
    except NearfarError as error:
        noted.messages.append(str(error))
    assert peak_rss_bytes() - before < 200 * 2**20


def test_most_mutations_were_seen_and_said(seen: dict[str, Seen]) -> None:
    """Else the two tests above would say nothing."""
    damage, hostile = seen["damage"], seen["hostile"]
    if not (damage.tried and hostile.tried):
        pytest.skip("they did not run")
    assert damage.tried >= MUTATIONS
    assert hostile.tried >= MUTATIONS
    assert len(damage.messages) > damage.tried / 2
    assert len(hostile.messages) > hostile.tried / 5
    assert all("a.nearfar" in message for message in damage.messages)
    assert max(map(len, hostile.messages)) < 3000

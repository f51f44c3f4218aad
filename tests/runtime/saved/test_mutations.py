"""Damaged and hostile files: a clear error or the right answer, and nothing worse.

NEARFAR_MUTATIONS is how many of each kind are tried; the suite tries few.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from saved_cases import LSH, NINE, QUESTION, TEXT, hostile_change, random_damage, tiny_engine

from nearfar.config import SamplingConfig
from nearfar.errors import NearfarError, SavedDocumentError
from nearfar.runtime.accounting import peak_rss_bytes
from nearfar.runtime.answering import Reading
from nearfar.runtime.engine import Engine

MUTATIONS = int(os.environ.get("NEARFAR_MUTATIONS", "100"))
FIVE = SamplingConfig(max_new_tokens=5)
Ids = tuple[int, ...]


@dataclass(frozen=True)
class Target:
    """A whole file, what is done with one like it, and what comes of that."""

    data: bytes
    use: Callable[[Path, Reading, int], Ids]  # of a path, with so many sources

    def right(self, path: Path, reading: Reading) -> Ids:
        path.unlink(missing_ok=True)
        path.write_bytes(self.data)
        return self.use(path, reading, 0)


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

    def asking(engine: Engine) -> Callable[[Path, Reading, int], Ids]:
        def use(where: Path, reading: Reading, sources: int) -> Ids:
            opened = engine.open(where)
            answer = opened.ask(QUESTION, FIVE, reading=reading, sources=sources)
            return answer.token_ids

        return use

    def going_on(where: Path, reading: Reading, sources: int) -> Ids:
        going = document.conversation(where)
        return going.ask(QUESTION, FIVE, reading=reading, sources=sources).token_ids

    return [
        Target(path.read_bytes(), asking(base)),
        Target(path.read_bytes(), asking(tables)),
        Target(path.read_bytes(), asking(base.with_policy("full"))),
        Target(kept.read_bytes(), asking(evicting)),
        Target(talk.read_bytes(), going_on),
    ]


def test_a_damaged_file_is_an_error_or_answers_right(targets: list[Target], tmp_path: Path) -> None:
    rng, path, messages = random.Random(1), tmp_path / "a.nearfar", list[str]()
    readings: tuple[Reading, ...] = ("exact", "policy")
    right = {(t, how): targets[t].right(path, how) for t in range(5) for how in readings}
    for number in range(MUTATIONS):
        which, how = number % len(targets), rng.choice(readings)
        path.unlink()  # the old one is still mapped
        path.write_bytes(random_damage(targets[which].data, rng))
        try:
            got = targets[which].use(path, how, 0)
        except SavedDocumentError as error:
            messages.append(str(error))
        else:
            assert got == right[which, how], number
    assert len(messages) > MUTATIONS / 2
    assert all(str(path) in message for message in messages)


def test_a_hostile_file_does_no_harm(targets: list[Target], tmp_path: Path) -> None:
    rng, path, messages = random.Random(2), tmp_path / "a.nearfar", list[str]()
    before = peak_rss_bytes()
    for number in range(MUTATIONS):
        target = targets[number % len(targets)]
        sources = rng.choice([0, 0, 2]) if number % len(targets) not in (2, 3) else 0
        path.unlink(missing_ok=True)
        path.write_bytes(hostile_change(target.data, rng))
        try:
            target.use(path, rng.choice(["exact", "policy"]), sources)
        except NearfarError as error:
            messages.append(str(error))
    assert len(messages) > MUTATIONS / 5
    assert max(map(len, messages)) < 3000
    assert peak_rss_bytes() - before < 400 * 2**20

"""Conversations about a document, kept in memory and in files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from saved_cases import NINE, TEXT, SavedBytes, tiny_engine
from specs import representatives
from tiny_folder import make_folder, text_of

from nearfar.config import SamplingConfig
from nearfar.errors import DamagedDocumentError, InvalidOptionError, SavedDocumentError
from nearfar.policies.registry import policy_names
from nearfar.runtime.engine.engine import Engine

FIRST, SECOND, THIRD = "what did the cat do?", "and then?", "where did it sit under?"
LAST = "is that all?"  # which nobody asks
SPECS = representatives(policy_names())
LONG = SamplingConfig(max_new_tokens=70)  # tokens leave the window
SOME = SamplingConfig(max_new_tokens=20)
every_kind = pytest.mark.parametrize("spec", SPECS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("model")
    return folder, make_folder(folder, context=3000)


@pytest.fixture(scope="module")
def base(folder: tuple[Path, Any]) -> Engine:
    return tiny_engine(folder[0])


def said(conversation: Any, *questions: str, sampling: SamplingConfig = NINE) -> list[Any]:
    return [conversation.ask(question, sampling).token_ids for question in questions]


@pytest.mark.slow
def test_a_conversation_is_what_transformers_generates(
    base: Engine, folder: tuple[Path, Any]
) -> None:
    for policy in ("full", "full-far"):
        document = base.with_policy(policy).read(TEXT)
        prompt, talk = document._held.prompt, document.conversation()
        ids = prompt.prefix_ids + prompt.question_ids(FIRST)
        for question in (SECOND, THIRD, LAST):
            answer = talk.ask(talk_question(talk, question), NINE)
            wanted = (
                folder[1]
                .generate(
                    torch.tensor([ids]), max_new_tokens=9, do_sample=False, eos_token_id=None
                )[0, len(ids) :]
                .tolist()
            )
            assert list(answer.token_ids) == wanted
            ids = ids + wanted + prompt.next_question_ids(question)


def talk_question(talk: Any, following: str) -> str:
    return {SECOND: FIRST, THIRD: SECOND, LAST: THIRD}[following]


@every_kind
def test_other_questions_in_between_change_nothing(base: Engine, spec: str) -> None:
    engine = base.with_policy(spec)
    document = engine.read(TEXT)
    alone = said(document.conversation(), FIRST, SECOND, THIRD, sampling=SOME)
    single = document.ask(FIRST, NINE).token_ids
    first, second = document.conversation(), document.conversation()
    got = []
    for question in (FIRST, SECOND, THIRD):
        got += said(first, question, sampling=SOME)
        said(second, THIRD, sampling=SOME)
        assert document.ask(FIRST, NINE).token_ids == single
    assert got == alone
    assert [turn.question for turn in first.turns] == [FIRST, SECOND, THIRD]
    assert got[1] != engine.read(TEXT).ask(SECOND, SOME).token_ids


@every_kind
def test_a_saved_conversation_goes_on_as_if_it_had_never_ended(
    base: Engine, tmp_path: Path, spec: str
) -> None:
    engine = base.with_policy(spec)
    document = engine.read(TEXT)
    document.save(tmp_path / "book")
    talk = document.conversation()
    before = said(talk, FIRST, sampling=LONG) + said(talk, SECOND)
    talk.save(tmp_path / "talk")
    wanted = said(talk, THIRD)
    assert len(before) == 2
    reopened = engine.open(tmp_path / "book")
    for each in (document, reopened):
        again = each.conversation(tmp_path / "talk")
        assert again.turns == talk.turns[:2]
        assert said(again, THIRD) == wanted
        again.save(tmp_path / "more")
        assert said(again, FIRST) == said(each.conversation(tmp_path / "more"), FIRST)


def test_a_conversation_is_small(base: Engine, tmp_path: Path) -> None:
    document = base.with_policy("full-far").read(text_of(2000))
    document.save(tmp_path / "book")
    talk = document.conversation()
    said(talk, FIRST)
    talk.save(tmp_path / "talk")
    assert (tmp_path / "talk").stat().st_size < (tmp_path / "book").stat().st_size / 10


def test_an_answer_that_is_cut_off_leaves_no_trace(base: Engine) -> None:
    document = base.read(TEXT)
    wanted = said(document.conversation(), FIRST, SECOND)
    talk = document.conversation()
    first = said(talk, FIRST)
    left = talk.stream(THIRD, LONG)
    next(left)
    assert [*first, *said(talk, SECOND)] == wanted
    with pytest.raises(RuntimeError, match="ended when the document was asked again"):
        next(left)
    assert len(talk.turns) == 2


def test_a_conversation_under_another_selecting_policy(base: Engine, tmp_path: Path) -> None:
    document = base.read(TEXT)
    document.save(tmp_path / "book")
    talk = document.conversation()
    said(talk, FIRST)
    talk.save(tmp_path / "talk")
    exact = base.with_policy("full-far").open(tmp_path / "book")
    assert exact.conversation(tmp_path / "talk").turns == talk.turns
    everything_near = base.with_policy("full").open(tmp_path / "book")
    message = "is a conversation under a policy that keeps far keys, whose memory full cannot use"
    with pytest.raises(SavedDocumentError, match=message):
        everything_near.conversation(tmp_path / "talk")


def test_a_conversation_about_another_document(base: Engine, tmp_path: Path) -> None:
    talk = base.read(TEXT).conversation()
    said(talk, FIRST)
    talk.save(tmp_path / "talk")
    with pytest.raises(SavedDocumentError, match="is a conversation about another document, or"):
        base.read(text_of(99)).conversation(tmp_path / "talk")


def test_files_of_the_other_kind(base: Engine, tmp_path: Path) -> None:
    document = base.read(TEXT)
    document.save(tmp_path / "book")
    talk = document.conversation()
    said(talk, FIRST)
    talk.save(tmp_path / "talk")
    with pytest.raises(SavedDocumentError, match="book is a document and not a conversation"):
        document.conversation(tmp_path / "book")
    with pytest.raises(SavedDocumentError, match="talk is a conversation and not a document"):
        base.open(tmp_path / "talk")


def test_nothing_was_said_yet(base: Engine, tmp_path: Path) -> None:
    talk = base.read(TEXT).conversation()
    message = r"^Nothing was said yet, so there is no conversation to save\.$"
    with pytest.raises(InvalidOptionError, match=message):
        talk.save(tmp_path / "talk")
    assert talk.turns == ()


def test_a_document_that_was_extended(base: Engine) -> None:
    document = base.read(TEXT)
    talk = document.conversation()
    said(talk, FIRST)
    document.extend("the red house ran.")
    with pytest.raises(InvalidOptionError, match=r"^The document was extended after this conv"):
        talk.ask(SECOND, NINE)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tokens", 3),
        ("tokens", 10**9),
        ("turns", []),
        ("turns", [["a"]]),
        ("turns", [["a", 7]]),
        ("pending_ids", [1] * 4000),
        ("pending_ids", [-1]),
        ("pending_ids", [10**6]),
        ("near_dtype", "int4"),
        ("more", 1),
    ],
)
def test_a_header_that_cannot_be(base: Engine, tmp_path: Path, name: str, value: object) -> None:
    document = base.read(TEXT)
    talk = document.conversation()
    said(talk, FIRST)
    path = tmp_path / "talk"
    talk.save(path)
    whole = SavedBytes(path.read_bytes())
    whole.header["about"]["facts"][name] = value
    path.unlink()
    path.write_bytes(whole.with_header(whole.header))
    message = re.escape(f"{path} is damaged: it is not valid (")
    with pytest.raises(DamagedDocumentError, match=f"^{message}"):
        document.conversation(path)

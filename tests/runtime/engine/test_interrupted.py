"""Whatever fails, and at whatever moment, leaves no trace."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from interruptions import Interruption, every_so_often
from saved_cases import NINE, tiny_engine
from specs import tiny_specs
from tiny_folder import text_of

from nearfar.config import SamplingConfig
from nearfar.errors import EndedAnswerError, OutOfMemoryError
from nearfar.runtime.engine.document import Document
from nearfar.runtime.engine.engine import Engine

TEXT = text_of(90, seed=9)
FIRST, SECOND = "what did the cat do?", "and then?"
SOME = SamplingConfig(max_new_tokens=5)
LONG = SamplingConfig(max_new_tokens=70)  # tokens leave the window, and rows grow
SELECTING = ["sketch", "lsh-tables", "clusters", "full-far"]  # drawn, hashed, in blocks, all
# by place, by score, with a summary of what went, merged, ragged
EVICTING = ["streaming-llm", "h2o", "less", "lococo", "adakv"]
KINDS = tiny_specs([*SELECTING, "full", *EVICTING])
CLOSED = r"^This answer was closed before its end, so it has no result\. Ask again\.$"
CUT_OFF = r"^This answer was interrupted before its end, so it has no result\. Ask again\.$"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return tiny_engine(tmp_path_factory.mktemp("model"))


def ids(asked: Any, question: str, sampling: SamplingConfig = SOME, **how: Any) -> Any:
    return asked.ask(question, sampling, **how).token_ids


@pytest.mark.slow
@pytest.mark.parametrize("spec", KINDS)
def test_a_question_interrupted_at_any_line(base: Engine, spec: str) -> None:
    document, twin = base.with_policy(spec).read(TEXT), base.with_policy(spec).read(TEXT)
    talk, other = document.conversation(), twin.conversation()
    assert ids(talk, FIRST) == ids(other, FIRST)
    alone, next_turn = ids(twin, FIRST), ids(other, SECOND, LONG)
    turns, tries = talk.turns, 0
    for line in every_so_often(lambda: ids(talk, SECOND, LONG), stride=9973, first=61):
        tries += 1
        assert talk.turns == turns, line
        assert ids(document, FIRST) == alone, line
    assert tries > 1  # an answer that ends early has few lines
    assert talk.turns[1].question == SECOND
    talk = document.conversation()
    assert [ids(talk, FIRST), ids(talk, SECOND, LONG)] == [alone, next_turn]


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["sketch", "full-far"])
@pytest.mark.parametrize("how", [{"sources": 2}, {"sources": 2, "reading": "policy"}])
def test_an_answer_whose_sources_are_sought(base: Engine, spec: str, how: dict[str, Any]) -> None:
    """The answer is whole by then, but the question is not: it is no turn."""
    engine = base.with_policy(spec)
    document, talk = engine.read(TEXT), engine.read(TEXT).conversation()
    wanted = document.ask(FIRST, SOME, **how)
    for line in every_so_often(lambda: ids(talk, FIRST, **how), stride=4999):
        assert talk.turns == (), line
        assert ids(document, FIRST, **how | {"sources": 0}) == wanted.token_ids
    assert len(talk.turns) == 1
    assert document.ask(FIRST, SOME, **how).passages == wanted.passages


@pytest.mark.parametrize("spec", tiny_specs(["sketch", "lsh-tables", "h2o", "adakv", "full"]))
def test_extending_interrupted_at_any_line(base: Engine, spec: str) -> None:
    """The document is as before, or extended in whole."""
    document, twin = base.with_policy(spec).read(TEXT), base.with_policy(spec).read(TEXT)
    tokens, more = twin.tokens, text_of(60, seed=3)
    before = ids(twin, FIRST)
    twin.extend(more)
    after = ids(twin, FIRST)
    for line in every_so_often(lambda: document.extend(more), stride=701):
        if document.tokens > tokens:  # interrupted on the way back
            break
        assert ids(document, FIRST) == before, line
    assert (document.tokens, ids(document, FIRST)) == (twin.tokens, after)


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["sketch", "h2o"])
def test_reading_and_generating_interrupted_give_their_memory_back(base: Engine, spec: str) -> None:
    engine = base.with_policy(spec)
    works: list[Callable[[], object]] = [
        lambda: engine.read(TEXT),
        lambda: engine.generate(TEXT, SOME),
        lambda: engine.generate([TEXT, FIRST], SOME),
    ]
    for work in works:
        for line in every_so_often(work, stride=4001):
            assert engine._ledger.used_bytes == 0, line
            gc.collect()
            assert engine.memory_report().near_bytes == 0, line


def test_saving_interrupted_leaves_no_file(base: Engine, tmp_path: Path) -> None:
    document = base.read(TEXT)
    alone, path = ids(document, FIRST), tmp_path / "book"
    for line in every_so_often(lambda: document.save(path), stride=211):
        assert path.exists() or list(tmp_path.iterdir()) == [], line
        path.unlink(missing_ok=True)
        assert ids(document, FIRST) == alone, line
    assert [path] == list(tmp_path.iterdir())
    assert ids(base.open(path), FIRST) == alone


def fail_at(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int) -> list[int]:
    """Let call number ``call`` of a method raise, and all later ones do what they do."""
    real, calls = getattr(owner, name), [0]

    def method(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == call:
            raise ValueError(f"the policy failed at call {call}")
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, method)
    return calls


@pytest.mark.parametrize("how", [{}, {"sources": 1}, {"reading": "policy"}])
def test_a_policy_that_fails_at_any_call(
    base: Engine, monkeypatch: pytest.MonkeyPatch, how: dict[str, Any]
) -> None:
    document = base.read(TEXT)
    talk = document.conversation()
    ids(talk, FIRST)
    wanted = ids(document, SECOND)
    index = type(document.sequence.far.index)
    for call in range(1, 10_000, 1 if not how else 11):
        with monkeypatch.context() as patch:
            calls = fail_at(patch, index, "select", call)
            stream = talk.stream(SECOND, SOME, **how)
            if _failures(stream, f"the policy failed at call {call}") == 0:
                break
            seen = calls[0]
            assert _failures(stream, f"the policy failed at call {call}") == 3
            assert calls[0] == seen  # nothing is tried again
        assert len(talk.turns) == 1
        assert ids(document, SECOND) == wanted
    assert call >= 12  # every layer of every step
    assert len(talk.turns) == 2


def _failures(stream: Any, message: str) -> int:
    """How often of three times the result is refused."""
    count = 0
    asks: list[Callable[[], object]] = [lambda: stream.result, lambda: next(stream)]
    for ask in (*asks, asks[0]):
        try:
            ask()
        except ValueError as error:
            assert str(error) == message  # noqa: PT017
            count += 1
        except StopIteration:
            pass
    return count


def test_an_interrupted_stream_says_so(base: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    document = base.read(TEXT)
    wanted = ids(document, FIRST, NINE)
    stream = document.stream(FIRST, NINE)
    next(stream)
    with monkeypatch.context() as patch:
        patch.setattr(base._stepper, "step", _interrupt)
        with pytest.raises(Interruption):
            next(stream)
    for _ in range(2):
        with pytest.raises(EndedAnswerError, match=CUT_OFF):
            stream.result  # noqa: B018
        with pytest.raises(EndedAnswerError, match=CUT_OFF):
            next(stream)
    assert ids(document, FIRST, NINE) == wanted


def _interrupt(*_: Any) -> Any:
    raise Interruption


def test_a_closed_stream_says_so_and_forgets(base: Engine) -> None:
    document = base.with_policy("full").read(TEXT)
    talk = document.conversation()
    held = document.memory_report().near_bytes
    stream = talk.stream(FIRST, NINE)
    next(stream)
    assert document.memory_report().near_bytes > held
    stream.close()
    assert document.memory_report().near_bytes == held
    with pytest.raises(EndedAnswerError, match=CLOSED):
        stream.result  # noqa: B018
    assert talk.turns == ()
    whole = talk.stream(FIRST, NINE)
    text = whole.result.text
    whole.close()
    assert whole.result.text == text
    assert len(talk.turns) == 1


def test_an_older_stream_never_disturbs_the_next_answer(base: Engine) -> None:
    document = base.read(TEXT)
    talk, alone = document.conversation(), ids(document, SECOND)
    older = talk.stream(FIRST, NINE)
    next(older)
    newer = document.stream(SECOND, SOME)
    next(newer)
    message = r"^This answer ended when the document was asked again\. Read a stream to its end "
    for _ in range(3):
        with pytest.raises(EndedAnswerError, match=message):
            older.result  # noqa: B018
    older.close()
    assert newer.result.token_ids == alone
    assert talk.turns == ()


def test_a_stream_of_the_engine_gives_its_memory_back(
    base: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = base.with_policy("full-far")
    for end in (lambda stream: stream.close(), lambda stream: stream.result, _exhaust):
        stream = engine.stream(TEXT, SOME)
        next(stream)
        assert engine._ledger.used_bytes > 0
        end(stream)
        assert engine._ledger.used_bytes == 0
    left = engine.stream(TEXT, SOME)
    next(left)
    del left, stream
    assert engine._ledger.used_bytes == 0
    capped = engine.with_config(engine.config.replace(far_memory_bytes=1000))
    monkeypatch.setattr(capped, "check_memory", lambda _: None)
    refused = capped.stream(TEXT, SOME)
    for _ in range(2):
        with pytest.raises(OutOfMemoryError, match=r"^Far memory is full"):
            refused.result  # noqa: B018
    assert capped._ledger.used_bytes == 0


def _exhaust(stream: Any) -> None:
    assert len(list(stream)) > 1


def test_a_question_to_a_document_of_one_word_leaves_no_limit(base: Engine) -> None:
    """Nothing of it is read before the question, so the question decides how much is kept."""
    engine = base.with_policy("h2o")
    wanted = [ids(engine.read("a"), text_of(n, seed=n), NINE) for n in (5, 120)]
    document: Document = engine.read("a")
    got = [ids(document, text_of(n, seed=n), NINE) for n in (5, 120)]
    assert got == wanted

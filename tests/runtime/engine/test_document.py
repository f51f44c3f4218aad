from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from specs import representatives
from tiny_folder import make_folder, text_of

from nearfar.cli.loading import context_tokens
from nearfar.config import EngineConfig, SamplingConfig
from nearfar.errors import (
    ContextTooLongError,
    DocumentError,
    InvalidOptionError,
    OutOfMemoryError,
)
from nearfar.policies.registry import policy_names
from nearfar.runtime.engine.engine import Engine
from nearfar.runtime.engine.planning import planner
from nearfar.runtime.engine.prepared import prepare
from nearfar.runtime.text.chat import DocumentPrompt

TEXT = text_of(150, seed=9)
NINE = SamplingConfig(max_new_tokens=9)
WARM = SamplingConfig(max_new_tokens=9, temperature=1.2, seed=6)
QUESTIONS = ("what did the cat do?", "where?", "did it sit under a red house and then run there?")
# small tables keep the suite quick
SPECS = representatives(policy_names())
every_kind = pytest.mark.parametrize("policy", SPECS)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("model")
    return folder, make_folder(folder, context=1000)


@pytest.fixture(scope="module")
def base(model_folder: tuple[Path, Any]) -> Engine:
    config = EngineConfig(
        dtype="float32", far_dtype="float32", device="cpu", threads=1, window=8, budget=16
    )
    return Engine.from_pretrained(str(model_folder[0]), config)


@every_kind
def test_answers_do_not_depend_on_what_was_asked_before(base: Engine, policy: str) -> None:
    engine = base.with_policy(policy)
    document = engine.read(TEXT)
    first = {question: document.ask(question, NINE).token_ids for question in QUESTIONS}
    document.ask(QUESTIONS[1], SamplingConfig(max_new_tokens=150))
    for question in reversed(QUESTIONS):
        assert document.ask(question, NINE).token_ids == first[question]
        assert engine.read(TEXT).ask(question, NINE).token_ids == first[question]
    assert len(set(first.values())) == len(QUESTIONS)


def test_answer_is_what_transformers_generates(
    base: Engine, model_folder: tuple[Path, Any]
) -> None:
    prompt = DocumentPrompt(base.tokenizer, TEXT)
    for policy in ("full", "full-far"):
        document = base.with_policy(policy).read(f"  {TEXT}\n")
        for question in QUESTIONS:
            ids = prompt.prefix_ids + prompt.question_ids(question)
            answer = document.ask(f" {question} ", NINE)
            wanted = model_folder[1].generate(
                torch.tensor([ids]), max_new_tokens=9, do_sample=False, eos_token_id=None
            )
            assert list(answer.token_ids) == wanted[0, len(ids) :].tolist()
            assert answer.prompt_tokens == len(ids) - document.tokens
            assert answer.question == f" {question} "
    assert document.tokens == len(prompt.prefix_ids) > 150
    assert document.prefill_seconds > 0


@pytest.mark.parametrize("sampling", [NINE, WARM])
def test_stream_equals_ask(base: Engine, sampling: SamplingConfig) -> None:
    document = base.read(TEXT)
    whole = document.ask(QUESTIONS[0], sampling)
    stream = document.stream(QUESTIONS[0], sampling)
    pieces = list(stream)
    assert len(pieces) > 1
    assert "".join(pieces) == stream.result.text == whole.text
    assert stream.result.token_ids == whole.token_ids


@every_kind
def test_stream_left_behind_does_not_change_the_next_answer(base: Engine, policy: str) -> None:
    document = base.with_policy(policy).read(TEXT)
    wanted = [document.ask(question, NINE).token_ids for question in QUESTIONS]
    left = document.stream(QUESTIONS[0], NINE)
    next(left)
    assert document.ask(QUESTIONS[1], NINE).token_ids == wanted[1]
    with pytest.raises(RuntimeError, match=r"^This answer ended when the document was asked again"):
        next(left)
    assert document.ask(QUESTIONS[2], NINE).token_ids == wanted[2]


def test_stream_that_was_never_begun_ends_too(base: Engine) -> None:
    document = base.read(TEXT)
    wanted = document.ask(QUESTIONS[1], NINE).token_ids
    never_begun = document.stream(QUESTIONS[0], NINE)
    current = document.stream(QUESTIONS[1], NINE)
    next(current)
    with pytest.raises(RuntimeError, match="asked again"):
        next(never_begun)
    assert current.result.token_ids == wanted


def test_result_of_a_finished_stream_stays(base: Engine) -> None:
    document = base.read(TEXT)
    stream = document.stream(QUESTIONS[0], NINE)
    text = "".join(stream)
    document.ask(QUESTIONS[1], NINE)
    assert stream.result.text == text


def test_documents_of_one_engine_are_apart(base: Engine) -> None:
    other_text = text_of(99, seed=5)
    first, second = base.read(TEXT), base.read(other_text)
    got = [document.ask(QUESTIONS[0], NINE).token_ids for document in (first, second)]
    assert got[0] == base.read(TEXT).ask(QUESTIONS[0], NINE).token_ids != got[1]
    assert got[1] == base.read(other_text).ask(QUESTIONS[0], NINE).token_ids


@pytest.mark.parametrize("text", ["a", "the", "the cat sat"])
def test_document_may_be_a_word(base: Engine, text: str) -> None:
    """Even one of which no token is sure before the question is known."""
    document = base.read(text)
    ids = base.tokenizer.encode(f"{text}\n\nQuestion: {QUESTIONS[0]}\nAnswer:")
    answer = document.ask(QUESTIONS[0], NINE)
    assert document.tokens + answer.prompt_tokens == len(ids)
    assert answer.token_ids == base.generate(base.tokenizer.decode(ids), NINE).token_ids


@pytest.mark.parametrize("text", ["", " \n\t"])
def test_document_without_text_is_refused(base: Engine, text: str) -> None:
    with pytest.raises(DocumentError, match=r"^The document has no text\. Give one with text\.$"):
        base.read(text)


def test_bytes_are_no_text(base: Engine) -> None:
    with pytest.raises(TypeError, match=r"must be a str, and bytes be decoded\. Got bytes\."):
        base.read(b"some bytes")  # type: ignore[arg-type]


def test_text_that_is_not_unicode_is_named_by_what_it_is(base: Engine) -> None:
    document = base.read(TEXT)
    talk = document.conversation()
    talk.ask("first", NINE)
    said = r"^The question is not valid Unicode: U\+D800 at character 1\. Give it in UTF-8\.$"
    for ask in (document.ask, talk.ask):
        with pytest.raises(InvalidOptionError, match=said):
            ask("a\ud800", NINE)
    with pytest.raises(InvalidOptionError, match=said.replace("question", "text")):
        document.extend("a\ud800")
    assert len(talk.turns) == 1


def test_document_too_long_for_the_model(base: Engine) -> None:
    gc.collect()  # documents of other tests
    before = base._ledger.used_bytes
    message = (
        r"^The text has \d{4} tokens and the model reads at most 1000\. Shorten it, split it, or "
        r"choose a model with a longer context \(--model\)\.$"
    )
    with pytest.raises(ContextTooLongError, match=message):
        base.read(text_of(1500))
    assert base._ledger.used_bytes == before


@pytest.mark.parametrize("name", ["sinks", "window", "threads", "chunk_tokens"])
def test_what_is_counted_is_a_whole_number(name: str) -> None:
    with pytest.raises(InvalidOptionError, match=f"^{name} must be a whole number. Got 1.5.$"):
        EngineConfig(**{name: 1.5})  # type: ignore[arg-type]


def test_an_answer_of_half_a_token_would_never_end() -> None:
    with pytest.raises(InvalidOptionError, match=r"max-new-tokens must be a whole number\."):
        SamplingConfig(max_new_tokens=1.5)  # type: ignore[arg-type]


def test_a_question_may_fill_the_context_exactly(
    base: Engine, model_folder: tuple[Path, Any]
) -> None:
    prepared = prepare(str(model_folder[0]))
    limit, question = prepared.config.max_context_tokens, "where?"
    words = text_of(limit, seed=9).split()

    def both(count: int) -> int:
        prompt = prepared.document_prompt(" ".join(words[:count]))
        return len(prompt.prefix_ids) + len(prompt.question_ids(question))

    count = next(n for n in range(len(words)) if both(n + 1) > limit)
    assert both(count) == limit
    text, longer = (" ".join(words[:n]) for n in (count, count + 1))
    assert context_tokens(prepared.document_prompt(text), limit, [question], 9) == limit
    answer = base.read(text).ask(question, NINE)
    assert (answer.new_tokens, answer.finish_reason) == (1, "context")
    with pytest.raises(ContextTooLongError, match="Shorten the document"):
        context_tokens(prepared.document_prompt(longer), limit, [question], 9)
    with pytest.raises(ContextTooLongError):
        base.read(longer).ask(question, NINE)


@pytest.mark.parametrize("policy", ["full-far", "h2o"])
def test_question_too_long_for_what_is_left(base: Engine, policy: str) -> None:
    document = base.with_policy(policy).read(TEXT)
    wanted = document.ask(QUESTIONS[0], NINE).token_ids
    with pytest.raises(ContextTooLongError, match="and the model reads at most 1000"):
        document.ask(text_of(1000))
    assert document.ask(QUESTIONS[0], NINE).token_ids == wanted


def test_far_cap_is_seen_before_reading(base: Engine) -> None:
    engine = base.with_config(base.config.replace(far_memory_bytes=20_000, policy="full-far"))
    with pytest.raises(OutOfMemoryError, match=r"^Not enough far memory: .*, 19\.5 KiB there\."):
        engine.read(TEXT)


def test_far_cap_is_hit_while_answering(base: Engine) -> None:
    """The document stays whole, and a shorter answer still fits."""
    block_bytes = 3 * 256 * 2 * 2 * 6 * 4  # all layers
    engine = base.with_config(base.config.replace(far_memory_bytes=block_bytes, policy="full-far"))
    document = engine.read(text_of(100, seed=9))
    assert engine._ledger.used_bytes == block_bytes
    wanted = document.ask(QUESTIONS[0], NINE).token_ids
    with pytest.raises(OutOfMemoryError, match=r"^Far memory is full: .* Raise --far-memory"):
        document.ask(QUESTIONS[0], SamplingConfig(max_new_tokens=400))
    assert document.ask(QUESTIONS[0], NINE).token_ids == wanted


@every_kind
def test_memory_is_given_back_with_the_document(base: Engine, policy: str) -> None:
    engine = base.with_policy(policy)
    document, other = engine.read(TEXT), engine.read(TEXT)
    next(document.stream(QUESTIONS[0], NINE))
    held = engine._ledger.used_bytes
    assert (held > 0) == engine.policy.traits.keeps_far
    report = other.memory_report()
    del document
    assert engine._ledger.used_bytes == held // 2
    whole = engine.memory_report()
    assert (whole.near_bytes, whole.far_bytes) == (report.near_bytes, report.far_bytes)
    assert whole.index_bytes == report.index_bytes
    del other
    assert engine._ledger.used_bytes == 0
    assert engine.memory_report().near_bytes == 0


def test_refused_reading_gives_memory_back(base: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = base.with_config(base.config.replace(far_memory_bytes=20_000, policy="full-far"))
    monkeypatch.setattr(engine, "check_memory", lambda _: None)
    with pytest.raises(OutOfMemoryError, match=r"^Far memory is full"):
        engine.read(TEXT)
    gc.collect()
    assert engine._ledger.used_bytes == 0


def test_progress_counts_layers(base: Engine) -> None:
    seen: list[tuple[int, int]] = []
    base.read(TEXT, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize("policy", ["sketch", "h2o", "full"])
def test_text_that_does_not_fit_behind_a_document_is_refused_unread(
    base: Engine, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = base.with_policy(policy)
    document = engine.read(TEXT)
    first = document.ask(QUESTIONS[0], NINE).token_ids
    monkeypatch.setattr(planner, "available_memory_bytes", lambda: 500_000)
    monkeypatch.setattr(engine, "read_ids", None)
    with pytest.raises(OutOfMemoryError, match=r"^Not enough near memory: .*asking"):
        document.extend(TEXT)
    monkeypatch.undo()
    assert document.ask(QUESTIONS[0], NINE).token_ids == first
    document.extend(TEXT)
    assert document.tokens > 300

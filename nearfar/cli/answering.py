"""Shows questions and answers: as they are generated, as JSON and as a table of facts."""

from __future__ import annotations

import dataclasses
import statistics
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from textwrap import shorten
from typing import TYPE_CHECKING, Any

import click

from nearfar.cli.options import QuestionOptions, Settings
from nearfar.cli.output import Output, facts_table, format_seconds
from nearfar.config import counted, format_bytes
from nearfar.errors import InvalidOptionError
from nearfar.runtime.text.unicode_text import check_unicode, shown

if TYPE_CHECKING:
    from nearfar.records import Verification
    from nearfar.results import Answer, Generation, MemoryReport
    from nearfar.runtime.engine.conversation import Conversation
    from nearfar.runtime.engine.document import Document
    from nearfar.runtime.engine.engine import Engine
    from nearfar.runtime.saved.replacing import Session

PASSAGE_WIDTH = 100  # columns of a passage's text


def check_questions(asked: QuestionOptions, as_json: bool, may_ask: bool = True) -> None:
    """Raise a usage error if there is no question and no terminal to type one."""
    if any(not question.strip() for question in asked.questions):
        raise click.UsageError("A question (-q) is empty.")
    for question in asked.questions:
        check_unicode(question, "A question (-q)")
    if asked.questions:
        return
    if as_json:
        raise click.UsageError("With --json, give at least one question: -q QUESTION.")
    if not may_ask or not on_terminal():
        raise click.UsageError("Give at least one question: -q QUESTION.")


def on_terminal() -> bool:
    """Whether a user can type questions."""
    return sys.stdin.isatty()


def answer_all(
    engine: Engine,
    document: Document,
    asked: QuestionOptions,
    settings: Settings,
    output: Output,
    session: Session | None = None,
) -> None:
    """Answer the given or typed questions, and show times and memory.

    With a ``session`` they are one conversation, which is saved there after each answer.
    """
    talk: Document | Conversation = document
    if session is not None:
        talk = document.conversation(session.begun)
    engine.on_thought = output.think
    answers = []
    for question in asked.questions or _questions_from_terminal():
        answers.append(_answer(talk, question, asked, settings, output))
        if session is not None:
            talk.save(session.place.named)
    report = document.memory_report()
    output.record(_as_record(engine, document, answers, report))
    output.write("\n")
    output.show(facts_table(_as_facts(document, answers, report)))


def _questions_from_terminal() -> Iterator[str]:
    """Typed questions, until an empty line or Ctrl-D."""
    with suppress(ImportError):
        import readline  # noqa: F401  gives `input` editing and history
    while True:
        try:
            question = input("Question (empty line to end): ").strip()
        except EOFError:
            click.echo()
            return
        except UnicodeDecodeError as error:
            raise InvalidOptionError(
                f"A question that is typed must be {error.encoding.upper()}: {error.reason} at "
                f"byte {error.start:,}. Give it with -q, or change the terminal's encoding."
            ) from None
        if not question:
            return
        check_unicode(question, "The question")
        yield question


def _answer(
    talk: Document | Conversation,
    question: str,
    asked: QuestionOptions,
    settings: Settings,
    output: Output,
) -> Answer:
    output.write(f"\nQuestion: {question}\n")
    stream = talk.stream(question, settings.sampling, reading=asked.reading, sources=asked.sources)
    for piece in stream:
        output.write(piece)
    output.write("\n")
    note_thought(stream.result, output)
    for passage in stream.result.passages:
        where = f"{shown(passage.source)}:{passage.start}-{passage.stop}"
        text = shown(shorten(passage.text, PASSAGE_WIDTH))
        output.write(f"  {passage.weight:6.2%}  {where}  {text}\n")
    held = stream.result.verification
    if held is not None and held.selections:
        output.write(
            f"  error at most {held.bound:.3f} by the policy's own estimate; of "
            f"{counted(held.selections, 'selection')} {held.widened:,} read more than the budget, "
            f"{held.exhausted:,} of them everything\n"
        )
    return stream.result


def note_thought(result: Generation, output: Output) -> None:
    """Print a note if the tokens ended before the answer began."""
    if result.ended_in_thought:
        output.note(
            f"The {counted(result.new_tokens, 'token')} ended within a thought, before an answer. "
            "Raise --max-new-tokens, or try --no-thinking."
        )


def _far_bytes_read_per_token(answers: Sequence[Answer]) -> float:
    """Mean over all generated tokens."""
    tokens = sum(answer.new_tokens for answer in answers)
    read = sum(answer.far_bytes_read_per_token * answer.new_tokens for answer in answers)
    return read / tokens if tokens else 0.0


def _as_record(
    engine: Engine, document: Document, answers: Sequence[Answer], report: MemoryReport
) -> dict[str, Any]:
    return {
        "model": engine.model_name,
        "policy": engine.config.policy,
        "device": engine.device,
        "dtype": engine.dtype,
        "context_tokens": document.tokens,
        "prefill_seconds": document.prefill_seconds,
        "opened": document.was_opened,
        "answers": [
            {
                "question": answer.question,
                "answer": answer.text,
                "thought": answer.thought,
                "ended_in_thought": answer.ended_in_thought,
                "new_tokens": answer.new_tokens,
                "finish_reason": answer.finish_reason,
                "seconds_to_first_token": answer.seconds_to_first_token,
                "tokens_per_second": answer.tokens_per_second,
                "far_bytes_read_per_token": answer.far_bytes_read_per_token,
                "verification": _as_dict(answer.verification),
                "sources": [dataclasses.asdict(passage) for passage in answer.passages],
            }
            for answer in answers
        ],
        "weight_bytes": report.weight_bytes,
        "near_bytes": report.near_bytes,
        "far_bytes": report.far_bytes,
        "index_bytes": report.index_bytes,
        "far_bytes_read_per_token": _far_bytes_read_per_token(answers),
        "peak_rss_bytes": report.peak_rss_bytes,
        "peak_gpu_bytes": report.peak_gpu_bytes,
    }


def _as_dict(held: Verification | None) -> dict[str, float] | None:
    return None if held is None else held._asdict()


def _as_facts(
    document: Document, answers: Sequence[Answer], report: MemoryReport
) -> dict[str, str]:
    when = ", when it was read" if document.was_opened else ""
    facts = {
        "tokens read": f"{document.tokens:,}",
        "prefill": format_seconds(document.prefill_seconds) + when,
    }
    if answers:
        first = statistics.median(answer.seconds_to_first_token for answer in answers)
        speed = statistics.median(answer.tokens_per_second for answer in answers)
        of = f" (median of {len(answers)} answers)" if len(answers) > 1 else ""
        facts["first token after"] = format_seconds(first) + of
        facts["decoding"] = f"{speed:.1f} tokens/s" + of
    facts |= {
        "near": format_bytes(report.near_bytes),
        "far": format_bytes(report.far_bytes),
        "index": format_bytes(report.index_bytes),
        "far read per token": format_bytes(_far_bytes_read_per_token(answers)),
        "peak memory": format_bytes(report.peak_rss_bytes),
    }
    if report.peak_gpu_bytes:
        facts["peak GPU memory"] = format_bytes(report.peak_gpu_bytes)
    return facts

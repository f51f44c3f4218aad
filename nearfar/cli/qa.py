"""`nearfar qa`: read documents once, answer questions about them."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import click

from nearfar.cli import loading
from nearfar.cli.options import Settings, engine_options, model_option
from nearfar.cli.output import Output, facts_table, format_seconds
from nearfar.config import format_bytes

if TYPE_CHECKING:
    from nearfar.runtime.document import Document
    from nearfar.runtime.engine import Engine
    from nearfar.runtime.results import Answer, MemoryReport


@click.command()
@click.argument("documents", nargs=-1, required=True)
@click.option("-q", "--question", "questions", multiple=True, help="May be given several times.")
@model_option
@engine_options()
def qa(documents: tuple[str, ...], questions: tuple[str, ...], settings: Settings) -> None:
    """Answer questions about DOCUMENTS: text, Markdown, HTML, PDF, or - for stdin.

    The documents are read once, and every question is answered from the same memory. Without -q,
    on a terminal, questions are asked for one after another.
    """
    _check_questions(documents, questions, settings)
    with Output(settings.as_json) as output:
        text = loading.read_documents(documents)
        engine, document = loading.open_document(settings, text, questions, output)
        answers = [
            _answer(document, question, settings, output)
            for question in questions or _questions_from_terminal()
        ]
        report = document.memory_report()
        output.record(_as_record(engine, document, answers, report))
        output.write("\n")
        output.show(facts_table(_as_facts(document, answers, report)))


def _check_questions(
    documents: Sequence[str], questions: Sequence[str], settings: Settings
) -> None:
    """Raise a usage error where there is no question, and none can be asked for."""
    if any(not question.strip() for question in questions):
        raise click.UsageError("A question (-q) is empty.")
    if questions:
        return
    if settings.as_json:
        raise click.UsageError("With --json, give at least one question: -q QUESTION.")
    if loading.STDIN in documents or not on_terminal():
        raise click.UsageError("Give at least one question: -q QUESTION.")


def on_terminal() -> bool:
    """Whether someone can be asked."""
    return sys.stdin.isatty()


def _questions_from_terminal() -> Iterator[str]:
    """What is typed, until an empty line or Ctrl-D."""
    with suppress(ImportError):
        import readline  # noqa: F401  gives `input` editing and history
    while True:
        try:
            question = input("Question (empty line to end): ").strip()
        except EOFError:
            click.echo()
            return
        if not question:
            return
        yield question


def _answer(document: Document, question: str, settings: Settings, output: Output) -> Answer:
    output.write(f"\nQuestion: {question}\n")
    stream = document.stream(question, settings.sampling)
    for piece in stream:
        output.write(piece)
    output.write("\n")
    return stream.result


def far_bytes_read_per_token(answers: Sequence[Answer]) -> float:
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
        "answers": [
            {
                "question": answer.question,
                "answer": answer.text,
                "new_tokens": answer.new_tokens,
                "finish_reason": answer.finish_reason,
                "seconds_to_first_token": answer.seconds_to_first_token,
                "tokens_per_second": answer.tokens_per_second,
                "far_bytes_read_per_token": answer.far_bytes_read_per_token,
            }
            for answer in answers
        ],
        "weight_bytes": report.weight_bytes,
        "near_bytes": report.near_bytes,
        "far_bytes": report.far_bytes,
        "index_bytes": report.index_bytes,
        "far_bytes_read_per_token": far_bytes_read_per_token(answers),
        "peak_rss_bytes": report.peak_rss_bytes,
        "peak_gpu_bytes": report.peak_gpu_bytes,
    }


def _as_facts(
    document: Document, answers: Sequence[Answer], report: MemoryReport
) -> dict[str, str]:
    facts = {
        "tokens read": f"{document.tokens:,}",
        "prefill": format_seconds(document.prefill_seconds),
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
        "far read per token": format_bytes(far_bytes_read_per_token(answers)),
        "peak memory": format_bytes(report.peak_rss_bytes),
    }
    if report.peak_gpu_bytes:
        facts["peak GPU memory"] = format_bytes(report.peak_gpu_bytes)
    return facts

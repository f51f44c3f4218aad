"""`nearfar compare`: the same questions under several policies, in one table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click
from rich.table import Table

from nearfar.cli import loading
from nearfar.cli.options import Settings, engine_options, model_option
from nearfar.cli.output import Output, format_seconds
from nearfar.config import format_bytes
from nearfar.errors import NearfarError

if TYPE_CHECKING:
    from nearfar.evaluation.compare import Outcome, Row

COLUMNS = ("policy", "answer", "exact", "contains", "agrees", "first token", "tokens/s")
BYTE_COLUMNS = ("near", "far", "index", "far read/token")


@click.command()
@click.argument("documents", nargs=-1, required=True)
@click.option("-q", "--question", "questions", multiple=True, required=True)
@click.option("--answer", "answers", multiple=True, help="The right answer, one per question.")
@click.option("--policies", required=True, help="Names with commas between; full always runs.")
@model_option
@engine_options("policy")
def compare(
    documents: tuple[str, ...],
    questions: tuple[str, ...],
    answers: tuple[str, ...],
    policies: str,
    settings: Settings,
) -> None:
    """Ask about DOCUMENTS under several policies.

    exact: the answer is the given one but for case, punctuation and space. contains: the given
    answer is in it. agrees: share of the answer that equals full's from the start on.
    """
    if answers and len(answers) != len(questions):
        raise click.UsageError(
            f"Give one --answer per question: {len(questions)} expected, {len(answers)} given."
        )
    if any(not text.strip() for text in (*questions, *answers)):
        raise click.UsageError("A question or an answer is empty.")
    names = [name.strip() for name in policies.split(",") if name.strip()]
    if not names:
        raise click.UsageError("--policies names no policy.")
    with Output(settings.as_json) as output:
        text = loading.read_documents(documents)
        expected = answers or (None,) * len(questions)
        pairs = list(zip(questions, expected, strict=True))
        _compare(text, pairs, names, settings, output)


def _compare(
    text: str,
    questions: list[tuple[str, str | None]],
    policies: list[str],
    settings: Settings,
    output: Output,
) -> None:
    from nearfar.evaluation.compare import Question
    from nearfar.evaluation.compare import compare as run

    loading.check_policies(policies)
    prepared = loading.prepare_model(settings, output)
    asked = [question for question, _ in questions]
    loading.context_tokens(prepared, text, asked, settings.sampling.max_new_tokens)
    # no plan here: what does not fit under one policy may fit under the next
    engine = loading.open_engine(settings, prepared, None, output)
    rows = run(
        engine,
        text,
        [Question(*pair) for pair in questions],
        policies,
        settings.sampling,
        lambda row: output.note(f"{row.policy}: {row.error or 'done'}"),
    )
    if all(row.error for row in rows):
        reasons = " ".join(f"{row.policy}: {row.error}" for row in rows)
        raise NearfarError(f"Every policy failed. {reasons}")
    output.record(
        {"model": engine.model_name, "context_tokens": prepared.count_document_tokens(text)}
    )
    output.record({"questions": asked, "policies": [_row_record(row) for row in rows]})
    for number, question in enumerate(asked):
        output.show(_table(question, number, rows))


def _row_record(row: Row) -> dict[str, Any]:
    record: dict[str, Any] = {"policy": row.policy, "error": row.error}
    if row.memory is not None:
        record |= {
            "prefill_seconds": row.prefill_seconds,
            "near_bytes": row.memory.near_bytes,
            "far_bytes": row.memory.far_bytes,
            "index_bytes": row.memory.index_bytes,
        }
    return record | {"answers": [_outcome_record(outcome) for outcome in row.outcomes]}


def _outcome_record(outcome: Outcome) -> dict[str, Any]:
    answer = outcome.answer
    return {
        "question": answer.question,
        "answer": answer.text,
        "exact_match": outcome.exact_match,
        "contains": outcome.contains,
        "agreement": outcome.agreement,
        "new_tokens": answer.new_tokens,
        "seconds_to_first_token": answer.seconds_to_first_token,
        "tokens_per_second": answer.tokens_per_second,
        "far_bytes_read_per_token": answer.far_bytes_read_per_token,
    }


def _table(question: str, number: int, rows: Sequence[Row]) -> Table:
    table = Table(title=question, title_justify="left", pad_edge=False)
    for column in COLUMNS + BYTE_COLUMNS:
        text = column in ("policy", "answer")
        table.add_column(column, justify="left" if text else "right", no_wrap=column == "policy")
    for row in rows:
        if row.memory is None:
            table.add_row(row.policy, f"failed: {row.error}")
            continue
        outcome = row.outcomes[number]
        answer = outcome.answer
        table.add_row(
            row.policy,
            answer.text.strip(),
            _yes_or_no(outcome.exact_match),
            _yes_or_no(outcome.contains),
            "" if outcome.agreement is None else f"{outcome.agreement:.0%}",
            format_seconds(answer.seconds_to_first_token),
            f"{answer.tokens_per_second:.1f}",
            format_bytes(row.memory.near_bytes),
            format_bytes(row.memory.far_bytes),
            format_bytes(row.memory.index_bytes),
            format_bytes(answer.far_bytes_read_per_token),
        )
    return table


def _yes_or_no(value: bool | None) -> str:
    return {None: "", True: "yes", False: "no"}[value]

"""Plans, checks, runs and shows a comparison for `nearfar compare`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import click

from nearfar.cli import loading
from nearfar.cli.comparison_tables import show_questions, show_tasks
from nearfar.cli.document_options import DocumentsAs
from nearfar.cli.options import ALL, Settings
from nearfar.cli.output import Output, format_seconds
from nearfar.config import counted
from nearfar.errors import NearfarError

if TYPE_CHECKING:
    from nearfar.evaluation.harness.plan import Plan
    from nearfar.evaluation.harness.results import Results, Row
    from nearfar.evaluation.harness.timing import TimeLeft
    from nearfar.evaluation.tasks.base import Material
    from nearfar.runtime.engine.engine import Engine
    from nearfar.runtime.engine.prepared import Prepared

ROWS_NAME, REPORT_NAME = "results.jsonl", "report.html"


@dataclass(frozen=True)
class Wanted:
    """The command line without the engine's settings."""

    documents: tuple[str, ...]
    questions: tuple[str, ...]
    answers: tuple[str, ...]
    tasks: tuple[str, ...]
    policies: tuple[str, ...]
    contexts: tuple[int, ...]
    budgets: tuple[float, ...]
    samples: int
    data: tuple[Path, ...]
    query: str
    output: Path | None
    force: bool
    minutes: float | None
    documents_as: DocumentsAs


class Work(NamedTuple):
    """The planned work and its material."""

    plan: Plan
    material: Material


def run_comparison(wanted: Wanted, settings: Settings, output: Output) -> None:
    """Make the missing rows of the comparison, and show all rows."""
    from nearfar.evaluation.harness.results import Results

    text = None
    if wanted.documents:
        text = loading.read_documents(wanted.documents, output, wanted.documents_as)
    _check_names(wanted, output)
    prepared = loading.prepare_model(settings, output)
    work = _planned(wanted, settings, prepared, text)
    _note_covered(work, settings, output)
    path = None if wanted.output is None else wanted.output / ROWS_NAME
    with Results(path) as results:
        if len(results):
            output.note(f"{path} has {counted(len(results), 'row')}; going on from there.")
        # no memory plan here: a context that does not fit under one policy may fit under another
        engine = loading.open_engine(settings, prepared, None, output)
        finished = _run(work, engine, results, wanted.minutes, output)
        rows = list(results)
    _show(rows, finished, wanted, output)


def _check_names(wanted: Wanted, output: Output) -> None:
    """Check everything that can be wrong before a model is opened."""
    from nearfar.evaluation.tasks.registry import create_tasks

    loading.read_question_files(wanted.data, output, strict=wanted.documents_as.strict)
    if wanted.policies != (ALL,):
        loading.check_policies(wanted.policies)
    create_tasks(wanted.tasks, wanted.data)
    if "qa" in wanted.tasks and not wanted.data:
        raise click.UsageError("The task qa needs a file of questions: --data FILE.")


def _planned(wanted: Wanted, settings: Settings, prepared: Prepared, text: str | None) -> Work:
    """The planned work, checked as far as possible without weights."""
    from nearfar.evaluation.harness.plan import Plan, check_plan, make_variations
    from nearfar.evaluation.haystack import Haystack
    from nearfar.evaluation.tasks.base import Material, Question, Task
    from nearfar.evaluation.tasks.questions import OwnQuestions
    from nearfar.evaluation.tasks.registry import create_tasks
    from nearfar.policies.registry import usable_names

    new_tokens = settings.sampling.max_new_tokens
    if wanted.questions:
        tasks: list[Task] = [OwnQuestions()]
        contexts: tuple[int, ...] = (0,)  # the document as it is
    else:
        tasks, contexts = create_tasks(wanted.tasks, wanted.data), wanted.contexts
    answers = wanted.answers or ("",) * len(wanted.questions)
    asked = tuple(
        Question(f"\n\n{question.strip()}", (answer,) if answer else (), new_tokens)
        for question, answer in zip(wanted.questions, answers, strict=True)
    )
    policies = usable_names() if wanted.policies == (ALL,) else wanted.policies
    variations = make_variations(policies, wanted.budgets)
    plan = Plan(tasks, contexts, variations, wanted.samples, wanted.query)  # type: ignore[arg-type]
    limit, seed = prepared.config.max_context_tokens, settings.config.seed
    check_plan(plan, limit)
    material = Material(prepared.tokenizer, Haystack(text), seed, wanted.data, text or "", asked)
    for task in tasks:
        task.check(material)
        if isinstance(task, OwnQuestions):
            task.check_length(material, limit)
    return Work(plan, material)


def _note_covered(work: Work, settings: Settings, output: Output) -> None:
    """Note budgets that are so large that every policy reads all keys."""
    from nearfar.evaluation.harness.plan import covering_budgets

    material = work.material
    own = [material.own.tokens(material.tokenizer)] if material.asked else []
    config = settings.config
    found = covering_budgets(work.plan, own, config.sinks + config.window)
    output.record({"covered": [{"context_tokens": t, "budget": b} for t, b in found]})
    for tokens, budget in found:
        output.note(
            f"Note: a budget of {counted(int(budget), 'key')} covers a context of {tokens:,} "
            "tokens: there every policy attends to all keys. Lower --budgets to compare them."
        )


def _run(
    work: Work, engine: Engine, results: Results, minutes: float | None, output: Output
) -> bool:
    """Make the missing rows; False if the time ended before they were complete."""
    from nearfar.evaluation.harness.runner import Runner

    deadline = None if minutes is None else time.monotonic() + 60 * minutes
    with output.ticker() as tell:

        def on_row(row: Row, left: TimeLeft) -> None:
            text = _line(row)
            seconds = left.seconds
            if row.error is not None:
                output.note(f"{text}: {row.error}")
            tell(text if seconds is None else f"{text} · {format_seconds(seconds)} left")

        runner = Runner(engine, *work, results, on_row)
        return runner.run(lambda: deadline is not None and time.monotonic() > deadline)


def _line(row: Row) -> str:
    key = row.key
    length = f" {key.context_tokens:,}" if key.context_tokens else ""
    budget = "" if key.budget is None else f" {key.budget:g}"
    which = f"case {key.case + 1}, question {key.question + 1}"
    text = f"{key.task}{length} · {which} · {key.policy}{budget}"
    score = row.outcome.score if row.outcome is not None else None
    return text if score is None else f"{text} · score {score:.4g}"


def _show(rows: Sequence[Row], finished: bool, wanted: Wanted, output: Output) -> None:
    """Tables, the JSON object, and the report."""
    from nearfar.evaluation.summary import summarise

    if rows and all(row.error for row in rows):
        reasons = dict.fromkeys(f"{row.key.policy}: {row.error}" for row in rows)
        raise NearfarError(f"Every policy failed. {' '.join(reasons)}")
    cells = summarise(rows)
    output.record({"finished": finished})
    if wanted.questions:
        show_questions(rows, wanted.questions, output)
    else:
        show_tasks(cells, output)
    if wanted.output is not None:
        from nearfar.evaluation.report.page import write_report

        path = wanted.output / REPORT_NAME
        write_report(rows, path, overwrite=wanted.force)
        output.note(f"Wrote {path}")
    if not finished:
        output.note("The time is up. The same command goes on from here.")

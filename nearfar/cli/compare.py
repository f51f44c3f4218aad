"""`nearfar compare`: tasks under policies, in accuracy, speed and bytes."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from nearfar.cli import loading
from nearfar.cli.comparison_tables import show_questions, show_tasks
from nearfar.cli.options import Settings, engine_options, model_option, split_names, strict_option
from nearfar.cli.output import Output, format_seconds
from nearfar.cli.outputs import agreed_comparison, force_option
from nearfar.errors import InvalidOptionError, NearfarError
from nearfar.runtime.text.unicode_text import check_unicode

if TYPE_CHECKING:
    from nearfar.evaluation.harness.plan import Plan
    from nearfar.evaluation.harness.results import Results, Row
    from nearfar.evaluation.harness.timing import TimeLeft
    from nearfar.evaluation.tasks.base import Material
    from nearfar.runtime.engine.prepared import Prepared

ROWS_NAME, REPORT_NAME = "results.jsonl", "report.html"
ALL = "all"


@dataclass(frozen=True)
class Wanted:
    """What the command line asks for, beside the engine's settings."""

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
    strict: bool


def split_contexts(text: str) -> tuple[int, ...]:
    """Numbers of tokens with commas between; ``32K`` is 32,768."""
    found = []
    for name in split_names(text):
        number, thousands = (name[:-1], 1024) if name[-1] in "kK" else (name, 1)
        if not number.isdigit() or int(number) < 1:
            raise InvalidOptionError(
                f"A context is a number of tokens, like 8192 or 32K. Got {name!r}."
            )
        found.append(int(number) * thousands)
    return tuple(dict.fromkeys(found))


def split_budgets(text: str) -> tuple[float, ...]:
    """Budgets with commas between."""
    from nearfar.config import Budget

    found = []
    for name in split_names(text):
        try:
            found.append(Budget(float(name)).value)
        except ValueError:
            raise InvalidOptionError(f"A budget is a number, like 1024. Got {name!r}.") from None
    return tuple(dict.fromkeys(found))


@click.command()
@click.argument("documents", nargs=-1)
@click.option("-q", "questions", multiple=True, help="About DOCUMENTS; or --tasks.")
@click.option("--answer", "answers", multiple=True, help="The right answer, one per question.")
@click.option(
    "--tasks",
    type=split_names,
    default="",
    metavar="NAMES",
    help="ruler (its 13) or some of them, needles, recall, qa, perplexity, distances, throughput.",
)
@click.option(
    "--policies",
    type=split_names,
    required=True,
    metavar="NAMES",
    help="Names with commas between, or all; exact attention always runs.",
)
@click.option(
    "--contexts",
    type=split_contexts,
    default="4096",
    show_default=True,
    metavar="TOKENS",
    help="Lengths of the tasks' prompts, like 8192,32K.",
)
@click.option(
    "--budgets",
    type=split_budgets,
    default="1024",
    show_default=True,
    metavar="KEYS",
    help="Far keys per KV group and token; below 1, shares.",
)
@click.option("--samples", default=10, show_default=True, help="Questions of each task and length.")
@click.option(
    "--data",
    multiple=True,
    type=click.Path(path_type=Path),
    help="JSONL file of questions, for qa, qa_1 and qa_2.",
)
@click.option(
    "--query",
    type=click.Choice(["agnostic", "aware", "strict"]),
    default="agnostic",
    show_default=True,
    help="Whether a policy acts before the question is known, after it, or on its tokens too.",
)
@click.option(
    "--output",
    "folder",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder for results.jsonl, to which a later run adds what is missing, and report.html.",
)
@force_option
@click.option("--minutes", type=float, help="Stop after so long; the same command goes on.")
@strict_option
@model_option
@engine_options("policy", "budget", "temperature", "top_p")
def compare(
    documents: tuple[str, ...],
    questions: tuple[str, ...],
    answers: tuple[str, ...],
    tasks: tuple[str, ...],
    policies: tuple[str, ...],
    contexts: tuple[int, ...],
    budgets: tuple[float, ...],
    samples: int,
    data: tuple[Path, ...],
    query: str,
    folder: Path | None,
    force: bool,
    minutes: float | None,
    strict: bool,
    settings: Settings,
) -> None:
    """Ask the same under several policies: questions about DOCUMENTS, or tasks.

    Tasks hide their facts in the text of DOCUMENTS, or without any in generated prose. Every
    answer token goes through the policy; exact attention runs first on every sample. A score's
    range is its 95 % bootstrap interval. agrees: share of the answer that equals exact attention's
    from the start on.
    """
    if answers and len(answers) != len(questions):
        raise click.UsageError(
            f"Give one --answer per question: {len(questions)} expected, {len(answers)} given."
        )
    if any(not text.strip() for text in (*questions, *answers)):
        raise click.UsageError("A question or an answer is empty.")
    for text in (*questions, *answers):
        check_unicode(text, "A question or an answer")
    if not policies:
        raise click.UsageError("--policies names no policy.")
    if bool(questions) == bool(tasks):
        raise click.UsageError("Give questions (-q) about DOCUMENTS, or --tasks: one of the two.")
    if questions and not documents:
        raise click.UsageError("Give the DOCUMENTS that the questions are about.")
    wanted = Wanted(
        documents, questions, answers, tasks, policies, contexts, budgets, samples, data, query,
        folder, force, minutes, strict,
    )  # fmt: skip
    with Output(settings.as_json) as output:
        if folder is not None:
            read = [*map(Path, documents), *data]
            places = folder / ROWS_NAME, folder / REPORT_NAME
            wanted = dataclasses.replace(wanted, force=agreed_comparison(*places, read, force))
        _compare(wanted, settings, output)


def _compare(wanted: Wanted, settings: Settings, output: Output) -> None:
    from nearfar.evaluation.harness.results import Results

    text = None
    if wanted.documents:
        text = loading.read_documents(wanted.documents, output, strict=wanted.strict)
    _check_names(wanted, output)
    prepared = loading.prepare_model(settings, output)
    plan, material = _plan(wanted, settings, prepared, text)
    path = None if wanted.output is None else wanted.output / ROWS_NAME
    with Results(path) as results:
        if len(results):
            output.note(f"{path} has {len(results):,} rows; going on from there.")
        finished = _run(plan, material, settings, prepared, results, wanted, output)
        rows = list(results)
    _show(rows, finished, wanted, output)


def _check_names(wanted: Wanted, output: Output) -> None:
    """Everything that can be wrong before a model is opened."""
    from nearfar.evaluation.tasks.registry import create_tasks

    loading.read_question_files(wanted.data, output, strict=wanted.strict)
    if wanted.policies != (ALL,):
        loading.check_policies(wanted.policies)
    create_tasks(wanted.tasks, wanted.data)
    if "qa" in wanted.tasks and not wanted.data:
        raise click.UsageError("The task qa needs a file of questions: --data FILE.")


def _plan(
    wanted: Wanted, settings: Settings, prepared: Prepared, text: str | None
) -> tuple[Plan, Material]:
    """What is to be done, checked as far as it can be without weights."""
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
    return plan, material


def _run(
    plan: Plan,
    material: Material,
    settings: Settings,
    prepared: Prepared,
    results: Results,
    wanted: Wanted,
    output: Output,
) -> bool:
    """Do what is lacking; False if the time was up before the end."""
    from nearfar.evaluation.harness.runner import Runner

    # no plan of memory here: what does not fit under one policy may fit under the next
    engine = loading.open_engine(settings, prepared, None, output)
    deadline = None if wanted.minutes is None else time.monotonic() + 60 * wanted.minutes
    with output.ticker() as tell:

        def on_row(row: Row, left: TimeLeft) -> None:
            text = _line(row)
            seconds = left.seconds
            if row.error is not None:
                output.note(f"{text}: {row.error}")
            tell(text if seconds is None else f"{text} · {format_seconds(seconds)} left")

        runner = Runner(engine, plan, material, results, on_row)
        return runner.run(lambda: deadline is not None and time.monotonic() > deadline)


def _line(row: Row) -> str:
    key = row.key
    length = f" {key.context_tokens:,}" if key.context_tokens else ""
    budget = "" if key.budget is None else f" {key.budget:g}"
    text = f"{key.task}{length} · {key.case}.{key.question} · {key.policy}{budget}"
    score = row.outcome.score if row.outcome is not None else None
    return text if score is None else f"{text} · {score:.4g}"


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

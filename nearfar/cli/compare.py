"""`nearfar compare`: accuracy, speed and bytes of policies on tasks."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click

from nearfar.cli.comparison import REPORT_NAME, ROWS_NAME, Wanted, run_comparison
from nearfar.cli.document_options import DocumentsAs, document_options, folder_name
from nearfar.cli.options import (
    Settings,
    engine_options,
    file_path,
    model_option,
    split_names,
    split_policies,
)
from nearfar.cli.output import Output
from nearfar.cli.outputs import agreed_comparison, force_option
from nearfar.config import Budget, parse_budget
from nearfar.errors import InvalidOptionError
from nearfar.runtime.text.unicode_text import check_unicode


def split_contexts(text: str) -> tuple[int, ...]:
    """Numbers of tokens separated by commas; ``32K`` is 32,768."""
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
    """Budgets separated by commas."""
    found = []
    for name in split_names(text):
        budget = parse_budget(name)
        if isinstance(budget, str):
            raise InvalidOptionError(f"A budget is a number, like 1024. Got {name!r}.")
        found.append(float(Budget(budget).value))
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
    help="ruler (13 tasks) or some of them, needles, recall, qa, perplexity, distances, "
    "throughput.",
)
@click.option(
    "--policies",
    type=split_policies,
    required=True,
    metavar="NAMES",
    help="Names separated by commas, or all; exact attention always runs.",
)
@click.option(
    "--contexts",
    type=split_contexts,
    default="4096",
    show_default=True,
    metavar="TOKENS",
    help="Prompt lengths of the tasks, like 8192,32K.",
)
@click.option(
    "--budgets",
    type=split_budgets,
    default="1024",
    show_default=True,
    metavar="KEYS",
    help="Far keys read per KV group and token; below 1, shares.",
)
@click.option("--samples", default=10, show_default=True, help="Questions of each task and length.")
@click.option(
    "--data",
    multiple=True,
    type=file_path,
    metavar="FILE",
    help="JSONL file of questions, for qa, qa_1 and qa_2.",
)
@click.option(
    "--query",
    type=click.Choice(["agnostic", "aware", "strict"]),
    default="agnostic",
    show_default=True,
    help="When a policy acts: before the question, after it, or on its tokens too.",
)
@click.option(
    "--output",
    "folder",
    type=folder_name,
    metavar="FOLDER",
    help="Folder for report.html and for results.jsonl, to which a later run adds missing rows.",
)
@force_option
@click.option("--minutes", type=float, help="Stop after this time; the same command continues.")
@document_options
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
    folder: str | None,
    force: bool,
    minutes: float | None,
    documents_as: DocumentsAs,
    settings: Settings,
) -> None:
    """Compare policies on the same questions about DOCUMENTS, or on tasks.

    Tasks hide their facts in the text of DOCUMENTS or, without DOCUMENTS, in generated prose. Every
    answer token goes through the policy; exact attention runs first on every sample. A score's
    range is its 95 % bootstrap interval. "agrees" is the share of the answer, from its start, that
    equals the answer under exact attention.
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
        None if folder is None else Path(folder), force, minutes, documents_as,
    )  # fmt: skip
    with Output(settings.as_json) as output:
        if wanted.output is not None:
            read = [*map(Path, documents), *data]
            places = wanted.output / ROWS_NAME, wanted.output / REPORT_NAME
            wanted = dataclasses.replace(wanted, force=agreed_comparison(*places, read, force))
        run_comparison(wanted, settings, output)

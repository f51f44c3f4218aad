"""`nearfar qa`: read documents once, answer questions about them."""

from __future__ import annotations

import dataclasses

import click

from nearfar.cli import loading
from nearfar.cli.answering import answer_all, check_questions
from nearfar.cli.document_options import DocumentsAs, cache_options, document_options
from nearfar.cli.options import (
    QuestionOptions,
    Settings,
    engine_options,
    model_option,
    question_options,
)
from nearfar.cli.output import Output
from nearfar.config import DEFAULT_CONFIG


@click.command()
@click.argument("documents", nargs=-1, required=True)
@question_options
@click.option(
    "--epsilon",
    type=float,
    help="At each step, read keys until the error of every head is below this: --policy verified.",
)
@click.option("--no-cache", is_flag=True, help="Neither use nor keep documents in the cache.")
@cache_options
@document_options
@model_option
@engine_options()
def qa(
    documents: tuple[str, ...],
    asked: QuestionOptions,
    epsilon: float | None,
    no_cache: bool,
    cache_dir: str | None,
    cache_limit: int,
    documents_as: DocumentsAs,
    settings: Settings,
) -> None:
    """Answer questions about DOCUMENTS: text, Markdown, HTML, PDF, or - for stdin.

    The documents are read once and kept, so later questions about the same documents start at once
    (see `nearfar cache`). Every question starts from the end of the documents. Without -q, a
    terminal prompts for questions.
    """
    if epsilon is not None:
        settings = _verified(settings, epsilon)
        click.echo(f"Note: --epsilon means --policy {settings.config.policy}.", err=True)
    check_questions(asked, settings.as_json, may_ask=loading.STDIN not in documents)
    with Output(settings.as_json) as output:
        text = loading.read_documents(documents, output, documents_as)
        cache = None if no_cache else loading.Cache(cache_dir, cache_limit)
        engine, document = loading.open_document(settings, text, asked.questions, output, cache)
        answer_all(engine, document, asked, settings, output)


def _verified(settings: Settings, epsilon: float) -> Settings:
    """``settings`` with the policy whose error is below ``epsilon``."""
    policy = settings.config.policy
    if policy == DEFAULT_CONFIG.policy:
        policy = "verified"
    elif policy.split(":")[0] != "verified":
        raise click.UsageError(
            f"--epsilon is the error bound of the policy verified, and --policy is {policy}. "
            "Leave one of them out."
        )
    config = settings.config.replace(policy=f"{policy}:epsilon={epsilon:g}")
    return dataclasses.replace(settings, config=config)

"""`nearfar ask`: answer questions about a saved document."""

from __future__ import annotations

from pathlib import Path

import click

from nearfar.cli import loading
from nearfar.cli.answering import answer_all, check_questions
from nearfar.cli.options import (
    QuestionOptions,
    Settings,
    engine_options,
    file_path,
    model_option,
    question_options,
)
from nearfar.cli.output import Output


@click.command()
@click.argument("file", type=file_path)
@question_options
@click.option(
    "--session",
    metavar="FILE",
    help="Let each question see the earlier ones, including those of earlier calls, kept in FILE.",
)
@model_option
@engine_options("sinks", "window", "far_dtype")
def ask(file: Path, asked: QuestionOptions, session: str | None, settings: Settings) -> None:
    """Answer questions about FILE, which `nearfar index` made, without reading it again.

    Every question starts from the end of the document, unless there is a --session. Without -q, a
    terminal prompts for questions.
    """
    check_questions(asked, settings.as_json)
    with Output(settings.as_json) as output:
        from nearfar.runtime.saved.opened import open_facts
        from nearfar.runtime.saved.replacing import open_session

        kept = None if session is None else open_session(session, [file])
        engine, document = loading.open_saved(settings, open_facts(file), output)
        answer_all(engine, document, asked, settings, output, kept)

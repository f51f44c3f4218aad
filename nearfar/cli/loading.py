"""From the arguments of a command to an engine that has read its documents.

What can fail cheaply fails first: documents, then names of policies, then the tokenizer and the
length, then the plan for memory, and only then are weights loaded.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from nearfar.cli.options import Settings
from nearfar.cli.output import Output
from nearfar.errors import ContextTooLongError

if TYPE_CHECKING:
    from nearfar.runtime.document import Document
    from nearfar.runtime.engine import Engine, Prepared

STDIN = "-"
QUESTION_TOKENS = 256  # room for a question that is not known yet


def read_documents(paths: Sequence[str]) -> str:
    """The text of files and of stdin (``-``), joined under their names."""
    from nearfar.runtime.text_files import document_text, join_documents, read_document

    if paths.count(STDIN) > 1:
        raise click.UsageError("stdin (-) can be read only once.")
    texts = []
    for path in paths:
        if path == STDIN:
            texts.append(("stdin", document_text(sys.stdin.buffer.read(), "stdin")))
        else:
            texts.append((path, read_document(path)))
    return join_documents(texts)


def check_policies(specs: Sequence[str]) -> None:
    """Raise for a policy or a parameter that does not exist."""
    from nearfar.policies.registry import create_policy

    for spec in specs:
        create_policy(spec)


def prepare_model(settings: Settings, output: Output) -> Prepared:
    """Configuration and tokenizer of the model, fetched if they are not here; no weights."""
    from nearfar.runtime.engine import prepare

    with output.progress(f"Preparing {settings.model}") as report:
        return prepare(settings.model, progress=report)


def context_tokens(
    prepared: Prepared, text: str, questions: Sequence[str], max_new_tokens: int
) -> int:
    """Tokens to plan memory for: document, longest question and answer, within the limit.

    Raises ContextTooLongError where the document leaves no room for a question and one token.
    """
    limit = prepared.config.max_context_tokens
    document = prepared.count_document_tokens(text)
    around = prepared.count_document_tokens("")  # words that any document is put into
    lengths = [prepared.count_document_tokens(text) - around for text in questions]
    question = max(lengths, default=QUESTION_TOKENS)
    if document + question >= limit:
        raise ContextTooLongError(
            f"The document has {document:,} tokens and the question needs {question:,}, but the "
            f"model reads at most {limit:,}. Shorten the document, split it, or choose a model "
            "with a longer context (--model)."
        )
    return min(limit, document + question + max_new_tokens)


def open_engine(
    settings: Settings, prepared: Prepared, tokens: int | None, output: Output
) -> Engine:
    """The engine, its memory planned for ``tokens`` before weights are loaded."""
    from nearfar.runtime.engine import Engine

    output.note(f"Loading {settings.model} ...")
    return Engine.from_prepared(prepared, settings.config, context_tokens=tokens)


def open_document(
    settings: Settings, text: str, questions: Sequence[str], output: Output
) -> tuple[Engine, Document]:
    """An engine that has read ``text`` and will be asked ``questions`` (or any, if empty)."""
    check_policies([settings.config.policy])
    prepared = prepare_model(settings, output)
    tokens = context_tokens(prepared, text, questions, settings.sampling.max_new_tokens)
    engine = open_engine(settings, prepared, tokens, output)
    with output.progress("Reading the document") as report:
        return engine, engine.read(text, progress=report)

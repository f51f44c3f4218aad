"""Makes an engine that has read its documents from the arguments of a command.

Cheap checks come first: documents, then names of policies, then the tokenizer and the length, then
the plan for memory. Only then are weights loaded.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import click
from click.core import ParameterSource

from nearfar.cli.document_options import DocumentsAs
from nearfar.cli.options import Settings
from nearfar.cli.output import Output
from nearfar.config import counted
from nearfar.errors import ContextTooLongError

if TYPE_CHECKING:
    from nearfar.runtime.engine.document import Document
    from nearfar.runtime.engine.engine import Engine
    from nearfar.runtime.engine.prepared import Prepared
    from nearfar.runtime.saved.facts import Facts
    from nearfar.runtime.saved.opened import OpenedDocument
    from nearfar.runtime.text.chat import DocumentPrompt
    from nearfar.runtime.text.text_origins import Text

STDIN = "-"
QUESTION_TOKENS = 256  # room for a later question


class Cache(NamedTuple):
    """The folder of kept documents."""

    folder: str | None
    limit_bytes: int


def read_documents(
    paths: Sequence[str],
    output: Output,
    documents_as: DocumentsAs,
    *,
    always_named: bool = False,
) -> Text:
    """The text of files and of stdin (``-``), joined under their names.

    A single text gets its name as a heading only if ``always_named``. Unreadable parts give a note
    or, if reading is strict, an error.
    """
    from nearfar.runtime.text.text_files import document_text, join_documents, read_document
    from nearfar.runtime.text.unicode_text import shown

    if paths.count(STDIN) > 1:
        raise click.UsageError("stdin (-) can be read only once.")
    texts, encoding = [], documents_as.encoding
    strict = documents_as.strict
    for path in paths:
        with output.document_notes(strict), output.progress(f"Opening {shown(path)}") as report:
            if path == STDIN:
                data = sys.stdin.buffer.read()
                text = document_text(data, "stdin", encoding=encoding, progress=report)
            else:
                text = read_document(path, encoding=encoding, progress=report)
        texts.append(("stdin" if path == STDIN else path, text))
    return join_documents(texts, always_named)


def read_question_files(paths: Sequence[Path], output: Output, *, strict: bool) -> None:
    """Read JSONL files of questions, and their books, before the tasks need them."""
    from nearfar.evaluation.question_files import read_questions

    with output.document_notes(strict):
        for path in paths:
            read_questions(path)


def check_policies(specs: Sequence[str]) -> None:
    """Raise for a policy or a parameter that does not exist."""
    from nearfar.policies.registry import create_policy

    for spec in specs:
        create_policy(spec)


def prepare_model(settings: Settings, output: Output) -> Prepared:
    """Configuration and tokenizer of the model, downloaded if missing; no weights."""
    from nearfar.runtime.engine.prepared import prepare

    with output.progress(f"Preparing {settings.model}") as report:
        prepared = prepare(settings.model, progress=report)
    thinking = settings.config.thinking
    return prepared if thinking is None else prepared.with_thinking(thinking)


def context_tokens(
    prompt: DocumentPrompt, limit: int, questions: Sequence[str], max_new_tokens: int
) -> int:
    """Tokens to plan memory for: document, longest question and answer, within the limit.

    Raises ContextTooLongError if the document leaves no room for a question.
    """
    document = len(prompt.prefix_ids)
    asked = [len(prompt.question_ids(question)) for question in questions]
    question = max(asked, default=QUESTION_TOKENS)
    if document + question > limit:
        raise ContextTooLongError(
            f"The document has {document:,} tokens and the question needs {question:,}, but the "
            f"model reads at most {limit:,}. Shorten the document, split it, or choose a model "
            "with a longer context (--model)."
        )
    return min(limit, document + question + max_new_tokens)


def note_threads(threads: int | None, output: Output) -> None:
    """Print a note if there are more threads than usable CPUs."""
    from nearfar.runtime.memory.hardware import usable_cpus

    cpus = len(usable_cpus())
    if threads is not None and threads > cpus:
        output.note(
            f"Note: --threads is {threads:,}, and this process may use "
            f"{counted(cpus, 'logical CPU')}: threads take turns."
        )


def open_engine(
    settings: Settings, prepared: Prepared, tokens: int | None, output: Output
) -> Engine:
    """The engine, its memory planned for ``tokens`` before weights are loaded."""
    from nearfar.runtime.engine.engine import Engine

    note_threads(settings.config.threads, output)
    output.note(f"Loading {settings.model} ...")
    return Engine.from_prepared(prepared, settings.config, context_tokens=tokens)


def open_document(
    settings: Settings,
    text: str,
    questions: Sequence[str],
    output: Output,
    kept: Cache | None = None,
) -> tuple[Engine, Document]:
    """An engine with the document ``text``, read now or cached, and room for ``questions``."""
    check_policies([settings.config.policy])
    prepared = prepare_model(settings, output)
    if kept is not None:
        from nearfar.runtime.engine.document_cache import DocumentCache, document_key

        cache = DocumentCache(kept.folder, kept.limit_bytes)
        key = document_key(prepared.model, prepared.tokenizer, text, settings.config)
        if cache.path(key).exists():
            # rows in a file need no memory
            engine = open_engine(settings, prepared, None, output)
            with output.progress("Making the index") as report:
                document = cache.open(engine, key, text, progress=report)
            if document is not None:
                return engine, document
    prompt, limit = prepared.document_prompt(text), prepared.config.max_context_tokens
    tokens = context_tokens(prompt, limit, questions, settings.sampling.max_new_tokens)
    engine = open_engine(settings, prepared, tokens, output)
    with output.progress("Reading the document") as report:
        document = engine.read(prompt, progress=report)
    if kept is not None:
        cache.add(document, key)
    return engine, document


@contextmanager
def open_if_saved(name: str) -> Iterator[OpenedDocument | None]:
    """The saved document of that name, open; None if the file is not one."""
    from nearfar.runtime.saved.container import is_container
    from nearfar.runtime.saved.opened import open_facts

    if not is_container(Path(name)):
        yield None
        return
    with open_facts(Path(name)) as opened:
        yield opened


def open_saved(
    settings: Settings, opened: OpenedDocument, output: Output
) -> tuple[Engine, Document]:
    """An engine for a saved document, and the document opened in it."""
    from nearfar.runtime.saved.opened import check_model

    with opened:
        settings = _as_saved(settings, opened.facts, opened.path)
        check_policies([settings.config.policy])
        prepared = prepare_model(settings, output)
        check_model(opened, prepared.model, prepared.tokenizer)
        engine = open_engine(settings, prepared, None, output)
        with output.progress("Making the index") as report:
            return engine, engine.open(opened, progress=report)


def _as_saved(settings: Settings, facts: Facts, path: Path) -> Settings:
    """``settings`` with the model and the policy of a document if none were named.

    A file may come from anywhere, so a model that it names is never downloaded.
    """
    from nearfar.runtime.checkpoints.builtin import BUILT_IN

    context = click.get_current_context()

    def named(option: str) -> bool:
        return context.get_parameter_source(option) is not ParameterSource.DEFAULT

    if not named("model") and facts.model != settings.model:
        if facts.model not in BUILT_IN and not Path(facts.model).expanduser().exists():
            raise click.UsageError(
                f"{path} was read by the model {facts.model!r}, which is not on this disk. Name "
                "it, or where it is now: --model MODEL."
            )
        settings = dataclasses.replace(settings, model=facts.model)
    if facts.kept is not None and not named("policy"):
        name, *values = (str(value) for value in facts.kept.policy.values())
        keys = list(facts.kept.policy)[1:]
        spec = ":".join([name, *(f"{k}={v}" for k, v in zip(keys, values, strict=True))])
        budget = settings.config.budget if named("budget") else facts.kept.budget
        config = settings.config.replace(policy=spec, budget=budget)
        settings = dataclasses.replace(settings, config=config)
    return settings

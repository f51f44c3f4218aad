"""`nearfar generate`: continue a prompt."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import click

from nearfar.cli import loading
from nearfar.cli.answering import note_thought
from nearfar.cli.document_options import DocumentsAs, document_options
from nearfar.cli.options import (
    Settings,
    engine_options,
    model_option,
)
from nearfar.cli.output import Output, format_seconds
from nearfar.config import counted
from nearfar.errors import ContextTooLongError
from nearfar.runtime.text.unicode_text import check_unicode

if TYPE_CHECKING:
    pass


@click.command()
@click.argument("prompt", required=False)
@click.option("--file", "file", help="Read the prompt from a file.")
@click.option("--chat", is_flag=True, help="Put the prompt into the model's chat template.")
@document_options
@model_option
@engine_options()
def generate(
    prompt: str | None, file: str | None, chat: bool, documents_as: DocumentsAs, settings: Settings
) -> None:
    """Continue PROMPT; - takes it from stdin."""
    if (prompt is None) == (file is None):
        raise click.UsageError("Give a prompt, or - for stdin, or --file, and only one of them.")
    with Output(settings.as_json) as output:
        text = _prompt_text(prompt, file, documents_as, output)
        loading.check_policies([settings.config.policy])
        prepared = loading.prepare_model(settings, output)
        ids, limit = prepared.prompt_ids(text, chat), prepared.config.max_context_tokens
        tokens = _context_tokens(len(ids), limit, settings.sampling.max_new_tokens)
        engine = loading.open_engine(settings, prepared, tokens, output)
        engine.on_thought = output.think
        stream = engine.stream(ids, settings.sampling, chat=chat)
        for piece in stream:
            output.write(piece)
        output.write("\n")
        note_thought(stream.result, output)
        result, memory = stream.result, engine.memory_report()
        values = dataclasses.asdict(result) | {"new_tokens": result.new_tokens}
        del values["token_ids"]
        output.record({"model": engine.model_name, "policy": engine.config.policy})
        output.record({**values, **dataclasses.asdict(memory)})
        output.note(
            f"{counted(result.prompt_tokens, 'prompt token')}, {result.new_tokens:,} new; first "
            f"after {format_seconds(result.seconds_to_first_token)}, then "
            f"{result.tokens_per_second:.1f} tokens/s"
        )


def _context_tokens(prompt: int, limit: int, max_new_tokens: int) -> int:
    """Tokens to plan memory for, within the model's limit."""
    if prompt > limit:
        raise ContextTooLongError(
            f"The prompt has {prompt:,} tokens, but the model reads at most {limit:,}. "
            "Shorten it, or choose a model with a longer context (--model)."
        )
    return min(limit, prompt + max_new_tokens)


def _prompt_text(
    prompt: str | None, file: str | None, documents_as: DocumentsAs, output: Output
) -> str:
    """The prompt, without the line end at the end of a file."""
    if prompt is not None and prompt != loading.STDIN:
        if not prompt.strip():
            raise click.UsageError("The prompt is empty.")
        check_unicode(prompt, "The prompt")
        return prompt
    paths = [loading.STDIN if file is None else file]
    return loading.read_documents(paths, output, documents_as).rstrip("\n")

"""`nearfar index`: read documents once and keep what was read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from nearfar.cli import loading
from nearfar.cli.options import Settings, engine_options, model_option
from nearfar.cli.output import Output, facts_table, format_seconds
from nearfar.config import format_bytes

if TYPE_CHECKING:
    from nearfar.runtime.document import Document
    from nearfar.runtime.engine import Engine

SUFFIX = ".nearfar"


@click.command()
@click.argument("documents", nargs=-1, required=True)
@click.option(
    "-o",
    "--output",
    "target",
    help="The file.  [default: beside the first document]",
    metavar="FILE",
)
@model_option
@engine_options("max_new_tokens", "temperature", "top_p")
def index(documents: tuple[str, ...], target: str | None, settings: Settings) -> None:
    """Read DOCUMENTS once, so that `nearfar ask` answers questions about them at once.

    If the first is a file that `nearfar index` made, the others are read behind it, and it gets an
    index for the policy if it has none.
    """
    with Output(settings.as_json) as output:
        path = _target(documents, target)
        engine, document = _read(documents, settings, output)
        document.save(path)
        _show(engine, document, path, output)


def _target(documents: tuple[str, ...], target: str | None) -> Path:
    """Where the document goes; what is there and is no saved document is not replaced."""
    from nearfar.runtime.saved.container import is_container

    if target is None and documents[0] == loading.STDIN:
        raise click.UsageError("Say where to keep what comes from stdin: -o FILE.")
    path = Path(documents[0]).with_suffix(SUFFIX) if target is None else Path(target)
    if path.is_dir():
        raise click.UsageError(f"{path} is a folder. Name a file: -o {path / 'book'}{SUFFIX}")
    if path.exists() and path.stat().st_size and not is_container(path):
        raise click.UsageError(
            f"{path} exists and is not a saved document. Name another file: -o FILE."
        )
    return path


def _read(
    documents: tuple[str, ...], settings: Settings, output: Output
) -> tuple[Engine, Document]:
    from nearfar.runtime.saved.container import is_container

    if not is_container(Path(documents[0])):
        return loading.open_document(settings, loading.read_documents(documents), (), output)
    texts = loading.read_documents(documents[1:], always_named=True) if documents[1:] else None
    engine, document = loading.open_saved(settings, Path(documents[0]), output)
    if texts is not None:
        with output.progress("Reading on") as report:
            document.extend(texts, progress=report)
    return engine, document


def _show(engine: Engine, document: Document, path: Path, output: Output) -> None:
    report = document.memory_report()
    file_bytes = path.stat().st_size
    values = {"far_bytes": report.far_bytes, "index_bytes": report.index_bytes}
    output.record({"file": str(path), "file_bytes": file_bytes, "model": engine.model_name})
    output.record({"policy": engine.config.policy, "context_tokens": document.tokens})
    output.record({"prefill_seconds": document.prefill_seconds, **values})
    facts = {
        "file": str(path),
        "tokens read": f"{document.tokens:,}",
        "prefill": format_seconds(document.prefill_seconds),
        "size": format_bytes(file_bytes),
        "far": format_bytes(report.far_bytes),
        "index": format_bytes(report.index_bytes),
    }
    output.show(facts_table(facts))

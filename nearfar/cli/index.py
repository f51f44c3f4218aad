"""`nearfar index`: read documents once and save their keys and values."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from nearfar.cli import loading
from nearfar.cli.document_options import DocumentsAs, document_options
from nearfar.cli.options import (
    Settings,
    engine_options,
    model_option,
)
from nearfar.cli.output import Output, facts_table, format_seconds
from nearfar.cli.outputs import agreed, force_option
from nearfar.config import format_bytes

if TYPE_CHECKING:
    from nearfar.output.place import Place
    from nearfar.runtime.engine.document import Document
    from nearfar.runtime.engine.engine import Engine
    from nearfar.runtime.saved.opened import OpenedDocument

SUFFIX = ".nearfar"


@click.command()
@click.argument("documents", nargs=-1, required=True)
@click.option(
    "-o",
    "--output",
    "target",
    help="The file to write.  [default: beside the first document]",
    metavar="FILE",
)
@force_option
@document_options
@model_option
@engine_options("max_new_tokens", "temperature", "top_p")
def index(
    documents: tuple[str, ...],
    target: str | None,
    force: bool,
    documents_as: DocumentsAs,
    settings: Settings,
) -> None:
    """Read DOCUMENTS once and save them for `nearfar ask`, which does not read them again.

    If the first is a file that `nearfar index` made, the others are appended to it, and it gets an
    index for the policy if it has none. A FILE that was made from other documents, or is not a
    saved document, is replaced only with --force, or after confirmation on a terminal.
    """
    with Output(settings.as_json) as output:
        with loading.open_if_saved(documents[0]) as saved:
            place, made_from = _target(documents, target, force, goes_on=saved is not None)
            engine, document = _read(documents, saved, documents_as, settings, output)
        # the old file may be replaced; a file written since is checked again
        document.save(place.named, overwrite=place.before is not None, made_from=made_from)
        _show(engine, document, place, output)


def _target(
    documents: tuple[str, ...], target: str | None, force: bool, *, goes_on: bool
) -> tuple[Place, str]:
    """The place of the document, and the identity of its inputs; checked before the work."""
    from nearfar.output.place import find_place
    from nearfar.runtime.saved.replacing import check_document, inputs_digest, was_made_from

    if target is None and documents[0] == loading.STDIN:
        raise click.UsageError("Say where to keep what comes from stdin: -o FILE.")
    if target is None and not Path(documents[0]).name:
        raise click.UsageError(f"{documents[0]!r} is not a file name. Name documents.")
    name = str(Path(documents[0]).with_suffix(SUFFIX)) if target is None else target
    if name and os.path.isdir(name):
        raise click.UsageError(
            f"{name} is a folder. Name a file: -o {Path(name, 'book').with_suffix(SUFFIX)}"
        )
    first = documents[0]
    digest = "" if loading.STDIN in documents else inputs_digest(documents)

    def is_own(path: Path) -> bool:
        if goes_on and path.samefile(first):
            return True
        return bool(digest) and was_made_from(path, digest)

    def check(overwrite: bool) -> Place:
        place = find_place(name)
        read = [path for path in documents if path != loading.STDIN]
        if goes_on and place.before is not None and place.path.samefile(first):
            read = read[1:]
        check_document(place, is_own, overwrite=overwrite, read=read)
        return place

    # a new index does not change which documents a file was made from
    return agreed(check, force)[0], "" if goes_on and len(documents) == 1 else digest


def _read(
    documents: tuple[str, ...],
    saved: OpenedDocument | None,
    documents_as: DocumentsAs,
    settings: Settings,
    output: Output,
) -> tuple[Engine, Document]:
    if saved is None:
        text = loading.read_documents(documents, output, documents_as)
        return loading.open_document(settings, text, (), output)
    added = documents[1:]
    texts = None
    if added:
        texts = loading.read_documents(added, output, documents_as, always_named=True)
    engine, document = loading.open_saved(settings, saved, output)
    if texts is not None:
        with output.progress("Reading on") as report:
            document.extend(texts, progress=report)
    return engine, document


def _show(engine: Engine, document: Document, place: Place, output: Output) -> None:
    report = document.memory_report()
    path, file_bytes = place.named, place.path.stat().st_size
    values = {"far_bytes": report.far_bytes, "index_bytes": report.index_bytes}
    output.record({"file": path, "file_bytes": file_bytes, "model": engine.model_name})
    output.record({"policy": engine.config.policy, "context_tokens": document.tokens})
    output.record({"prefill_seconds": document.prefill_seconds, **values})
    facts = {
        "file": path,
        "tokens read": f"{document.tokens:,}",
        "prefill": format_seconds(document.prefill_seconds),
        "size": format_bytes(file_bytes),
        "far": format_bytes(report.far_bytes),
        "index": format_bytes(report.index_bytes),
    }
    output.show(facts_table(facts))

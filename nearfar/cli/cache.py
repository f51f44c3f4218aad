"""`nearfar cache`: the documents that `nearfar qa` has read and kept."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.table import Table

from nearfar.cli.document_options import cache_options
from nearfar.cli.options import debug_option, json_option
from nearfar.cli.output import Output, facts_table, format_seconds
from nearfar.cli.outputs import may_ask
from nearfar.config import counted, format_bytes
from nearfar.errors import DamagedDocumentError, SavedDocumentError

if TYPE_CHECKING:
    from nearfar.runtime.engine.document_cache import CachedDocument, DocumentCache

NAMED = ("show", "verify")  # actions that take names


@click.command()
@click.argument(
    "action", type=click.Choice(["list", "show", "verify", "prune", "clear"]), default="list"
)
@click.argument("names", nargs=-1)
@cache_options
@click.option("-y", "--yes", is_flag=True, help="Clear without asking first on a terminal.")
@json_option
@debug_option
def cache(
    action: str,
    names: tuple[str, ...],
    cache_dir: str | None,
    cache_limit: int,
    yes: bool,
    as_json: bool,
) -> None:
    """Manage the documents that `nearfar qa` keeps.

    list: list them (the default). show: show the contents of one. verify: check every byte of all,
    or of NAMES. prune: remove documents down to --cache-limit. clear: remove all. NAMES come from
    list, or are files that `nearfar index` made.
    """
    from nearfar.runtime.engine.document_cache import DocumentCache

    if names and action not in NAMED:
        raise click.UsageError(f"{action} takes no names.")
    if not names and action == "show":
        raise click.UsageError("Say which document to show: nearfar cache show NAME.")
    kept = DocumentCache(cache_dir, cache_limit)
    with Output(as_json) as output:
        output.record({"folder": str(kept.folder)})
        if action == "list":
            _list(kept, output)
        elif action == "show":
            _show([kept.find(name) for name in names], output)
        elif action == "verify":
            _verify(kept, names, output)
        elif action == "clear" and not _may_clear(kept, yes):
            output.record({"removed": []})
            output.write("Nothing is removed.\n")
        else:
            removed = kept.prune() if action == "prune" else kept.clear()
            output.record({"removed": [path.name for path in removed]})
            output.write(f"{counted(len(removed), 'document')} removed from {kept.folder}\n")


def _may_clear(kept: DocumentCache, yes: bool) -> bool:
    """Whether all may be removed: a terminal asks the user; a script needs no answer."""
    if yes or not may_ask():
        return True
    documents = counted(len(kept.entries()), "document")
    return click.confirm(f"Remove {documents} from {kept.folder}?", err=True)


def _list(kept: DocumentCache, output: Output) -> None:
    entries = kept.entries()
    total = sum(entry.file_bytes for entry in entries)
    output.record({"documents": [_as_record(entry) for entry in entries], "bytes": total})
    table = Table("name", "tokens", "size", "last used", "model", "holds", box=None, pad_edge=False)
    for entry in entries:
        used = datetime.datetime.fromtimestamp(entry.used_at).isoformat(" ", "minutes")
        row = [entry.name, "?", format_bytes(entry.file_bytes), used, "?", entry.problem]
        if entry.facts is not None:
            holds = _holds(_as_record(entry))
            row[1], row[4], row[5] = f"{entry.facts.tokens:,}", entry.facts.model, holds
        table.add_row(*row)
    if entries:
        output.show(table)
    output.write(f"{counted(len(entries), 'document')}, {format_bytes(total)} in {kept.folder}\n")


def _as_record(entry: CachedDocument) -> dict[str, Any]:
    record = {
        "name": entry.name,
        "file": str(entry.path),
        "file_bytes": entry.file_bytes,
        "used_at": entry.used_at,
    }
    if entry.facts is None:
        return {**record, "problem": entry.problem}
    facts = entry.facts.as_json()
    shown = ("model", "tokens", "read_seconds", "row_format", "kept", "indexes")
    return {**record, **{name: facts[name] for name in shown}}


def _holds(record: dict[str, Any]) -> str:
    if record["kept"] is not None:
        return f"what {record['kept']['policy']['name']} kept"
    names = [str(form["index"]) for form in record["indexes"]]
    return "all keys" + (f", index of {', '.join(names)}" if names else "")


def _show(paths: Sequence[Path], output: Output) -> None:
    from nearfar.runtime.saved.opened import open_facts, source_names

    shown = []
    for path in paths:
        with open_facts(path) as opened:
            facts = opened.facts
            record = {"file": str(path), "file_bytes": path.stat().st_size, **facts.as_json()}
            record["sources"] = source_names(opened.container)
        shown.append(record)
        table = {
            "file": str(path),
            "documents": ", ".join(record["sources"]),
            "tokens": f"{facts.tokens:,}",
            "read in": format_seconds(facts.read_seconds),
            "model": f"{facts.model} ({facts.model_identity[:12]})",
            "holds": _holds(record),
            "rows": f"{facts.row_format}, near {facts.near_dtype}",
            "sinks, window": f"{facts.sinks}, {facts.window}",
            "size": format_bytes(record["file_bytes"]),
        }
        output.show(facts_table(table))
    output.record({"documents": shown})


def _verify(kept: DocumentCache, names: Sequence[str], output: Output) -> None:
    """Check every byte; the command fails if anything is wrong."""
    from nearfar.runtime.saved.container import open_container

    paths = [kept.find(name) for name in names] or [entry.path for entry in kept.entries()]
    problems = {}
    for path in paths:
        try:
            with (
                closing(open_container(path)) as container,
                output.progress(f"Verifying {path.name}") as report,
            ):
                container.check(progress=report)
        except SavedDocumentError as error:
            problems[str(path)] = str(error)
    output.record({"verified": [str(path) for path in paths], "problems": problems})
    if problems:
        raise DamagedDocumentError("\n".join(problems.values()))
    files = "1 file is as it was" if len(paths) == 1 else f"{len(paths):,} files are as they were"
    output.write(f"{files} written.\n")

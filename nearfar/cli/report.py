"""`nearfar report`: pages from result files, and the memory of a context by parts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.table import Table

from nearfar.cli import loading
from nearfar.cli.options import (
    ALL,
    Settings,
    debug_option,
    engine_options,
    file_path,
    json_option,
    model_option,
    split_policies,
)
from nearfar.cli.output import Output
from nearfar.cli.outputs import agreed, force_option
from nearfar.config import counted, format_bytes
from nearfar.errors import InvalidOptionError, NearfarError, OutOfMemoryError

if TYPE_CHECKING:
    from nearfar.evaluation.memory import Inventory, Part

PAGE = "page"


class ReportCommands(click.Group):
    """Uses `page` if no other command is named."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command at the beginning of ``args``, or `page` with all of ``args``."""
        known = args[0] in self.commands
        return super().resolve_command(ctx, args if known else [PAGE, *args])


@click.group(cls=ReportCommands, context_settings={"ignore_unknown_options": True})
def report() -> None:
    """Write a page from result files, or show the memory of a context by parts.

    nearfar report RESULTS... is short for nearfar report page RESULTS...
    """


@report.command(PAGE)
@click.argument("results", nargs=-1, required=True, type=file_path)
@click.option(
    "--output",
    default="report.html",
    show_default=True,
    metavar="FILE",
    help="The page to write; a FIFO or a device works too.",
)
@force_option
@json_option
@debug_option
def page(results: tuple[Path, ...], output: str, force: bool, as_json: bool) -> None:
    """Write one page from RESULTS, files that `nearfar compare --output` wrote.

    If several files contain a row, the last file counts. A FILE that is not such a page is replaced
    only with --force, or after confirmation on a terminal.
    """
    from nearfar.evaluation.harness.results import read_rows
    from nearfar.evaluation.report.page import page_place, write_report

    with Output(as_json) as out:
        rows = read_rows(results)
        _, force = agreed(lambda yes: page_place(output, overwrite=yes, read=results), force)
        if not rows:
            raise NearfarError(f"{results[0]} has no results. Run nearfar compare --output first.")
        write_report(rows, output, overwrite=force)
        out.record({"path": output, "rows": len(rows)})
        out.note(f"Wrote {output} from {counted(len(rows), 'row')}.")


@report.command()
@click.option(
    "--policies",
    type=split_policies,
    default="all",
    show_default=True,
    metavar="NAMES",
    help="Names separated by commas.",
)
@click.option("--context", default=4096, show_default=True, help="Tokens of the context.")
@model_option
@engine_options("policy", "thinking", "max_new_tokens", "temperature", "top_p")
def memory(policies: tuple[str, ...], context: int, settings: Settings) -> None:
    """Show the parts of a context's near and far memory beside their predicted sizes.

    The context has random keys and values and is not prefilled.
    """
    if context < 1:
        raise click.UsageError("--context must be 1 or more.")
    with Output(settings.as_json) as output:
        from nearfar.evaluation.memory import inventory
        from nearfar.policies.registry import usable_names

        names = usable_names() if policies == (ALL,) else list(policies)
        loading.check_policies(names)
        prepared = loading.prepare_model(settings, output)
        engine = loading.open_engine(settings, prepared, None, output)
        found = []
        for name in names:
            try:
                found.append(inventory(engine.with_policy(name), context))
            except (InvalidOptionError, OutOfMemoryError) as error:  # not trained for this model
                output.note(f"{name}: {error}")
        if not found:
            raise NearfarError("No policy's context fits. Give a smaller --context.")
        output.record({"model": engine.model_name, "context_tokens": context})
        output.record({"policies": [_record(each) for each in found]})
        output.show(_table(found, context))


def _record(inventory: Inventory) -> dict[str, object]:
    return {
        "policy": inventory.policy,
        "parts": [dataclasses.asdict(part) for part in inventory.parts],
        "predicted_bytes": inventory.total.predicted_bytes,
        "held_bytes": inventory.total.held_bytes,
    }


def _table(inventories: Sequence[Inventory], context: int) -> Table:
    table = Table(
        title=f"Bytes of a context of {context:,} tokens", title_justify="left", pad_edge=False
    )
    for column in ("policy", "tier", "what", "held", "predicted", "off by"):
        text = column in ("policy", "tier", "what")
        table.add_column(column, justify="left" if text else "right", no_wrap=text)
    for each in inventories:
        for number, part in enumerate(each.parts):
            table.add_row(each.policy if number == 0 else "", part.tier, part.name, *_bytes(part))
        table.add_row("", "", "all", *_bytes(each.total), end_section=True)
    return table


def _bytes(part: Part) -> tuple[str, str, str]:
    return format_bytes(part.held_bytes), format_bytes(part.predicted_bytes), f"{part.error:.1%}"

"""`nearfar report`: pages from result files."""

from __future__ import annotations

from pathlib import Path

import click

from nearfar.cli.options import debug_option
from nearfar.cli.output import Output


@click.command()
@click.argument(
    "results", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True, dir_okay=False)
)
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    default="report.html",
    show_default=True,
    help="The page.",
)
@debug_option
def report(results: tuple[Path, ...], output: Path) -> None:
    """Write one page from RESULTS, files that `nearfar compare --output` wrote.

    Rows that are in several files are taken from the last one.
    """
    from nearfar.evaluation.harness.results import read_rows
    from nearfar.evaluation.report.page import write_report

    with Output(False) as out:
        rows = read_rows(results)
        write_report(rows, output)
        out.note(f"Wrote {output} from {len(rows):,} rows.")

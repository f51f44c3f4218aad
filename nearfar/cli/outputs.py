"""Names of output files: checked before the work, and confirmed on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from nearfar.errors import OutputExistsError, OutputNameError
from nearfar.output.place import Place


def force_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --force."""
    return click.option(
        "-f", "--force", is_flag=True, help="Replace existing files, whatever they are."
    )(command)


def may_ask() -> bool:
    """Whether a user can see a question and answer it."""
    return sys.stdin.isatty() and sys.stderr.isatty()


def agreed(check: Callable[[bool], Place], force: bool) -> tuple[Place, bool]:
    """The place of the output, and whether the user agrees to replace the file there.

    ``check`` finds the place, given whether to replace. Raises OutputNameError.
    """
    try:
        return check(force), force
    except OutputExistsError as error:
        if not may_ask() or not click.confirm(f"{error.state} Replace it?", err=True):
            advice = "Name another file, or replace it: --force."
            raise OutputNameError(f"{error.state} {advice}") from error
    return check(True), True


def agreed_comparison(rows: Path, page: Path, read: list[Path], force: bool) -> bool:
    """Like `agreed`, for a comparison's folder: whether the page may be replaced."""
    from nearfar.evaluation.harness.results import check_results
    from nearfar.evaluation.report.page import page_place
    from nearfar.output.place import check_new_folder

    check_new_folder(rows.parent)
    if not rows.parent.exists():
        return force
    check_results(rows)
    return agreed(lambda yes: page_place(page, overwrite=yes, read=read), force)[1]

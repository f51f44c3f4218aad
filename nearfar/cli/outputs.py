"""Names of files that commands write: checked before the work, and asked about on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import click

from nearfar.errors import OutputExistsError
from nearfar.output.place import Place


def force_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --force."""
    return click.option(
        "-f", "--force", is_flag=True, help="Replace files that are there, whatever they are."
    )(command)


def may_ask() -> bool:
    """Whether someone sees a question and can answer it."""
    return sys.stdin.isatty() and sys.stderr.isatty()


def agreed(check: Callable[[bool], Place], force: bool) -> tuple[Place, bool]:
    """Where the output goes, and whether someone wants what is there to be replaced.

    ``check`` finds the place, with what it is told about replacing. Raises OutputNameError.
    """
    try:
        return check(force), force
    except OutputExistsError as error:
        if not may_ask() or not click.confirm(f"{error.state} Replace it?", err=True):
            raise
    return check(True), True

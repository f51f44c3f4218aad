"""Output of a command: its result on stdout, everything else on stderr.

With --json the result is one object, printed at the end of the command, and nothing else reaches
stdout: output of libraries goes to stderr.
"""

from __future__ import annotations

import io
import json
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any, TextIO

import click
from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from nearfar.errors import DocumentError, DocumentWarning
from nearfar.runtime.text.unicode_text import without_surrogates

PIPE_WIDTH = 140  # columns of a table without a terminal
SECONDS_BETWEEN_LINES = 10  # of progress without a terminal
Report = Callable[[int, int], None]  # (done, total) in one unit of work; total 0: unknown


class Output:
    """One command's stdout and stderr; used as a context manager around its work."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json
        self._record: dict[str, Any] = {}
        self._thinking = False
        self._document_notes: list[str] = []
        self._stdout: TextIO = sys.stdout

    def __enter__(self) -> Output:
        self._stdout = sys.stdout
        if self.as_json:
            sys.stdout = sys.stderr
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        sys.stdout = self._stdout
        if self.as_json and error is None:
            click.echo(json.dumps(_writable(self._record), indent=2, allow_nan=False))

    def write(self, text: str) -> None:
        """Text for a reader, shown at once and unchanged; nothing with --json."""
        if not self.as_json:
            click.echo(f"\n{text}" if self._thinking else text, nl=False)
            self._thinking = False

    def think(self, text: str) -> None:
        """A piece of a model's thought, above its answer and paler; nothing with --json."""
        if not self.as_json:
            click.echo(
                click.style(text if self._thinking else f"Thought: {text}", dim=True), nl=False
            )
            self._thinking = True

    def show(self, renderable: RenderableType) -> None:
        """A table for a reader; nothing with --json."""
        if self.as_json:
            return
        if sys.stdout.isatty():
            Console(highlight=False).print(renderable)
            return
        text = io.StringIO()
        Console(file=text, highlight=False, width=PIPE_WIDTH).print(renderable)
        self.write("".join(f"{line.rstrip()}\n" for line in text.getvalue().splitlines()))

    def note(self, text: str) -> None:
        """A line about the run, on stderr, for every form of the result."""
        click.echo(text, err=True)

    def record(self, values: Mapping[str, Any]) -> None:
        """Keys and values of the JSON object."""
        self._record |= values

    @contextmanager
    def progress(self, label: str) -> Iterator[Report]:
        """A progress bar on stderr, if that is a terminal."""
        console = Console(stderr=True)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeRemainingColumn(),
        )
        hidden = not console.is_terminal
        with Progress(*columns, console=console, transient=True, disable=hidden) as bar:
            task = bar.add_task(label, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total or None)

    @contextmanager
    def document_notes(self, strict: bool) -> Iterator[None]:
        """Note parts of documents that could not be read; if ``strict``, raise DocumentError.

        With --json the notes are in the object too.
        """
        notes: list[str] = []
        with warnings.catch_warnings():
            show = warnings.showwarning

            def note(
                message: Warning | str, category: type[Warning], *where: Any, **more: Any
            ) -> None:
                if issubclass(category, DocumentWarning):
                    notes.append(str(message))
                else:
                    show(message, category, *where, **more)

            warnings.simplefilter("always", DocumentWarning)
            warnings.showwarning = note
            yield
        if notes and strict:
            raise DocumentError(f"{' '.join(notes)} This is refused because of --strict.")
        for each in notes:
            self.note(f"Note: {each}")
        if notes:
            self._document_notes += notes
            self.record({"document_notes": self._document_notes})

    @contextmanager
    def ticker(self) -> Iterator[Callable[[str], None]]:
        """A line of progress on stderr; without a terminal, one line every few seconds."""
        console = Console(stderr=True)
        if console.is_terminal:
            with console.status("") as status:
                yield lambda text: status.update(text)
            return
        last = -math.inf

        def tell(text: str) -> None:
            nonlocal last
            if time.monotonic() - last >= SECONDS_BETWEEN_LINES:
                last = time.monotonic()
                self.note(text)

        yield tell


def _writable(value: Any) -> Any:
    """``value`` with null for numbers, and U+FFFD for characters, that JSON cannot represent."""
    if isinstance(value, str):
        return without_surrogates(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _writable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_writable(item) for item in value]
    return value


def facts_table(facts: Mapping[str, str], title: str | None = None) -> Table:
    """A table of names and values without a frame."""
    table = Table(title=title, title_justify="left", show_header=False, box=None, pad_edge=False)
    for name, value in facts.items():
        table.add_row(name, without_surrogates(value))
    return table


def format_seconds(seconds: float) -> str:
    """A duration for people: ``850 ms``, ``12.3 s``, ``4 min 05 s``."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"

"""Contenders measured in turns, each in a process of its own.

A separate process gives each contender the memory that it would have alone: caps hold, peaks are
its own. In turns (A, B, C, A, B, C, ...) drift of the machine affects all equally. A contender that
fails reports why, and the others go on.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

from nearfar.errors import NearfarError
from nearfar.evaluation.contenders import Contender, Task, open_contender
from nearfar.runtime.steps.timeline import Timeline

ROUNDS = 8
TURN_SECONDS = 0.25  # the longest turn; its share of the steps may end it sooner
START_SECONDS = 600.0
ANSWER_SECONDS = 1800.0  # for one turn, or for the final report


@dataclass
class ContenderResult:
    """The result of one contender."""

    name: str
    seconds: list[float] = field(default_factory=list)  # of each work
    memory: dict[str, int] = field(default_factory=dict)
    far_bytes_read_per_step: float | None = None
    timeline: Timeline | None = None
    error: str | None = None


class LocalContender:
    """A contender in this process."""

    def __init__(self, contender: Contender) -> None:
        self._contender = contender

    def turn(self, steps: int, seconds: float) -> list[float]:
        """Seconds of each work: ``steps`` of them, fewer once ``seconds`` are over."""
        samples: list[float] = []
        started = time.perf_counter()
        while len(samples) < steps and (not samples or time.perf_counter() - started < seconds):
            self._contender.clear()
            before = time.perf_counter()
            self._contender.work()
            samples.append(time.perf_counter() - before)
        return samples

    def finish(self, entry: ContenderResult) -> None:
        """Record the final figures."""
        entry.memory = self._contender.memory()
        read = self._contender.far_bytes_read()
        if read is not None and entry.seconds:
            entry.far_bytes_read_per_step = read / len(entry.seconds)
        entry.timeline = self._contender.trace()


class RemoteContender:
    """A contender in a process of its own."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def ready(self) -> None:
        """Wait until it can work; raises NearfarError with the reason if it cannot."""
        if not self._connection.poll(START_SECONDS):
            raise NearfarError(f"It was not ready after {START_SECONDS:.0f} s.")
        _received(self._connection)

    def turn(self, steps: int, seconds: float) -> list[float]:
        """As `LocalContender.turn`."""
        found: list[float] = self._ask("turn", steps, seconds)
        return found

    def finish(self, entry: ContenderResult) -> None:
        """As `LocalContender.finish`."""
        other: ContenderResult = self._ask("finish", entry)
        entry.memory, entry.timeline = other.memory, other.timeline
        entry.far_bytes_read_per_step = other.far_bytes_read_per_step

    def _ask(self, *request: Any) -> Any:
        self._connection.send(request)
        if not self._connection.poll(ANSWER_SECONDS):
            raise NearfarError(f"It did not answer in {ANSWER_SECONDS:.0f} s.")
        return _received(self._connection)


def _received(connection: Connection) -> Any:
    try:
        kind, value = connection.recv()
    except EOFError:
        raise NearfarError(
            "The process of this contender ended. Look for what killed it: often it is memory."
        ) from None
    if kind == "failed":
        raise NearfarError(value)
    return value


def _serve(connection: Connection, task: Task, name: str) -> None:
    """The life of a contender's process."""
    try:
        local = LocalContender(open_contender(task, name))
        connection.send(("ready", None))
        while True:
            request, *arguments = connection.recv()
            if request == "turn":
                connection.send(("turn", local.turn(*arguments)))
            elif request == "finish":
                local.finish(*arguments)
                connection.send(("finish", arguments[0]))
    except (EOFError, KeyboardInterrupt):
        return
    except NearfarError as error:
        connection.send(("failed", str(error)))
    except Exception as error:
        connection.send(("failed", f"{type(error).__name__}: {error}"))


@contextmanager
def started(task: Task, name: str) -> Iterator[RemoteContender]:
    """A contender in a process that gets ready; call `RemoteContender.ready` before a turn."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, task, name), daemon=True)
    process.start()
    theirs.close()
    try:
        yield RemoteContender(ours)
    finally:
        ours.close()
        process.join(timeout=10)
        if process.is_alive():
            process.terminate()


def take_turns(
    contenders: Sequence[tuple[ContenderResult, LocalContender | RemoteContender]],
    steps: int,
    on_round: Callable[[int, int], None] = lambda *_: None,
) -> None:
    """Measure ``steps`` works of each, in turns; slow ones do fewer. Entries are filled."""
    rounds = min(ROUNDS, steps)
    for number in range(rounds):
        share = steps * (number + 1) // rounds - steps * number // rounds
        for entry, contender in contenders:
            if entry.error is None:
                with _noted(entry):
                    entry.seconds += contender.turn(share, TURN_SECONDS)
        on_round(number + 1, rounds)
    for entry, contender in contenders:
        if entry.error is None:
            with _noted(entry):
                contender.finish(entry)


@contextmanager
def _noted(entry: ContenderResult) -> Iterator[None]:
    try:
        yield
    except NearfarError as error:
        entry.error = str(error)

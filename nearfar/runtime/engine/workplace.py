"""Turns: a process runs one computation at a time, with the threads of its engine.

Numba's and torch's threads belong to the process, and some threading layers allow only one caller
at a time. A GPU captures a graph only while no other code allocates its memory. So engines take
turns, even if different threads call them. Each sets the numbers of threads for its turn and
restores them afterwards. A forked process has none of the threads that its parent started and would
wait for them for ever, so it refuses to compute.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

import numba
import torch

from nearfar.cpu_kernels.compile import set_threads
from nearfar.errors import ForkedProcessError

P = ParamSpec("P")
T = TypeVar("T")


class Workplace:
    """The turns of one process, and whether it may compute at all."""

    def __init__(self) -> None:
        self.turn = threading.RLock()
        self.used = False
        self.lost_threads = False

    def forked(self) -> None:
        """Note that the process is a new child, without the threads of its parent."""
        self.lost_threads = self.used

    def begin(self) -> None:
        """Raise ForkedProcessError if work would wait for threads that do not exist."""
        if self.lost_threads:
            raise ForkedProcessError(
                'This process was forked (os.fork, multiprocessing\'s "fork", workers of a torch '
                "DataLoader) after nearfar had computed in its parent, whose threads are not here. "
                'Start processes by multiprocessing.get_context("spawn") and make the engine in '
                "each, or fork before the first engine is made."
            )
        self.used = True


WORKPLACE = Workplace()
os.register_at_fork(after_in_child=WORKPLACE.forked)


class Hands:
    """The host threads of one engine."""

    def __init__(self, threads: int) -> None:
        self.threads = threads

    def run(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Do ``work`` in a turn, with this engine's number of torch and Numba threads.

        A thread may take a turn within its own turn.
        """
        WORKPLACE.begin()
        with WORKPLACE.turn:
            before = torch.get_num_threads(), numba.get_num_threads()
            try:
                _set_threads(self.threads, self.threads)
                return work(*args, **kwargs)
            finally:
                _set_threads(*before)


def _set_threads(for_torch: int, for_numba: int) -> None:
    if torch.get_num_threads() != for_torch:
        torch.set_num_threads(for_torch)
    set_threads(for_numba)


class HasHands(Protocol):
    """An object that works with an engine's threads."""

    @property
    def hands(self) -> Hands:
        """The threads of its engine."""


W = TypeVar("W", bound=HasHands)


def in_turn(method: Callable[Concatenate[W, P], T]) -> Callable[Concatenate[W, P], T]:
    """A method that waits for its turn in this process and is then completed in one turn."""

    @functools.wraps(method)
    def waiting(self: W, /, *args: P.args, **kwargs: P.kwargs) -> T:
        work: Any = method
        done: T = self.hands.run(work, self, *args, **kwargs)
        return done

    return waiting

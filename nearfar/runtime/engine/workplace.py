"""Where this process computes: one piece of work at a time, with the threads of its engine.

Numba's and torch's threads belong to the process, and not every kind of them can be given work from
two sides at once; a GPU captures a graph only while nobody else asks it for memory. So engines take
turns, whatever thread they are called from, and each sets the number of threads while it works and
puts back what was set. A process that was forked has none of the threads that its parent had
started, and would wait for them for ever: there, work is refused.
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
    """The turn of one process, and whether the process can work at all."""

    def __init__(self) -> None:
        self.turn = threading.RLock()
        self.used = False
        self.lost_threads = False

    def forked(self) -> None:
        """Note that the process is a new child: what computed in its parent has no threads here."""
        self.lost_threads = self.used

    def begin(self) -> None:
        """Raise ForkedProcessError where work would wait for threads that are not there."""
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
        """Do ``work`` in this process's turn, with so many threads of torch and Numba.

        A turn may be taken within a turn of the same thread.
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
    """Whatever works with an engine's threads."""

    @property
    def hands(self) -> Hands:
        """Of its engine."""


W = TypeVar("W", bound=HasHands)


def in_turn(method: Callable[Concatenate[W, P], T]) -> Callable[Concatenate[W, P], T]:
    """A method that waits until no other work is done in this process, and then is done whole."""

    @functools.wraps(method)
    def waiting(self: W, /, *args: P.args, **kwargs: P.kwargs) -> T:
        work: Any = method
        done: T = self.hands.run(work, self, *args, **kwargs)
        return done

    return waiting

"""Raises an error at the n-th line that Python runs inside a piece of work, as Ctrl-C does."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

ROOM = "/nearfar/"  # lines of this package alone are counted


class Interruption(BaseException):
    """Like KeyboardInterrupt, and nobody else's."""


def interrupted(work: Callable[[], object], at_line: int) -> bool:
    """Do ``work``, and raise an Interruption before its line number ``at_line``.

    False if it was done before so many lines.
    """
    left = at_line

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal left
        if ROOM not in frame.f_code.co_filename:
            return trace if event == "call" else None
        if event == "line":
            left -= 1
            if left == 0:
                raise Interruption
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    except Interruption:
        return True
    finally:
        sys.settrace(before)
    return False


def every_so_often(work: Callable[[], object], stride: int, first: int = 1) -> Iterator[int]:
    """Interrupt ``work`` at one line after another until it is done; yields after each of them."""
    at_line = first
    while interrupted(work, at_line):
        yield at_line
        at_line += stride

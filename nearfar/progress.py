"""Callbacks by which long work reports its progress.

The runtime calls them, the command line draws. A callback that raises stops the work.
"""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int, int], None]  # (done, total) in one unit of work; total 0: not known


def silent(done: int, total: int) -> None:
    """Report to nobody."""

"""For tests that interrupt a process: what runs in the background ignores interrupts, and so would
all that it starts."""

from __future__ import annotations

import signal


def heed_interrupts() -> None:
    """In a new process, before its program: Ctrl-C means what it means on a terminal."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)

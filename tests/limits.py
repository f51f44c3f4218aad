"""No test waits without a limit, and what fails beside a test fails the test."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

LIMIT_SECONDS = 240.0  # for what takes moments: on a busy machine kernels compile for minutes


class Deadline:
    """LIMIT_SECONDS from now; `check` in a loop that waits for something."""

    def __init__(self) -> None:
        self._until = time.monotonic() + LIMIT_SECONDS

    def check(self, awaited: str) -> None:
        """Fail once the time is over."""
        assert time.monotonic() < self._until, f"{awaited}: not in {LIMIT_SECONDS:.0f} s"


class Helper:
    """A thread beside the test, which must end and must not fail."""

    def __init__(self, work: Callable[[], object]) -> None:
        self._work, self._error = work, list[BaseException]()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:
            self._error.append(error)

    @property
    def is_alive(self) -> bool:
        """Whether it still works."""
        return self._thread.is_alive()

    def check(self) -> None:
        """Raise what it failed with, if it did."""
        if self._error:
            raise self._error[0]

    def finish(self) -> None:
        """Wait for its end."""
        self._thread.join(LIMIT_SECONDS)
        self.check()
        assert not self.is_alive, f"a helper has not ended in {LIMIT_SECONDS:.0f} s"


@contextmanager
def beside(*works: Callable[[], object]) -> Iterator[list[Helper]]:
    """Each of ``works`` in a thread of its own; all have ended well when the block is left."""
    helpers = [Helper(work) for work in works]
    yield helpers
    for helper in helpers:
        helper.finish()

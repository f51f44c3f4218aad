"""Whether there is room for what an engine is about to do, beside its weights."""

from __future__ import annotations

from collections import abc
from collections.abc import Callable
from functools import partial

from nearfar.runtime.engine.loading import check_context
from nearfar.runtime.engine.planning.memory_plan import (
    MemoryPlan,
    plan_extended,
    plan_memory,
    plan_opened,
    together,
)
from nearfar.runtime.engine.planning.memory_setup import MemorySetup


class Room:
    """Plans and checks memory for one model, configuration and policy.

    What is checked raises OutOfMemoryError, which says what to change, where it does not fit.
    """

    def __init__(self, setup: MemorySetup) -> None:
        self._setup = setup

    def plan(self, context_tokens: int) -> MemoryPlan:
        """Predicted bytes of one context."""
        return plan_memory(self._setup, context_tokens)

    def check(self, context_tokens: int) -> None:
        """One more context of ``context_tokens``."""
        self._check(context_tokens, self.plan)

    def check_opened(self, context_tokens: int, mapped_bytes: int) -> None:
        """One that was read and has so many far bytes in a file."""
        planned = partial(plan_opened, self._setup, mapped_bytes=mapped_bytes)
        self._check(context_tokens, planned)

    def check_extended(self, held_tokens: int, context_tokens: int) -> None:
        """One of ``held_tokens`` that is to grow to ``context_tokens``."""
        self._check(context_tokens, partial(plan_extended, self._setup, held_tokens))

    def check_together(self, contexts: abc.Sequence[int]) -> None:
        """Contexts of so many tokens each, beside each other."""
        check_context(self._setup, together(map(self.plan, contexts)))

    def _check(self, context_tokens: int, planned: Callable[[int], MemoryPlan]) -> None:
        check_context(self._setup, planned(context_tokens), planned)

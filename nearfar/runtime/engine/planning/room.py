"""Checks that the next operation of an engine fits memory beside its weights."""

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

    The checks raise OutOfMemoryError, which says what to change, if a context does not fit.
    """

    def __init__(self, setup: MemorySetup) -> None:
        self._setup = setup

    def plan(self, context_tokens: int) -> MemoryPlan:
        """Predicted bytes of one context."""
        return plan_memory(self._setup, context_tokens)

    def check(self, context_tokens: int) -> None:
        """Check one more context of ``context_tokens``."""
        self._check(context_tokens, self.plan)

    def check_opened(self, context_tokens: int, mapped_bytes: int) -> None:
        """Check a saved document with ``mapped_bytes`` of far rows in a file."""
        planned = partial(plan_opened, self._setup, mapped_bytes=mapped_bytes)
        self._check(context_tokens, planned)

    def check_extended(self, held_tokens: int, context_tokens: int) -> None:
        """Check the growth of a document from ``held_tokens`` to ``context_tokens``."""
        self._check(context_tokens, partial(plan_extended, self._setup, held_tokens))

    def check_together(self, contexts: abc.Sequence[int]) -> None:
        """Check several contexts of these numbers of tokens, all in memory together."""
        check_context(self._setup, together(map(self.plan, contexts)))

    def _check(self, context_tokens: int, planned: Callable[[int], MemoryPlan]) -> None:
        check_context(self._setup, planned(context_tokens), planned)

"""Checks that the next operation of an engine fits memory beside its weights."""

from __future__ import annotations

from collections import abc
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from nearfar.runtime.engine.planning.memory_plan import (
    MemoryPlan,
    plan_extended,
    plan_memory,
    plan_opened,
    together,
)
from nearfar.runtime.engine.planning.memory_setup import MemorySetup
from nearfar.runtime.engine.planning.planner import check_plan


class Room:
    """Plans and checks memory for one model, configuration and policy.

    The checks raise OutOfMemoryError, which says what to change, if a context does not fit.
    """

    def __init__(self, setup: MemorySetup) -> None:
        self.setup = setup

    def plan(self, context_tokens: int) -> MemoryPlan:
        """Predicted bytes of one context."""
        return plan_memory(self.setup, context_tokens)

    def check(self, context_tokens: int) -> None:
        """Check one more context of ``context_tokens``."""
        self._check(context_tokens, self.plan)

    def check_opened(self, context_tokens: int, mapped_bytes: int) -> None:
        """Check a saved document with ``mapped_bytes`` of far rows in a file."""
        planned = partial(plan_opened, self.setup, mapped_bytes=mapped_bytes)
        self._check(context_tokens, planned)

    def check_extended(self, held_tokens: int, context_tokens: int) -> None:
        """Check the growth of a document from ``held_tokens`` to ``context_tokens``."""
        self._check(context_tokens, partial(plan_extended, self.setup, held_tokens))

    def check_together(self, contexts: abc.Sequence[int]) -> None:
        """Check several contexts of these numbers of tokens, all in memory together."""
        _check_beside_weights(self.setup, together(map(self.plan, contexts)))

    def _check(self, context_tokens: int, planned: Callable[[int], MemoryPlan]) -> None:
        _check_beside_weights(self.setup, planned(context_tokens), planned)


def _check_beside_weights(
    setup: MemorySetup, plan: MemoryPlan, planned: Callable[[int], MemoryPlan] | None = None
) -> None:
    """Raise OutOfMemoryError if the plan does not fit beside the loaded weights.

    ``planned`` plans any number of tokens, so that the error can say how many would fit.
    """

    # weights and CUDA's own memory are allocated already: they need none of the free memory, but
    # count against a cap
    def rest(plan: MemoryPlan) -> MemoryPlan:
        return replace(plan, weight_bytes=0, context_bytes=0)

    config = setup.config
    if config.near_memory_bytes is not None:
        left = config.near_memory_bytes - plan.weight_bytes - plan.context_bytes
        config = config.replace(near_memory_bytes=max(0, left))
    shorter = None if planned is None else lambda tokens: rest(planned(tokens))
    check_plan(rest(plan), config, setup.device, shorter)

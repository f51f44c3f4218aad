"""The plan of a comparison: tasks, lengths, policies, budgets, and labels that keep it fair.

When the question is known (`query`):

    agnostic   the context is read and the policy acts before any question is known; the question
               is then read with exact attention over all that the policy kept
    aware      context and question are one prompt, and the policy acts after both
    strict     like agnostic, and the tokens of the question go through the policy one by one

Under all three the last token of the prompt goes through the policy, so that no token of an answer
comes from exact attention alone. Policies with a different effect on the cache (`treatment`) never
share a column: policies that select, that evict through decode and that evict once after the prompt
promise different things.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from nearfar.config import Budget
from nearfar.errors import InvalidOptionError
from nearfar.evaluation.tasks.base import Task
from nearfar.policies.base import Traits
from nearfar.policies.registry import create_policy
from nearfar.records import Geometry
from nearfar.storage import FORMATS, bytes_read

Query = Literal["agnostic", "aware", "strict"]
QUERIES: dict[str, str] = {
    "agnostic": "questions come after the context was read and compressed",
    "aware": "context and question are one prompt, compressed with the question known",
    "strict": "like agnostic, and every token of the question goes through the policy",
}
EXACT = "exact"
SELECTS = "reads a subset at each step, keeps all"
BOUNDED = "bounded through decode"
ONCE = "compressed once after the prompt"
TREATMENTS = (EXACT, SELECTS, BOUNDED, ONCE)
REFERENCE = "full"
NO_CONTEXT = "no context"  # a row like a policy's: the same question without the text


def treatment_of(traits: Traits) -> str:
    """The label of a policy."""
    if traits.kind == "evicts":
        return ONCE if traits.evicts_once else BOUNDED
    return EXACT if traits.kind == "exact" else SELECTS


@dataclass(frozen=True)
class Variation:
    """A policy with a budget, or with none where it reads everything."""

    policy: str
    budget: float | None

    @property
    def traits(self) -> Traits:
        """Of the policy."""
        return create_policy(self.policy).traits

    @property
    def needs_sums(self) -> bool:
        """Whether reading must sum the attention that each token gets."""
        return self.policy != NO_CONTEXT and self.traits.watches == "sums"

    @property
    def treatment(self) -> str:
        """The label of the policy's effect on the cache."""
        return NO_CONTEXT if self.policy == NO_CONTEXT else treatment_of(self.traits)

    def budget_bytes(self, geometry: Geometry, far_dtype: str) -> int | None:
        """Bytes of keys and values that a step may read beside sinks and window, all layers."""
        if self.budget is None or self.budget < 1:
            return None
        keys = int(self.budget) * geometry.layers * geometry.kv_heads
        # selected keys are scattered, at worst each in a group of its own
        return bytes_read(FORMATS[far_dtype], geometry.head_dim, keys, keys)


@dataclass(frozen=True)
class Plan:
    """Everything that one comparison does."""

    tasks: Sequence[Task]
    context_tokens: Sequence[int]
    variations: Sequence[Variation]  # the first is the exact reference
    samples: int  # questions of each task and length
    query: Query = "agnostic"

    @property
    def reference(self) -> Variation:
        """Exact attention, which runs first on every sample."""
        return self.variations[0]


def make_variations(policies: Sequence[str], budgets: Sequence[float]) -> list[Variation]:
    """Every policy at every budget, exact ones once and the reference before all.

    The reference is the first exact policy among ``policies``, else `full`.
    """
    exact = [each for each in policies if create_policy(each).traits.kind == "exact"]
    reference = exact[0] if exact else REFERENCE
    found = []
    for policy in dict.fromkeys([reference, *policies]):
        kind = create_policy(policy).traits.kind
        found += [Variation(policy, None)] if kind == "exact" else []
        for budget in budgets if kind != "exact" else ():
            Budget(budget)
            found.append(Variation(policy, budget))
    return found


def covering_budgets(plan: Plan, own_tokens: Sequence[int], spared: int) -> list[tuple[int, float]]:
    """Contexts, in tokens, and budgets that leave out none of their keys.

    ``own_tokens`` are lengths that are not the plan's to say, ``spared`` sinks and window.
    """
    lengths = [*own_tokens, *(tokens for tokens in plan.context_tokens if tokens)]
    budgets = {each.budget for each in plan.variations if each.budget is not None}
    return [
        (tokens, budget)
        for tokens in lengths
        for budget in sorted(budgets)
        if budget >= 1 and budget + spared >= tokens
    ]


def check_plan(plan: Plan, model_tokens: int) -> None:
    """Raise InvalidOptionError for impossible numbers."""
    if not plan.tasks:
        raise InvalidOptionError("There is no task to run. Name some with --tasks.")
    if plan.samples < 1:
        raise InvalidOptionError(f"samples must be 1 or more. Got {plan.samples}.")
    for tokens in plan.context_tokens:
        if not 0 <= tokens <= model_tokens:
            raise InvalidOptionError(
                f"A context of {tokens:,} tokens is not between 1 and the {model_tokens:,} that "
                "the model reads."
            )

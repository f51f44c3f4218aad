"""Rows as a comparison writes them, made up, for tests of what is done with rows."""

from __future__ import annotations

import random
from typing import Any

from nearfar.evaluation.harness.plan import NO_CONTEXT, Variation
from nearfar.evaluation.harness.results import Cost, Key, Outcome, Row
from nearfar.evaluation.tasks.registry import BUILT_IN

MACHINE = "8 threads of a processor"
LAYERS, HEADS = 4, 3
# share of answers that are right, bytes near, far, index and far read per token, relative
POLICIES: dict[str, tuple[float, int, int, int, int]] = {
    "full": (0.95, 720, 0, 0, 0),
    "full-far": (0.95, 2, 718, 0, 718),
    "sketch": (0.94, 2, 718, 100, 22),
    "lsh-tables": (0.9, 2, 718, 870, 60),
    "topk-oracle": (0.93, 2, 718, 0, 22),
    "streaming-llm": (0.2, 24, 0, 0, 0),
    "h2o": (0.15, 24, 0, 0, 0),
}


def key(task: str = "niah_single_2", policy: str = "sketch", **values: Any) -> Key:
    exact = policy in ("full", "full-far", NO_CONTEXT)
    defaults: dict[str, Any] = {
        "model": "m",
        "context_tokens": 4096,
        "case": 0,
        "question": 0,
        "budget": None if exact else 1024,
        "query": "agnostic",
        "seed": 0,
        "source": "generated",
        "dtype": "bfloat16",
        "far_dtype": "bfloat16",
        "sinks": 4,
        "window": 64,
    }
    return Key(task=task, policy=policy, **(defaults | values))


def row(
    task: str = "niah_single_2",
    policy: str = "sketch",
    score: float | None = 100.0,
    *,
    error: str | None = None,
    depth: float | None = None,
    details: dict[str, Any] | None = None,
    rates: dict[str, float] | None = None,
    **values: Any,
) -> Row:
    where = key(task, policy, **values)
    scale = max(where.context_tokens, 1024) * 2**20 // 32768
    _, near, far, index, read = POLICIES.get(policy, (0, 0, 0, 0, 0))
    cost = Cost(
        MACHINE,
        where.context_tokens,
        2.0,
        True,
        0.25,
        0.5,
        (9.0, 10.0, 12.0),
        near * scale if policy == "full" else near * 2**20,
        far * scale,
        index * scale,
        float(read * (scale if read > 100 else 2**20)),
        2**30,
        0,
        rates or {},
    )
    metric = BUILT_IN[task].metric.name
    outcome = Outcome(
        metric, score, "It is so.", ("so",), "How?", (1, 2), 1.0, depth, details or {}
    )
    return Row(
        where,
        Variation(policy, where.budget).treatment,
        None if where.budget is None else int(where.budget) * 23040,
        10,
        None if error else outcome,
        None if error else cost,
        error,
    )


def many_rows(
    policies: tuple[str, ...] = tuple(POLICIES),
    contexts: tuple[int, ...] = (4096, 32768, 131072),
    samples: int = 8,
) -> list[Row]:
    """A comparison with every kind of picture."""
    rng = random.Random(0)
    rows = []
    for context in contexts:
        for policy in policies:
            right = POLICIES[policy][0] * (1 if right_everywhere(policy) else 4096 / context) ** 0.5
            every: dict[str, Any] = {"context_tokens": context}
            for task in ("niah_single_1", "niah_multikey_2", "vt"):
                for case in range(samples):
                    score = 100.0 * (rng.random() < right)
                    rows.append(row(task, policy, score, case=case, **every))
            for case in range(2):
                for question in range(10):
                    score, depth = 100.0 * (rng.random() < right), (question + 0.5) / 10
                    where: dict[str, Any] = {"case": case, "question": question, **every}
                    rows.append(row("needles", policy, score, depth=depth, **where))
            rows += _measures(policy, context, rng)
    return rows


def right_everywhere(policy: str) -> bool:
    return POLICIES[policy][0] > 0.5


def _measures(policy: str, context: int, rng: random.Random) -> list[Row]:
    exact = policy.startswith("full")
    base = 0.0 if exact else 1 - POLICIES[policy][0]
    rows = []
    for case in range(2):
        details = {
            "kl": base / 2,
            "top1": 1 - base / 4,
            "error": [[base * (0.6 + rng.random()) for _ in range(HEADS)] for _ in range(LAYERS)],
            "mass": [[1 - base * rng.random() for _ in range(HEADS)] for _ in range(LAYERS)],
        }
        where: dict[str, Any] = {"context_tokens": context, "case": case}
        rows.append(row("distances", policy, base / 2, details=details, **where))
        rows.append(row("perplexity", policy, 2.5 + base, **where))
    rates = {"1": 10.0, "2": 18.0, "4": 30.0 - base}
    rows.append(row("throughput", policy, None, rates=rates, context_tokens=context))
    return rows

"""A comparison on a tiny random model with a tokenizer: every part of a real one, in a second."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nearfar.evaluation.harness.plan import Plan, make_variations
from nearfar.evaluation.harness.results import Results, Row
from nearfar.evaluation.harness.runner import Runner
from nearfar.evaluation.haystack import Haystack
from nearfar.evaluation.tasks.base import Material, Task
from nearfar.evaluation.tasks.needle_grid import NeedleGrid
from nearfar.evaluation.tasks.niah import Niah
from nearfar.evaluation.tasks.text import DistancesTask, Perplexity
from nearfar.runtime.engine.engine import Engine

CONTEXT = 700
TASKS: tuple[Task, ...] = (
    Niah("niah_single_2", "essay", max_new_tokens=6),
    NeedleGrid(questions_per_case=3, max_new_tokens=4),
    Perplexity(following_tokens=9),
    DistancesTask(following_tokens=4),
)


def tiny_engine_of(folder: Path, **settings: Any) -> Engine:
    defaults: dict[str, Any] = {"dtype": "float32", "far_dtype": "float32", "sinks": 3, "window": 5}
    return Engine.from_pretrained(str(folder), device="cpu", threads=1, **(defaults | settings))


def compare(
    engine: Engine,
    results: Results,
    *,
    policies: Sequence[str] = ("sketch", "streaming-llm", "h2o"),
    budgets: Sequence[float] = (40,),
    tasks: Sequence[Task] = TASKS,
    samples: int = 4,
    query: Any = "agnostic",
    contexts: Sequence[int] = (CONTEXT,),
    stop: Callable[[Row], bool] = lambda _: False,
    material: Material | None = None,
) -> bool:
    """Run a plan until ``stop`` says so after a row."""
    plan = Plan(tasks, contexts, make_variations(policies, budgets), samples, query)
    stopped: list[bool] = []
    material = material or Material(engine.tokenizer, Haystack(), 0)

    def on_row(row: Row, _: object) -> None:
        if stop(row):
            stopped.append(True)

    return Runner(engine, plan, material, results, on_row).run(lambda: bool(stopped))


def without_cost(rows: Sequence[Row] | Results) -> list[Row]:
    """Rows as they are in every run."""
    return [dataclasses.replace(row, cost=None) for row in rows]

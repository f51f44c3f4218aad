"""A comparison of two sides on equal samples, for `orderings.py`: figures and a verdict."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import click
import numpy as np

from nearfar.evaluation.harness.plan import Plan, Query, Variation
from nearfar.evaluation.harness.results import Results, Row
from nearfar.evaluation.harness.runner import Runner
from nearfar.evaluation.statistics import Estimate, Scores, estimate
from nearfar.evaluation.tasks.base import Material, Task
from nearfar.runtime.engine.engine import Engine

EXACT = Variation("full", None)
Value = Callable[[Row], float]
Measured = tuple[str, Scores, str]  # a side's name, its value for each sample, its bytes


@dataclass(frozen=True)
class Setting:
    """The model and the text on which every ordering is measured."""

    engine: Engine
    material: Material
    context: int  # tokens of a sample
    samples: int

    def rows(
        self,
        tasks: Iterable[Task],
        variations: Iterable[Variation],
        query: Query = "agnostic",
        *,
        sinks: int | None = None,
    ) -> list[Row]:
        """Rows of `nearfar compare`, exact attention first. ClickException if a policy fails."""
        engine = self.engine
        if sinks is not None:
            engine = engine.with_config(engine.config.replace(sinks=sinks))
        plan = Plan(list(tasks), [self.context], [EXACT, *variations], self.samples, query)
        results = Results()
        Runner(engine, plan, self.material, results, _tell).run()
        failed = [f"{row.key.policy}: {row.error}" for row in results if row.error]
        if failed:
            raise click.ClickException(failed[0])
        return list(results)


def _tell(row: Row, _: object) -> None:
    key = row.key
    text = f"{key.task} {key.case} {key.policy} {key.budget or ''}"
    click.echo(f"{text} {row.outcome.score if row.outcome else row.error}", err=True)


@dataclass(frozen=True)
class Side:
    """One of the two sides."""

    name: str
    value: Estimate
    takes: str


@dataclass(frozen=True)
class Ordering:
    """Two figures; the first one should be better."""

    name: str
    source: str
    measure: str
    better: Side
    worse: Side
    exact: float | None  # the figure of exact attention, if it is meaningful
    gain: Estimate  # of the first over the second, sample by sample; of logs for perplexity

    @property
    def holds(self) -> str:
        """The verdict from the interval of the gain."""
        if self.gain.low > 0:
            return "yes"
        return "no, the other way" if self.gain.high < 0 else "not decided"


def score(row: Row) -> float:
    """The task's own score."""
    assert row.outcome is not None
    assert row.outcome.score is not None
    return row.outcome.score


def mean_of(detail: str) -> Value:
    """The mean over layers and heads of a result of `distances`."""

    def value(row: Row) -> float:
        assert row.outcome is not None
        return float(np.mean(row.outcome.details[detail]))

    return value


def _of(rows: Iterable[Row], task: str | None, variation: Variation) -> list[Row]:
    wanted = (variation.policy, variation.budget)
    return [
        row
        for row in rows
        if (row.key.policy, row.key.budget) == wanted and task in (None, row.key.task)
    ]


def pick(rows: Iterable[Row], task: str, variation: Variation, value: Value = score) -> Scores:
    """One value for each sample."""
    return {(row.key.case, row.key.question): value(row) for row in _of(rows, task, variation)}


def bytes_of(rows: Iterable[Row], variation: Variation) -> float:
    """Median bytes of keys and values that a step reads, near and far."""
    costs = [row.cost for row in _of(rows, None, variation) if row.cost is not None]
    return float(np.median([each.near_bytes + each.far_bytes_read_per_token for each in costs]))


def side(
    rows: Iterable[Row], task: str, variation: Variation, value: Value = score, name: str = ""
) -> Measured:
    """A policy on a task."""
    budget = "" if variation.budget is None else f", {variation.budget:,.0f}"
    takes = f"{bytes_of(rows, variation) / 2**20:.1f} MiB"
    return name or variation.policy + budget, pick(rows, task, variation, value), takes


def ordering(
    about: tuple[str, str, str],
    better: Measured,
    worse: Measured,
    *,
    exact: Scores | None = None,
    logs: bool = False,
    higher: bool = False,
) -> Ordering:
    """Both sides on the same samples; ``about``: name, source and measure."""
    ours, theirs = better[1], worse[1]
    assert ours.keys() == theirs.keys()
    sign = 1 if higher else -1
    gain = estimate([{key: sign * (ours[key] - theirs[key]) for key in ours}])
    first, second = (
        Side(name, estimate([scores], logs=logs), takes) for name, scores, takes in (better, worse)
    )
    known = estimate([exact], logs=logs).value if exact else None
    return Ordering(*about, first, second, known, gain)


def table(found: Iterable[Ordering]) -> str:
    """One Markdown row for each ordering."""
    lines = [
        "| ordering | measure | should be better | should be worse | exact | gain | holds |",
        "| --- " * 7 + "|",
    ]
    for each in found:
        better, worse = (
            ", ".join(filter(None, (f"{one.name}: {_range(one.value)}", one.takes)))
            for one in (each.better, each.worse)
        )
        exact = "" if each.exact is None else f"{each.exact:.4g}"
        parts = (each.name, each.measure, better, worse, exact, _range(each.gain), each.holds)
        lines.append("| " + " | ".join(parts) + " |")
    return "\n".join(lines)


def _range(value: Estimate) -> str:
    return f"{value.value:.3g} ({value.low:.3g} to {value.high:.3g})"

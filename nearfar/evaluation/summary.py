"""Summarises rows for a report: a cell for each task, length and variation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from nearfar.evaluation.harness.plan import EXACT, NO_CONTEXT, TREATMENTS
from nearfar.evaluation.harness.results import Cost, Key, Row
from nearfar.evaluation.statistics import Estimate, Scores, estimate, ratio
from nearfar.evaluation.tasks.base import Metric
from nearfar.evaluation.tasks.registry import METRICS, RULER_NAMES

SOLVED = 50.0  # percent; a task that exact attention solves less often says little of policies
MEAN = "mean"
SETTINGS = ("model", "dtype", "far_dtype", "sinks", "window", "query", "seed")


@dataclass(frozen=True)
class Costs:
    """Medians over samples; 0 where a time or a peak was not measured."""

    machine: str
    prompt_tokens: float
    first_token_seconds: float  # reading, taking in, the question and one step
    question_seconds: float  # from the end of the context to the first token
    step_ms: tuple[float, float, float] | None
    near_bytes: float
    far_bytes: float
    index_bytes: float
    far_bytes_read_per_token: float
    peak_rss_bytes: float
    peak_gpu_bytes: float

    @property
    def bytes_read_per_token(self) -> float:
        """Keys and values that a step reads, near and far."""
        return self.near_bytes + self.far_bytes_read_per_token


@dataclass(frozen=True)
class Cell:
    """One variation on one task at one length."""

    name: str  # of the variation, as tables and pictures show it
    key: Key  # of its first row
    treatment: str
    budget_bytes: int | None
    metric: Metric | None
    scores: Scores
    depths: dict[tuple[int, int], float]
    estimate: Estimate | None
    agreement: float | None
    measured: tuple[Cost, ...] = field(repr=False)
    errors: tuple[str, ...]
    details: tuple[dict[str, object], ...] = field(repr=False)
    tokens_per_second: dict[int, float] = field(default_factory=dict)

    @cached_property
    def costs(self) -> Costs | None:
        """Medians over its samples."""
        return costs_over([self])


def summarise(rows: Iterable[Row]) -> list[Cell]:
    """Cells in the order of their first rows; exact attention before all others."""
    groups: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(row.key.variation(), []).append(row)
    differing = _differing([group[0].key for group in groups.values()])
    cells = [_cell(group, differing) for group in groups.values()]
    return sorted(cells, key=lambda cell: _rank(cell.treatment))


def _rank(treatment: str) -> int:
    """Exact first, then no context, then by treatment."""
    order = (EXACT, NO_CONTEXT, *TREATMENTS[1:])
    return order.index(treatment) if treatment in order else len(order)


def _differing(keys: Sequence[Key]) -> list[str]:
    """Settings that differ between rows; names must then state them."""
    return [name for name in SETTINGS if len({getattr(key, name) for key in keys}) > 1]


def variation_name(key: Key, differing: Sequence[str] = ()) -> str:
    """A policy, its budget, and what else sets it apart."""
    parts = [key.policy]
    if key.budget is not None:
        parts.append(f"{key.budget:,.0f}" if key.budget >= 1 else f"{key.budget:.3g} of keys")
    parts += [f"{name} {getattr(key, name)}" for name in differing]
    return " · ".join(parts)


def _cell(rows: Sequence[Row], differing: Sequence[str]) -> Cell:
    key = rows[0].key
    outcomes = [
        ((row.key.case, row.key.question), row.outcome) for row in rows if row.outcome is not None
    ]
    scores = {where: outcome.score for where, outcome in outcomes if outcome.score is not None}
    metric = METRICS.get(outcomes[0][1].metric) if outcomes else None
    agreements = [each.agreement for _, each in outcomes if each.agreement is not None]
    rates: dict[int, list[float]] = {}
    for row in rows:
        for batch, rate in (row.cost.tokens_per_second if row.cost else {}).items():
            rates.setdefault(int(batch), []).append(rate)
    logs = metric is not None and metric.mean_of_logs
    return Cell(
        variation_name(key, differing),
        key,
        rows[0].treatment,
        rows[0].budget_bytes,
        metric,
        scores,
        {where: each.depth for where, each in outcomes if each.depth is not None},
        estimate([scores], logs=logs) if scores else None,
        float(np.mean(agreements)) if agreements else None,
        tuple(row.cost for row in rows if row.cost is not None),
        tuple(dict.fromkeys(row.error for row in rows if row.error is not None)),
        tuple(each.details for _, each in outcomes if each.details),
        {batch: float(np.median(found)) for batch, found in sorted(rates.items())},
    )


def costs_over(cells: Iterable[Cell]) -> Costs | None:
    """Medians over all samples of ``cells``: over those of questions, where there are any.

    A time or a peak of 0 was not measured in that sample.
    """
    cells = list(cells)
    asked = [cost for cell in cells if is_share(cell) for cost in cell.measured]
    found = asked or [cost for cell in cells for cost in cell.measured]
    if not found:
        return None

    def median(name: str) -> float:
        return float(np.median([getattr(each, name) for each in found]))

    def median_where_measured(name: str) -> float:
        values = [getattr(each, name) for each in found if getattr(each, name)]
        return float(np.median(values)) if values else 0.0

    steps = [each.step_ms for each in found if each.step_ms is not None]
    quantiles = [float(np.median(column)) for column in zip(*steps, strict=True)]
    timed = [each for each in found if each.first_token_seconds]
    whole = [each.read_seconds + each.take_in_seconds + each.first_token_seconds for each in timed]
    return Costs(
        ", ".join(dict.fromkeys(each.machine for each in found)),
        median("prompt_tokens"),
        float(np.median(whole)) if timed else 0.0,
        median_where_measured("first_token_seconds"),
        (quantiles[0], quantiles[1], quantiles[2]) if quantiles else None,
        median("near_bytes"),
        median("far_bytes"),
        median("index_bytes"),
        median("far_bytes_read_per_token"),
        median_where_measured("peak_rss_bytes"),
        median_where_measured("peak_gpu_bytes"),
    )


def costs_by_name(cells: Sequence[Cell]) -> dict[str, Costs]:
    """`costs_over` of each variation in ``cells`` that was measured, in order."""
    found = {
        name: costs_over(cell for cell in cells if cell.name == name)
        for name in names_in(cells, "name")
    }
    return {name: costs for name, costs in found.items() if costs is not None}


def select(
    cells: Iterable[Cell], *, task: str | None = None, context: int | None = None
) -> list[Cell]:
    """Cells of a task, of a length, or of both."""
    return [
        cell
        for cell in cells
        if (task is None or cell.key.task == task)
        and (context is None or cell.key.context_tokens == context)
    ]


def names_in(cells: Iterable[Cell], attribute: str) -> list[str]:
    """Different values of ``attribute`` of keys, or of cells, in order."""
    return list(dict.fromkeys(_attribute(cell, attribute) for cell in cells))


def _attribute(cell: Cell, attribute: str) -> str:
    source = cell.key if hasattr(cell.key, attribute) else cell
    return str(getattr(source, attribute))


def contexts_in(cells: Iterable[Cell]) -> list[int]:
    """Lengths, the shortest first."""
    return sorted({cell.key.context_tokens for cell in cells})


def is_share(cell: Cell) -> bool:
    """Whether the score is a share, so that means over tasks are meaningful."""
    return cell.metric is not None and cell.metric.unit == "%"


def mean_over_tasks(cells: Iterable[Cell]) -> Estimate | None:
    """The mean of shares over the tasks of ``cells``, which are one variation at one length."""
    strata = [cell.scores for cell in cells if is_share(cell) and cell.scores]
    return estimate(strata) if strata else None


@dataclass(frozen=True)
class Relative:
    """A policy beside exact attention over RULER's tasks that the latter solves."""

    name: str
    treatment: str
    context_tokens: int
    ratio: Estimate
    tasks: tuple[str, ...]


def relative_to_exact(cells: Sequence[Cell]) -> list[Relative]:
    """For each length and variation: its mean over that of exact attention, on equal samples.

    Tasks are RULER's that exact attention solves at 50 % or more.
    """
    found = []
    for context in contexts_in(cells):
        here = [cell for cell in select(cells, context=context) if cell.key.task in RULER_NAMES]
        exact: dict[str, Cell] = {}
        for cell in here:
            if cell.treatment == EXACT and cell.key.task not in exact and cell.estimate:
                exact[cell.key.task] = cell
        solved = [
            task for task, cell in exact.items() if cell.estimate and cell.estimate.value >= SOLVED
        ]
        for name in names_in(here, "name"):
            own = {cell.key.task: cell for cell in here if cell.name == name}
            pairs = [(own[task].scores, exact[task].scores) for task in solved if task in own]
            share = ratio(pairs) if pairs else None
            treatment = next(iter(own.values())).treatment
            if share is not None and treatment != NO_CONTEXT:
                found.append(Relative(name, treatment, context, share, tuple(solved)))
    return found

"""The tables of a report: policies are rows, and treatments of the cache never share a table."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from nearfar.config import format_bytes
from nearfar.evaluation import summary
from nearfar.evaluation.harness.plan import EXACT, NO_CONTEXT, TREATMENTS
from nearfar.evaluation.report.place_figures import head_means
from nearfar.evaluation.statistics import Estimate
from nearfar.evaluation.summary import Cell, Costs

FIRST = (EXACT, NO_CONTEXT)  # rows of every table


@dataclass(frozen=True)
class Shown:
    """One entry: a value, and in smaller type its range."""

    value: str
    range: str = ""


@dataclass(frozen=True)
class TableRow:
    """A policy's entries, None if empty."""

    name: str
    exact: bool
    cells: list[Shown | None]


@dataclass(frozen=True)
class ScoreTable:
    """A title, columns after the policy's, and rows."""

    title: str
    columns: list[str]
    rows: list[TableRow]


def tokens_title(context: int) -> str:
    """A length as a heading."""
    return f"{context:,} tokens" if context else "The document"


def score_tables(cells: Sequence[Cell]) -> dict[str, list[ScoreTable]]:
    """For each treatment, a table of every length: tasks are columns."""
    scored = [cell for cell in cells if cell.estimate is not None]
    present = [each for each in TREATMENTS[1:] if any(c.treatment == each for c in scored)]
    found = {}
    for treatment in present or [EXACT]:
        own = [cell for cell in scored if cell.treatment in (*FIRST, treatment)]
        found[treatment] = [
            _score_table(summary.select(own, context=context), context)
            for context in summary.contexts_in(own)
        ]
    return found


def _score_table(cells: Sequence[Cell], context: int) -> ScoreTable:
    tasks = summary.names_in(cells, "task")
    metrics = {cell.key.task: cell.metric.name for cell in cells if cell.metric is not None}
    shares = {cell.key.task for cell in cells if summary.is_share(cell)}
    rows = []
    for name in summary.names_in(cells, "name"):
        own = {cell.key.task: cell for cell in cells if cell.name == name}
        shown = [
            shown_estimate(own[task].estimate, tenths=task in shares) if task in own else None
            for task in tasks
        ]
        if len(shares) > 1:
            mean = summary.mean_over_tasks(own.values()) if shares <= set(own) else None
            shown.insert(0, shown_estimate(mean, tenths=True))
        rows.append(TableRow(name, next(iter(own.values())).treatment == EXACT, shown))
    columns = [f"{task}\n{metrics.get(task, '')}" for task in tasks]
    return ScoreTable(
        tokens_title(context), (["mean\n%"] if len(shares) > 1 else []) + columns, rows
    )


def shown_estimate(
    found: Estimate | None, *, percent: bool = False, tenths: bool = False
) -> Shown | None:
    """A mean with its interval and number of samples; ``tenths``: always one digit."""
    if found is None:
        return None
    scale = 100 if percent else 1
    value = found.value * scale
    digits = 1 if percent or tenths or abs(value) >= 10 or value == 0 else 3
    span = " to ".join(f"{each * scale:.{digits}f}" for each in found.interval or ())
    note = f"{span} · n {found.samples}" if span else f"n {found.samples}"
    return Shown(f"{value:.{digits}f}{' %' if percent else ''}", note)


def relative_tables(cells: Sequence[Cell]) -> list[ScoreTable]:
    """For each treatment: shares of exact attention's mean, lengths are columns."""
    found = summary.relative_to_exact(cells)
    contexts = sorted({each.context_tokens for each in found})
    tables = []
    for treatment in TREATMENTS[1:]:
        own = [each for each in found if each.treatment in (EXACT, treatment)]
        if not any(each.treatment == treatment for each in own):
            continue
        rows = []
        for name in dict.fromkeys(each.name for each in own):
            by_context = {each.context_tokens: each for each in own if each.name == name}
            exact = next(iter(by_context.values())).treatment == EXACT
            shown = [
                shown_estimate(by_context[context].ratio, percent=True)
                if context in by_context
                else None
                for context in contexts
            ]
            rows.append(TableRow(name, exact, shown))
        counts = {each.context_tokens: len(each.tasks) for each in found}
        columns = [f"{tokens_title(context)}\n{counts[context]} tasks" for context in contexts]
        tables.append(ScoreTable(treatment, columns, rows))
    return tables


COST_COLUMNS = (
    "first token",
    "after the question",
    "ms per token, p50",
    "near",
    "far",
    "index",
    "far read per token",
    "read per token",
    "same as exact",
    "peak host",
    "peak GPU",
)


def cost_tables(cells: Sequence[Cell]) -> list[ScoreTable]:
    """The costs of each policy at each length: medians over all its tasks."""
    return [
        ScoreTable(title, list(COST_COLUMNS), _cost_rows(own))
        for title, own in _by_treatment(cells)
    ]


def _by_treatment(cells: Sequence[Cell]) -> Iterator[tuple[str, list[Cell]]]:
    """For each length and each treatment present: a title, its cells and the exact ones."""
    for context in summary.contexts_in(cells):
        here = summary.select(cells, context=context)
        for treatment in TREATMENTS[1:]:
            own = [cell for cell in here if cell.treatment in (EXACT, treatment)]
            if any(cell.treatment == treatment for cell in own):
                yield f"{tokens_title(context)} · {treatment}", own


def _cost_rows(cells: Sequence[Cell]) -> list[TableRow]:
    rows = []
    for name, costs in summary.costs_by_name(cells).items():
        own = [cell for cell in cells if cell.name == name]
        rows.append(TableRow(name, own[0].treatment == EXACT, _cost_cells(costs, own)))
    return rows


def _cost_cells(costs: Costs, cells: Iterable[Cell]) -> list[Shown | None]:
    agreements = [cell.agreement for cell in cells if cell.agreement is not None]
    steps = costs.step_ms
    return [
        _seconds(costs.first_token_seconds),
        _seconds(costs.question_seconds),
        None if steps is None else Shown(f"{steps[1]:.1f}", f"{steps[0]:.1f} to {steps[2]:.1f}"),
        Shown(format_bytes(costs.near_bytes)),
        Shown(format_bytes(costs.far_bytes)),
        Shown(format_bytes(costs.index_bytes)),
        Shown(format_bytes(costs.far_bytes_read_per_token)),
        Shown(format_bytes(costs.bytes_read_per_token)),
        Shown(f"{sum(agreements) / len(agreements):.0%}") if agreements else None,
        Shown(format_bytes(costs.peak_rss_bytes)) if costs.peak_rss_bytes else None,
        Shown(format_bytes(costs.peak_gpu_bytes)) if costs.peak_gpu_bytes else None,
    ]


def _seconds(seconds: float) -> Shown | None:
    if not seconds:
        return None
    return Shown(f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s")


DISTANCE_COLUMNS = ("KL, nats", "same next token", "attention error", "recovered mass")


def distance_tables(cells: Sequence[Cell]) -> list[ScoreTable]:
    """Distances of each policy at each length, treatments apart."""
    measured = [cell for cell in cells if cell.key.task == "distances" and cell.details]
    tables = []
    for title, own in _by_treatment(measured):
        rows = [TableRow(cell.name, cell.treatment == EXACT, _distance_cells(cell)) for cell in own]
        tables.append(ScoreTable(title, list(DISTANCE_COLUMNS), rows))
    return tables


def _distance_cells(cell: Cell) -> list[Shown | None]:
    top1 = [float(str(each["top1"])) for each in cell.details]
    error, mass = head_means(cell, "error"), head_means(cell, "mass")
    return [
        shown_estimate(cell.estimate),
        Shown(f"{sum(top1) / len(top1):.1%}"),
        Shown(f"{error.mean():.4f}", f"worst layer {error.mean(1).max():.4f}"),
        Shown(f"{mass.mean():.1%}", f"worst layer {mass.mean(1).min():.1%}"),
    ]

"""Tables of `nearfar compare`, one for each treatment of the cache, exact attention first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table

from nearfar.cli.output import Output, format_seconds
from nearfar.config import format_bytes

if TYPE_CHECKING:
    from nearfar.evaluation.harness.results import Row
    from nearfar.evaluation.statistics import Estimate
    from nearfar.evaluation.summary import Cell

QUESTION_COLUMNS = ("policy", "answer", "contains", "agrees", "first token", "ms/token")
BYTE_COLUMNS = ("near", "far", "index", "far read/token")
TASKS_PER_TABLE = 7


def show_questions(rows: Sequence[Row], questions: Sequence[str], output: Output) -> None:
    """The answers to the user's own questions, as text."""
    shown = [row for row in rows if row.key.task == "questions"]
    output.record(
        {"questions": list(questions), "answers": [_question_record(row) for row in shown]}
    )
    for number, question in enumerate(questions):
        table = _table(question, ("policy", "answer"), QUESTION_COLUMNS + BYTE_COLUMNS)
        for row in shown:
            if row.key.question == number:
                table.add_row(*_question_cells(row))
        output.show(table)


def _question_record(row: Row) -> dict[str, Any]:
    outcome, cost = row.outcome, row.cost
    record: dict[str, Any] = {"policy": row.key.policy, "budget": row.key.budget}
    record |= {"treatment": row.treatment, "error": row.error}
    if outcome is None or cost is None:
        return record
    return record | {
        "question": outcome.question_text,
        "answer": outcome.prediction,
        "contains": outcome.score,
        "agreement": outcome.agreement,
        "new_tokens": len(outcome.token_ids),
        "first_token_seconds": cost.first_token_seconds,
        "step_ms": cost.step_ms,
        "read_seconds": cost.read_seconds,
        "near_bytes": cost.near_bytes,
        "far_bytes": cost.far_bytes,
        "index_bytes": cost.index_bytes,
        "far_bytes_read_per_token": cost.far_bytes_read_per_token,
    }


def _question_cells(row: Row) -> list[str]:
    if row.outcome is None or row.cost is None:
        return [row.key.policy, f"failed: {row.error}"]
    outcome, cost = row.outcome, row.cost
    return [
        row.key.policy,
        (outcome.prediction or "").strip(),
        {None: "", 100.0: "yes", 0.0: "no"}[outcome.score],
        "" if outcome.agreement is None else f"{outcome.agreement:.0%}",
        format_seconds(cost.first_token_seconds),
        "" if cost.step_ms is None else f"{cost.step_ms[1]:.1f}",
        format_bytes(cost.near_bytes),
        format_bytes(cost.far_bytes),
        format_bytes(cost.index_bytes),
        format_bytes(cost.far_bytes_read_per_token),
    ]


def show_tasks(cells: Sequence[Cell], output: Output) -> None:
    """Scores of tasks at every length, their costs, and their ratio to exact attention."""
    from nearfar.evaluation import summary
    from nearfar.evaluation.harness.plan import EXACT, NO_CONTEXT, TREATMENTS

    output.record({"cells": [_cell_record(cell) for cell in cells]})
    for context in summary.contexts_in(cells):
        here = summary.select(cells, context=context)
        for treatment in TREATMENTS[1:]:
            names = summary.names_in([c for c in here if c.treatment == treatment], "name")
            if names:
                first = summary.names_in(
                    [c for c in here if c.treatment in (EXACT, NO_CONTEXT)], "name"
                )
                title = f"{context:,} tokens · {treatment}"
                _show_scores(here, [*first, *names], title, output)
        if all(cell.treatment in (EXACT, NO_CONTEXT) for cell in here):
            names = summary.names_in(here, "name")
            _show_scores(here, names, f"{context:,} tokens · exact", output)
        _show_costs(here, f"{context:,} tokens · cost", output)
    _show_relative(cells, output)
    for cell in cells:
        for error in cell.errors:
            output.note(f"{cell.key.task} {cell.key.context_tokens:,} {cell.name}: {error}")


def _show_scores(cells: Sequence[Cell], names: Sequence[str], title: str, output: Output) -> None:
    from nearfar.evaluation import summary

    scored = [cell for cell in cells if cell.name in names and cell.estimate is not None]
    tasks = summary.names_in(scored, "task")
    for start in range(0, len(tasks), TASKS_PER_TABLE):
        some = tasks[start : start + TASKS_PER_TABLE]
        last = start + TASKS_PER_TABLE >= len(tasks)
        shares = {cell.key.task for cell in scored if summary.is_share(cell)}
        mean = ["mean of %"] if last and len(shares) > 1 else []
        table = _table(title, ("policy",), ("policy", *some, *mean))
        for name in names:
            own = {cell.key.task: cell for cell in scored if cell.name == name}
            row = [_estimate(own[task].estimate) if task in own else "" for task in some]
            if mean:
                complete = shares <= set(own)
                row.append(_estimate(summary.mean_over_tasks(own.values())) if complete else "")
            table.add_row(name, *row)
        output.show(table)


def _estimate(found: Estimate | None) -> str:
    """A mean, its interval if there are several samples, and their number."""
    if found is None:
        return ""
    digits = 1 if abs(found.value) >= 10 else 3
    span = " - ".join(f"{each:.{digits}f}" for each in found.interval or ())
    return f"{found.value:.{digits}f} {f'[{span}] ' if span else ''}n{found.samples}"


def _show_costs(cells: Sequence[Cell], title: str, output: Output) -> None:
    from nearfar.evaluation import summary

    columns = ("policy", "first token", "after question", "ms/token p20/50/80", *BYTE_COLUMNS)
    table = _table(title, ("policy",), (*columns, "peak host", "peak GPU"))
    for name, costs in summary.costs_by_name(cells).items():
        steps = "" if costs.step_ms is None else " / ".join(f"{ms:.1f}" for ms in costs.step_ms)
        table.add_row(
            name,
            *(
                format_seconds(each) if each else ""
                for each in (costs.first_token_seconds, costs.question_seconds)
            ),
            steps,
            *(
                format_bytes(each)
                for each in (
                    costs.near_bytes,
                    costs.far_bytes,
                    costs.index_bytes,
                    costs.far_bytes_read_per_token,
                )
            ),
            *(
                format_bytes(peak) if peak else ""
                for peak in (costs.peak_rss_bytes, costs.peak_gpu_bytes)
            ),
        )
    output.show(table)


def _show_relative(cells: Sequence[Cell], output: Output) -> None:
    from nearfar.evaluation.summary import relative_to_exact

    found = relative_to_exact(cells)
    output.record(
        {
            "relative_to_exact": [
                {
                    "policy": each.name,
                    "treatment": each.treatment,
                    "context_tokens": each.context_tokens,
                    "ratio": each.ratio.value,
                    "interval": each.ratio.interval,
                    "samples": each.ratio.samples,
                    "tasks": list(each.tasks),
                }
                for each in found
            ]
        }
    )
    if not found:
        return
    title = "RULER's tasks that exact attention solves at 50 % or more: share of its mean"
    table = _table(title, ("policy", "treatment"), ("treatment", "policy", "tokens", "share", "n"))
    for each in sorted(found, key=lambda each: each.treatment):
        ratio = each.ratio
        span = " - ".join(f"{each:.1%}" for each in ratio.interval or ())
        share = f"{ratio.value:.1%}" + (f" [{span}]" if span else "")
        tokens = f"{each.context_tokens:,}"
        table.add_row(each.treatment, each.name, tokens, share, f"{ratio.samples}")
    output.show(table)


def _cell_record(cell: Cell) -> dict[str, Any]:
    found, costs = cell.estimate, cell.costs
    record: dict[str, Any] = {
        "task": cell.key.task,
        "context_tokens": cell.key.context_tokens,
        "policy": cell.key.policy,
        "budget": cell.key.budget,
        "budget_bytes": cell.budget_bytes,
        "treatment": cell.treatment,
        "query": cell.key.query,
        "seed": cell.key.seed,
        "metric": None if cell.metric is None else cell.metric.name,
        "score": None if found is None else found.value,
        "interval": None if found is None else found.interval,
        "samples": 0 if found is None else found.samples,
        "agreement": cell.agreement,
        "errors": list(cell.errors),
        "tokens_per_second": cell.tokens_per_second,
    }
    return record if costs is None else record | {"costs": dict(vars(costs))}


def _table(title: str, text_columns: Sequence[str], columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", pad_edge=False)
    for column in columns:
        text = column in text_columns
        table.add_column(column, justify="left" if text else "right", no_wrap=column == "policy")
    return table

"""Scores as lines: against the bytes that a step reads, and against the length of the context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from nearfar.evaluation import summary
from nearfar.evaluation.harness.plan import NO_CONTEXT
from nearfar.evaluation.report.drawing import Style, draw
from nearfar.evaluation.report.pictures import MIB, Picture, Styles, policies_in, short_tokens
from nearfar.evaluation.statistics import Estimate
from nearfar.evaluation.summary import Cell

# shares of an axis: points with about equal bytes are drawn side by side, and are moved only a bit
BESIDE, CROWD = 0.015, 0.08


def accuracy_against_bytes(cells: Sequence[Cell], styles: Styles) -> list[Picture]:
    """Mean score over tasks against the keys and values that a step reads, for each length."""
    pictures = []
    for context in summary.contexts_in(cells):
        points = _mean_points(summary.select(cells, context=context))
        if len(points) < 2:
            continue

        def paint(axes: Axes, points: list[_Point] = points) -> None:
            placed = _side_by_side(points)
            for policy in dict.fromkeys(point.policy for point, _ in placed):
                own = [(point, x) for point, x in placed if point.policy == policy]
                _line(
                    axes,
                    [x / MIB for _, x in own],
                    [point.found for point, _ in own],
                    styles[policy],
                )
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=12))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,g}"))
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.set_xlabel("keys and values read per token, MiB")
            axes.set_ylabel("mean score, %")
            axes.set_ylim(-3, 103)

        title = f"{short_tokens(context)} tokens" if context else "the document"
        name = f"Accuracy against bytes read, {title}"
        used = tuple(dict.fromkeys(point.policy for point in points))
        pictures.append(Picture(title, draw(name, paint), used))
    return pictures


@dataclass(frozen=True)
class _Point:
    policy: str
    read_bytes: float
    found: Estimate


def _side_by_side(points: Sequence[_Point]) -> list[tuple[_Point, float]]:
    """Points by the bytes that they read, and their places on a logarithmic axis."""
    ordered = sorted(points, key=lambda point: point.read_bytes)
    span = max(1.0, ordered[-1].read_bytes) / max(1.0, ordered[0].read_bytes)
    crowds: list[list[_Point]] = []
    for point in ordered:
        # as far as two crowds may move towards each other: none passes another
        if crowds and point.read_bytes <= span**CROWD * crowds[-1][-1].read_bytes:
            crowds[-1].append(point)
        else:
            crowds.append([point])
    placed = []
    for crowd in crowds:
        step = min(BESIDE, CROWD / len(crowd))
        for number, point in enumerate(crowd):
            shift = span ** (step * (number - (len(crowd) - 1) / 2))
            placed.append((point, point.read_bytes * shift))
    return placed


def _comparable(cells: Sequence[Cell]) -> list[Cell]:
    """Cells of one length, of tasks that all variations have, so that means are comparable.

    Variations with less than half of the tasks of another are left out, so that few do not decide
    for many; then those with fewest, until all have a task in common.
    """
    shares = [c for c in cells if summary.is_share(c) and c.scores and c.treatment != NO_CONTEXT]
    tasks_of = {
        name: {cell.key.task for cell in shares if cell.name == name}
        for name in summary.names_in(shares, "name")
    }
    most = max(map(len, tasks_of.values()), default=0)
    names = [name for name in tasks_of if 2 * len(tasks_of[name]) >= most]
    names.sort(key=lambda name: len(tasks_of[name]))
    while names:
        tasks = set.intersection(*(tasks_of[name] for name in names))
        if tasks:
            return [cell for cell in shares if cell.name in names and cell.key.task in tasks]
        names.pop(0)
    return []


def _mean_points(cells: Sequence[Cell]) -> list[_Point]:
    """Every variation's mean, and the bytes that it reads."""
    cells = _comparable(cells)
    points = []
    for name in summary.names_in(cells, "name"):
        own = [cell for cell in cells if cell.name == name]
        found = summary.mean_over_tasks(own)
        reads = [cell.costs.bytes_read_per_token for cell in own if cell.costs]
        if found is not None and reads:
            points.append(_Point(own[0].key.policy, float(np.median(reads)), found))
    return points


def _line(axes: Axes, x: Sequence[float], found: Sequence[Estimate], style: Style) -> None:
    """Means with their intervals, joined."""
    y = [each.value for each in found]
    below = [max(0.0, each.value - each.low) for each in found]
    above = [max(0.0, each.high - each.value) for each in found]
    axes.errorbar(
        x,
        y,
        yerr=[below, above],
        color=style.colour,
        marker=style.marker,
        linestyle=style.dash,
        markersize=6,
        linewidth=1.6,
        elinewidth=1,
        capsize=2.5,
    )


def score_against_context(cells: Sequence[Cell], styles: Styles) -> list[Picture]:
    """Mean score over tasks against the length, for each variation, and one for other metrics."""
    if len(summary.contexts_in(cells)) < 2:
        return []
    pictures = []
    lengths = [summary.select(cells, context=each) for each in summary.contexts_in(cells)]
    shares = _of_the_same_tasks([_comparable(own) for own in lengths])
    if shares:
        tasks = {cell.key.task for cell in shares}
        shares += [
            cell
            for cell in cells
            if cell.treatment == NO_CONTEXT and cell.key.task in tasks and cell.scores
        ]
        pictures.append(_against_context("Mean score, %", shares, styles, (-3, 103)))
    others = {
        cell.metric.name
        for cell in cells
        if cell.metric and cell.estimate and not summary.is_share(cell)
    }
    for metric in sorted(others):
        own = [cell for cell in cells if cell.metric and cell.metric.name == metric]
        pictures.append(_against_context(metric, own, styles, None))
    return pictures


def _of_the_same_tasks(lengths: Sequence[Sequence[Cell]]) -> list[Cell]:
    """Cells of the tasks that are at every length, or all where there is none."""
    at_each = [{cell.key.task for cell in own} for own in lengths if own]
    tasks = set.intersection(*at_each) if at_each else set()
    return [cell for own in lengths for cell in own if not tasks or cell.key.task in tasks]


def _against_context(
    label: str, cells: Sequence[Cell], styles: Styles, limits: tuple[float, float] | None
) -> Picture:
    names = summary.names_in(cells, "name")

    def paint(axes: Axes) -> None:
        contexts = summary.contexts_in(cells)
        for name in names:
            own = [cell for cell in cells if cell.name == name]
            found = []
            for context in summary.contexts_in(own):
                here = summary.select(own, context=context)
                mean = summary.mean_over_tasks(here) if limits else here[0].estimate
                if mean is not None:
                    found.append((context, mean))
            _line(axes, [x for x, _ in found], [y for _, y in found], styles[own[0].key.policy])
        axes.set_xscale("log", base=2)
        axes.set_xticks(contexts, [short_tokens(context) for context in contexts])
        axes.set_xlabel("context, tokens")
        axes.set_ylabel(label)
        if limits:
            axes.set_ylim(*limits)

    return Picture(label, draw(f"{label} against context", paint), policies_in(cells))

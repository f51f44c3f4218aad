"""The pictures of a report, each from cells alone; those without data are left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from numpy.typing import NDArray

from nearfar.evaluation import summary
from nearfar.evaluation.harness.plan import NO_CONTEXT
from nearfar.evaluation.report.drawing import (
    INK,
    SEQUENTIAL,
    SIZE_INCHES,
    TIER_COLOURS,
    Style,
    draw,
)
from nearfar.evaluation.statistics import Estimate
from nearfar.evaluation.summary import Cell

MIB = 2**20
DEPTH_BINS = 10
# of an axis: points that read about as many bytes stand beside each other, and are not moved far
BESIDE, CROWD = 0.015, 0.08
HEAT_INCHES = (2.9, 3.0)
Styles = dict[str, Style]


@dataclass(frozen=True)
class Picture:
    """One SVG and the policies that are in it, for a legend beside it."""

    title: str
    svg: str
    policies: tuple[str, ...] = ()


def short_tokens(tokens: float) -> str:
    """A length for an axis: ``32K``."""
    return f"{tokens / 1024:g}K" if tokens >= 1024 else f"{tokens:g}"


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

    return Picture(label, draw(f"{label} against context", paint), _policies(cells))


def _policies(cells: Sequence[Cell]) -> tuple[str, ...]:
    return tuple(summary.names_in(cells, "policy"))


def needle_maps(cells: Sequence[Cell]) -> list[Picture]:
    """Share of facts found by depth and length, a map for each variation."""
    placed = [cell for cell in cells if cell.key.task == "needles" and cell.depths]
    contexts = summary.contexts_in(placed)
    pictures = []
    for name in summary.names_in(placed, "name"):
        grid = np.full((DEPTH_BINS, len(contexts)), np.nan)
        for cell in (cell for cell in placed if cell.name == name):
            column = contexts.index(cell.key.context_tokens)
            bins: dict[int, list[float]] = {}
            for where, depth in cell.depths.items():
                if where in cell.scores:
                    row = min(int(depth * DEPTH_BINS), DEPTH_BINS - 1)
                    bins.setdefault(row, []).append(cell.scores[where])
            for row, scores in bins.items():
                grid[row, column] = float(np.mean(scores))
        labels = [short_tokens(context) for context in contexts]
        pictures.append(Picture(name, _map(f"Needles, {name}", grid, labels)))
    return pictures


def _map(name: str, grid: NDArray[np.float64], labels: Sequence[str]) -> str:
    def paint(axes: Axes) -> None:
        axes.grid(False)
        axes.pcolormesh(grid, cmap=SEQUENTIAL, vmin=0, vmax=100, edgecolors="face", linewidth=0.2)
        for (row, column), value in np.ndenumerate(grid):
            if not np.isnan(value):
                ink = "white" if value < 55 else "black"
                axes.text(
                    column + 0.5, row + 0.5, f"{value:.0f}",
                    ha="center", va="center", color=ink, fontsize=8.5,
                )  # fmt: skip
        axes.set_xticks(np.arange(len(labels)) + 0.5, labels)
        step = 100 // DEPTH_BINS
        axes.set_yticks([0, 2.5, 5, 7.5, 10], ["0", "25", "50", "75", "100"])
        assert step * DEPTH_BINS == 100
        axes.invert_yaxis()
        axes.set_xlabel("context, tokens")
        axes.set_ylabel("depth, %")
        axes.tick_params(length=0)

    width = 1.1 + 0.62 * max(2, len(labels))
    return draw(name, paint, (width, HEAT_INCHES[1]))


def memory_by_tier(cells: Sequence[Cell]) -> list[Picture]:
    """Bytes of keys, values and index, near and far, at the longest context of each policy."""
    contexts = summary.contexts_in([cell for cell in cells if cell.costs])
    if not contexts:
        return []
    here = [c for c in summary.select(cells, context=contexts[-1]) if c.treatment != NO_CONTEXT]
    held = {
        name: (costs.near_bytes / MIB, costs.far_bytes / MIB, costs.index_bytes / MIB)
        for name, costs in summary.costs_by_name(here).items()
    }

    def paint(axes: Axes) -> None:
        names = list(held)
        places = np.arange(len(names))
        left = np.zeros(len(names))
        for tier, (label, colour) in enumerate(TIER_COLOURS.items()):
            width = np.array([held[name][tier] for name in names])
            axes.barh(places, width, left=left, color=colour, label=label, height=0.62)
            left += width
        for place, total in zip(places, left, strict=True):
            axes.annotate(
                f"{total:,.0f}", (float(total), float(place)), (4, 0),
                textcoords="offset points", va="center", color=INK, fontsize=9,
            )  # fmt: skip
        axes.set_yticks(places, names)
        axes.invert_yaxis()
        axes.margins(x=0.14)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("MiB")
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))

    title = f"{short_tokens(contexts[-1])} tokens" if contexts[-1] else "the document"
    size = (SIZE_INCHES[0], 0.9 + 0.34 * len(held))
    return [Picture(title, draw(f"Memory by tier, {title}", paint, size))]


def throughput(cells: Sequence[Cell], styles: Styles) -> list[Picture]:
    """Tokens a second against the batch, for each length."""
    pictures = []
    for context in summary.contexts_in(cells):
        timed = [c for c in summary.select(cells, context=context) if c.tokens_per_second]
        if not timed:
            continue

        def paint(axes: Axes, timed: list[Cell] = timed) -> None:
            batches = sorted({batch for cell in timed for batch in cell.tokens_per_second})
            for cell in timed:
                style = styles[cell.key.policy]
                axes.plot(
                    list(cell.tokens_per_second),
                    list(cell.tokens_per_second.values()),
                    color=style.colour,
                    marker=style.marker,
                    linestyle=style.dash,
                )
            axes.set_xscale("log", base=2)
            axes.set_xticks(batches, [str(batch) for batch in batches])
            axes.set_xlabel("sequences decoded together")
            axes.set_ylabel("tokens per second, all sequences")
            axes.set_ylim(bottom=0)

        title = f"{short_tokens(context)} tokens"
        svg = draw(f"Throughput, {title}", paint)
        pictures.append(Picture(title, svg, _policies(timed)))
    return pictures


def layer_errors(cells: Sequence[Cell], styles: Styles) -> list[Picture]:
    """Error of the attention output and recovered mass by layer, mean over heads and samples."""
    pictures = []
    for context in summary.contexts_in(cells):
        measured = [
            cell
            for cell in summary.select(cells, context=context)
            if cell.key.task == "distances" and cell.details
        ]
        for field, label in (("error", "relative error of attention"), ("mass", "recovered mass")):
            if not measured:
                continue

            def paint(axes: Axes, field: str = field, label: str = label) -> None:
                for cell in measured:  # noqa: B023  painted before the next one
                    style = styles[cell.key.policy]
                    layers = head_means(cell, field).mean(1)
                    axes.plot(layers, color=style.colour, linestyle=style.dash, linewidth=1.6)
                axes.set_xlabel("layer")
                axes.set_ylabel(label)
                axes.set_ylim(bottom=0)
                axes.xaxis.set_major_locator(MaxNLocator(integer=True))

            title = f"{label}, {short_tokens(context)} tokens"
            pictures.append(Picture(title, draw(title, paint), _policies(measured)))
    return pictures


def head_maps(cells: Sequence[Cell]) -> list[Picture]:
    """Error of every layer and head at the longest context, a map for each variation."""
    measured = [cell for cell in cells if cell.key.task == "distances" and cell.details]
    contexts = summary.contexts_in(measured)
    pictures = []
    for cell in summary.select(measured, context=contexts[-1]) if contexts else ():
        errors = head_means(cell, "error")
        if errors.max() < 0.01:  # exact
            continue

        def paint(axes: Axes, errors: NDArray[np.float64] = errors) -> None:
            axes.grid(False)
            # a pixel a head; as shapes these maps were most of a page
            edges = (0, errors.shape[0], 0, errors.shape[1])
            how: Any = {"origin": "lower", "aspect": "auto", "interpolation": "none"}
            axes.imshow(errors.T, cmap=SEQUENTIAL, vmin=0, vmax=1, extent=edges, **how)
            axes.set_xlabel("layer")
            axes.set_ylabel("head")
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
            axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
            axes.set_title(f"mean {errors.mean():.3f}")

        pictures.append(Picture(cell.name, draw(f"Heads, {cell.name}", paint, (3.4, 2.1))))
    return pictures


def head_means(cell: Cell, field: str) -> NDArray[np.float64]:
    """Means over samples [layers, Hq] of ``error`` or ``mass``."""
    means: NDArray[np.float64] = np.mean(
        [np.asarray(each[field], np.float64) for each in cell.details], axis=0
    )
    return means

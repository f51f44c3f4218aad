"""Where policies err, as pictures: by depth in the context, by layer, by layer and head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from nearfar.evaluation import summary
from nearfar.evaluation.report.drawing import SEQUENTIAL, draw
from nearfar.evaluation.report.pictures import Picture, Styles, policies_in, short_tokens
from nearfar.evaluation.summary import Cell

DEPTH_BINS = 10
HEAT_INCHES = (2.9, 3.0)


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
            pictures.append(Picture(title, draw(title, paint), policies_in(measured)))
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

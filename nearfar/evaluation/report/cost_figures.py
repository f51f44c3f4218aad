"""What policies cost, as pictures: memory of each tier, and tokens a second."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from nearfar.evaluation import summary
from nearfar.evaluation.harness.plan import NO_CONTEXT
from nearfar.evaluation.report.drawing import INK, SIZE_INCHES, TIER_COLOURS, draw
from nearfar.evaluation.report.pictures import MIB, Picture, Styles, policies_in, short_tokens
from nearfar.evaluation.summary import Cell


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
        pictures.append(Picture(title, svg, policies_in(timed)))
    return pictures

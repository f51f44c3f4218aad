"""How pictures are drawn: SVG by matplotlib, in colours that the page decides.

Colours are stand-ins that become CSS variables, so that one picture serves light and dark pages.
The palette is Okabe and Ito's, darkened or lightened for contrast with the page, and every policy
also has a marker and the dash of its treatment: no picture relies on colour alone.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nearfar.evaluation.harness.plan import BOUNDED, EXACT, NO_CONTEXT, ONCE, SELECTS
from nearfar.evaluation.report.compact import compact

SERIES_COLOURS = 8
INK, MUTED, GRID = "#f00010", "#f00011", "#f00012"
TIER_COLOURS = {"near": "#f00021", "far": "#f00022", "index": "#f00023"}
_VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--grid"} | {
    colour: f"--{tier}" for tier, colour in TIER_COLOURS.items()
}
SEQUENTIAL = "cividis"  # readable with every kind of colour vision, and in grey
MARKERS = {EXACT: "D", NO_CONTEXT: "X", SELECTS: "o", BOUNDED: "s", ONCE: "^"}
DASHES = {EXACT: "-", NO_CONTEXT: ":", SELECTS: "-", BOUNDED: "--", ONCE: ":"}
SIZE_INCHES = (4.8, 3.3)
_RC: dict[str, Any] = {
    "svg.fonttype": "none",
    "font.size": 10,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlecolor": INK,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "text.color": INK,
    "xtick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.color": MUTED,
    "ytick.labelcolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
}


@dataclass(frozen=True)
class Style:
    """How a policy looks in every picture."""

    colour: str  # a stand-in
    marker: str
    dash: str

    @property
    def css(self) -> str:
        """The colour as a page has it."""
        return f"var({variable(self.colour)})"


def series_colour(number: int) -> str:
    """The stand-in of the number-th policy."""
    return f"#f000{0x30 + number % SERIES_COLOURS:02x}"


def variable(colour: str) -> str:
    """The CSS variable of a stand-in."""
    return _VARIABLES.get(colour) or f"--c{int(colour[-2:], 16) - 0x30}"


def styles_for(policies: Sequence[tuple[str, str]]) -> dict[str, Style]:
    """Styles of (policy, treatment) in order; exact attention and no context are plain ink."""
    styles: dict[str, Style] = {}
    number = 0
    for policy, treatment in policies:
        plain = {EXACT: INK if not styles else MUTED, NO_CONTEXT: MUTED}
        colour = plain.get(treatment)
        if colour is None:
            colour, number = series_colour(number), number + 1
        styles[policy] = Style(colour, MARKERS.get(treatment, "o"), DASHES.get(treatment, "-"))
    return styles


def draw(
    name: str, paint: Callable[[Axes], None], size_inches: tuple[float, float] = SIZE_INCHES
) -> str:
    """An inline SVG that ``paint`` fills; ``name`` keeps its ids apart from others'."""
    settings: Any = _RC | {"svg.hashsalt": name}  # typed by its keys, which are the library's
    with mpl.rc_context(settings):
        figure = Figure(figsize=size_inches, layout="constrained")
        figure.patch.set_alpha(0)
        axes = figure.add_subplot()
        axes.patch.set_alpha(0)
        paint(axes)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return _inline(buffer.getvalue(), name)


def _inline(svg: str, name: str) -> str:
    """The part of an SVG file that a page needs."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"#f000[0-9a-f]{2}", lambda found: f"var({variable(found[0])})", svg)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'\bid="(?!m[0-9a-f]{10}|p[0-9a-f]{10})[^"]*"', "", svg)
    return compact(svg).replace("<svg", f'<svg role="img" aria-label="{name}"', 1)

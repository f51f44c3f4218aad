"""A report: one HTML page that holds its pictures and needs no network."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from nearfar.evaluation import summary
from nearfar.evaluation.harness.plan import BOUNDED, ONCE, QUERIES, SELECTS
from nearfar.evaluation.harness.results import Row
from nearfar.evaluation.report import cost_figures, figures, place_figures
from nearfar.evaluation.report.drawing import Style, styles_for
from nearfar.evaluation.report.pictures import Picture, Styles
from nearfar.evaluation.report.tables import (
    ScoreTable,
    cost_tables,
    distance_tables,
    relative_tables,
    score_tables,
)
from nearfar.evaluation.summary import Cell
from nearfar.output.place import Place, check_replaced, find_place, starts_with
from nearfar.output.whole import write_output

TEMPLATE = "page.html.jinja"
PAGE_KIND = "a page that nearfar made"
READING = (
    "A range under a score is the 95 % bootstrap interval of its mean; contexts are resampled "
    "whole where there are five or more. One sample has no range, and the range of equal "
    "scores has no width: read n.",
    "Policies that read a subset at each step, that are bounded through decode and that "
    "compress once after the prompt stand in tables of their own, each under exact attention.",
    "Prompts are read with exact attention under every policy. The last token of a prompt and "
    "every token of an answer go through the policy, in all layers: none is kept dense.",
    "First token: reading the context, taking it in under the policy, the question and one step. "
    "Reading is timed once and shared, so that a policy's own overlap with it is not credited.",
    "Bytes read per token are keys and values of one step in all layers, near and far. What an "
    "index reads to choose them is not in it.",
    "Peaks are of the whole process up to then; a policy that ran early cannot show a later one's.",
)
COMPARABLE = (
    "Means are over the tasks that all policies shown did. One that did less than half of what "
    "another did is left out."
)
MARKER_PATHS = {  # centred in 30 x 14
    "o": "M15 2.5a4.5 4.5 0 1 0 .01 0z",
    "s": "M11 3h8v8h-8z",
    "^": "M15 2l5 9h-10z",
    "D": "M15 1.5l5.5 5.5l-5.5 5.5l-5.5-5.5z",
    "X": "M11 3l2-1l2 3l2-3l2 1l-2.5 4l2.5 4l-2 1l-2-3l-2 3l-2-1l2.5-4z",
}
SHORT = {SELECTS: "reads a subset", BOUNDED: "bounded", ONCE: "compressed once"}
DASH_ARRAYS = {"-": "none", "--": "6 3", ":": "2 3"}


@dataclass(frozen=True)
class Section:
    """A heading and what is under it."""

    title: str
    note: str = ""
    tables: Sequence[ScoreTable] = ()
    pictures: Sequence[Picture] = ()
    legend: Sequence[dict[str, str]] = field(default_factory=list)
    small: bool = False


def page_place(path: str | Path, *, overwrite: bool = False, read: Iterable[Path] = ()) -> Place:
    """The path of a page; OutputNameError for another kind of file, or one in ``read``."""
    place = find_place(path, may_stream=True, new_folder=True)
    check_replaced(place, PAGE_KIND, _is_page, overwrite=overwrite, read=read)
    return place


def write_report(rows: Sequence[Row], path: str | Path, *, overwrite: bool = False) -> None:
    """Write the page of ``rows`` to ``path``, whole or not at all; its folder is made.

    A file that is there is replaced if it is such a page, or with ``overwrite``. Raises
    OutputNameError where ``path`` cannot be used, OutputError where writing fails.
    """
    place = page_place(path, overwrite=overwrite)
    page = render(rows).encode()
    place.path.parent.mkdir(parents=True, exist_ok=True)
    write_output(place, page)


def _is_page(path: Path) -> bool:
    return starts_with(path, b"<!doctype html>", b'<meta name="generator" content="nearfar ')


def render(rows: Sequence[Row]) -> str:
    """The page of ``rows``."""
    cells = summary.summarise(rows)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    return environment.get_template(TEMPLATE).render(
        title="Policies compared",
        version=version("nearfar"),
        facts=_facts(cells),
        relative=relative_tables(cells),
        sections=[each for each in _sections(cells) if each.tables or each.pictures],
        errors=_errors(cells),
        reading=READING,
        rows=f"{len(rows):,}",
    )


def _facts(cells: Sequence[Cell]) -> list[tuple[str, str]]:
    def values(name: str) -> str:
        return ", ".join(dict.fromkeys(str(getattr(cell.key, name)) for cell in cells))

    machines = dict.fromkeys(cost.machine for cell in cells for cost in cell.measured)
    budgets: dict[str, None] = {}
    for cell in cells:
        if cell.key.budget is not None:
            size = "" if cell.budget_bytes is None else f" ({cell.budget_bytes / 2**20:,.1f} MiB)"
            budgets[f"{cell.key.budget:g} keys per KV group{size}"] = None
    queries = dict.fromkeys(cell.key.query for cell in cells)
    return [
        ("model", values("model")),
        ("machine", "; ".join(machines)),
        ("types", f"{values('dtype')}, far memory {values('far_dtype')}"),
        ("near in every layer", f"{values('sinks')} sinks, window of {values('window')}"),
        ("budget of a step", ", ".join(budgets) or "none"),
        ("dense layers", "none"),
        ("questions", "; ".join(f"{name}: {QUERIES[name]}" for name in queries)),
        ("seed", values("seed")),
    ]


def _sections(cells: Sequence[Cell]) -> list[Section]:
    policies = {cell.key.policy: cell.treatment for cell in cells}
    styles = styles_for(list(policies.items()))
    sections = _score_sections(cells, styles)
    sections += _cost_sections(cells, styles)
    sections += _distance_sections(cells, styles)
    return [_with_legend(each, policies, styles) for each in sections]


def _with_legend(section: Section, policies: Mapping[str, str], styles: Styles) -> Section:
    """``section`` with the policies that its pictures show."""
    used = dict.fromkeys(policy for each in section.pictures for policy in each.policies)
    entries = [_legend_entry(name, policies[name], styles[name]) for name in used]
    return replace(section, legend=entries) if entries else section


def _score_sections(cells: Sequence[Cell], styles: Styles) -> list[Section]:
    return [
        Section(
            "Accuracy against bytes read",
            "Each point is a policy at a budget: the mean over tasks, and the keys and values that "
            f"one step reads. Up and to the left is better. {COMPARABLE}",
            pictures=figures.accuracy_against_bytes(cells, styles),
        ),
        Section(
            "Against context length",
            COMPARABLE,
            pictures=figures.score_against_context(cells, styles),
        ),
        *(
            Section(f"Scores: {treatment}", "", tables)
            for treatment, tables in score_tables(cells).items()
        ),
        Section(
            "Needles",
            "Share of planted facts found, in percent, by where they are in the context.",
            pictures=place_figures.needle_maps(cells),
            small=True,
        ),
    ]


def _cost_sections(cells: Sequence[Cell], styles: Styles) -> list[Section]:
    return [
        Section("Speed and memory", "Medians over samples.", cost_tables(cells)),
        _memory_section(cells),
        Section("Throughput", pictures=cost_figures.throughput(cells, styles)),
    ]


def _distance_sections(cells: Sequence[Cell], styles: Styles) -> list[Section]:
    return [
        Section(
            "Distance to exact attention",
            "The next token's distribution on the policy's own way through a text; error of the "
            "attention output and recovered softmax mass at exact attention's queries.",
            distance_tables(cells),
        ),
        Section("By layer", pictures=place_figures.layer_errors(cells, styles)),
        Section(
            "By layer and head",
            "Relative error of the attention output, 0 dark to 1 light.",
            pictures=place_figures.head_maps(cells),
            small=True,
        ),
    ]


def _memory_section(cells: Sequence[Cell]) -> Section:
    entries = [
        {
            "name": tier,
            "treatment": "",
            "css": f"var(--{tier})",
            "dashes": "none",
            "path": MARKER_PATHS["s"],
        }
        for tier in ("near", "far", "index")
    ]
    note = "Keys, values and index of one context. Weights are beside that, and the same for all."
    return Section("Memory by tier", note, (), cost_figures.memory_by_tier(cells), entries)


def _legend_entry(name: str, treatment: str, style: Style) -> dict[str, str]:
    return {
        "name": name,
        "treatment": SHORT.get(treatment, treatment),
        "css": style.css,
        "dashes": DASH_ARRAYS[style.dash],
        "path": MARKER_PATHS[style.marker],
    }


def _errors(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    return [
        {
            "name": cell.name,
            "task": cell.key.task,
            "tokens": f"{cell.key.context_tokens:,}",
            "why": why,
        }
        for cell in cells
        for why in cell.errors
    ]

"""Writes measured rows into the section of each policy in docs/policies.md.

    python docs/make_rows.py runs/cpu/results.jsonl runs/gpu/results.jsonl

The files are of `nearfar compare`, each of one machine; later ones win where two have the same row.
What is between the marks of a section is written anew, and marks that are missing are put at its
end. A policy that the files lack gets an empty place.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from nearfar.config import format_bytes
from nearfar.evaluation import summary
from nearfar.evaluation.harness.plan import EXACT, NO_CONTEXT
from nearfar.evaluation.harness.results import Row, read_rows
from nearfar.evaluation.report.place_figures import head_means
from nearfar.evaluation.summary import Cell
from nearfar.evaluation.tasks.registry import RULER_NAMES
from nearfar.policies.registry import policy_names

PAGE = Path(__file__).with_name("policies.md")
BUDGET = 1024  # keys, of all rows
LEGEND = "Measured rows"  # the section that says what they were measured on
START, END = "<!-- rows of docs/make_rows.py -->", "<!-- end of rows -->"
PLACE = re.compile(rf"\n*{START}.*?{END}\n*", re.DOTALL)
COLUMNS = (
    "policy", "on", "tokens", "RULER", "exact", "KL", "error", "read a token", "near", "far",
    "index", "ms a token",
)  # fmt: skip


def rows_by_device(paths: Iterable[Path]) -> dict[str, list[Row]]:
    """Rows of machines with and without a GPU, whose keys may be the same."""
    files: dict[str, list[Path]] = {"CPU": [], "GPU": []}
    for path in paths:
        costs = [row.cost for row in read_rows([path]) if row.cost is not None]
        files["GPU" if any(cost.peak_gpu_bytes for cost in costs) else "CPU"].append(path)
    return {device: read_rows(each) for device, each in files.items() if each}


def lines_by_policy(device: str, rows: Iterable[Row]) -> dict[str, list[str]]:
    """Lines of a table for each policy, the shortest context first."""
    cells = [
        cell
        for cell in summary.summarise(row for row in rows if row.key.budget in (None, BUDGET))
        if cell.treatment != NO_CONTEXT
    ]
    lines: dict[str, list[str]] = {}
    for context in summary.contexts_in(cells):
        here = summary.select(cells, context=context)
        exact = [cell for cell in here if cell.treatment == EXACT]
        for name in summary.names_in(here, "name"):
            own = [cell for cell in here if cell.name == name]
            shown = name.replace(f" · {BUDGET:,}", "")
            entries = [f"`{shown}`", device, f"{context:,}", *_scores(own, exact), *_costs(own)]
            policy = own[0].key.policy.partition(":")[0]
            lines.setdefault(policy, []).append("| " + " | ".join(entries) + " |")
    return lines


def _scores(own: Sequence[Cell], exact: Sequence[Cell]) -> list[str]:
    """RULER's mean and exact attention's over the same tasks, KL, error of attention."""
    ruler = {cell.key.task: cell for cell in own if cell.key.task in RULER_NAMES and cell.scores}
    first = {cell.key.task: cell for cell in reversed(exact) if cell.key.task in ruler}
    shown = []
    for cells in (ruler.values(), first.values()):
        mean = summary.mean_over_tasks(cells)
        shown.append("" if mean is None else f"{mean.value:.1f}")
    if ruler:
        shown[0] += f" (n {sum(len(cell.scores) for cell in ruler.values())})"
    for cell in own:
        if cell.key.task == "distances" and cell.estimate is not None:
            error = head_means(cell, "error").mean()
            return [*shown, f"{cell.estimate.value:.2g}", f"{error:.2g}"]
    return [*shown, "", ""]


def _costs(own: Sequence[Cell]) -> list[str]:
    """Bytes and time."""
    costs = summary.costs_over(own)
    if costs is None:
        return [""] * 5
    sizes = (costs.bytes_read_per_token, costs.near_bytes, costs.far_bytes, costs.index_bytes)
    step = f"{costs.step_ms[1]:.1f}" if costs.step_ms is not None else ""
    return [*(format_bytes(each) for each in sizes), step]


def legend(devices: dict[str, list[Row]]) -> list[str]:
    """What the rows of each kind of machine were measured on."""
    lines = []
    for device, rows in devices.items():
        machines = dict.fromkeys(row.cost.machine for row in rows if row.cost is not None)
        keys = [row.key for row in rows]
        models = dict.fromkeys(f"{key.model} in {key.dtype}, question {key.query}" for key in keys)
        lines.append(f"- {device}: {'; '.join(machines)}. {'; '.join(models)}.")
    return lines


def render(page: str, devices: dict[str, list[Row]]) -> str:
    """``page`` with the rows of every policy in its section."""
    found: dict[str, list[str]] = {}
    for device, rows in devices.items():
        for policy, lines in lines_by_policy(device, rows).items():
            found.setdefault(policy, []).extend(lines)
    head = ["| " + " | ".join(COLUMNS) + " |", "| --- " * len(COLUMNS) + "|"]
    opening, *sections = re.split(r"^(?=## )", page, flags=re.MULTILINE)
    made = [opening]
    for section in sections:
        name = section.split("\n", 1)[0].removeprefix("## ")
        if name == LEGEND or name in policy_names():
            lines = legend(devices) if name == LEGEND else found.get(name, [])
            table = head if name in found else []
            place = "\n".join([START, *(["", *table, *lines, ""] if lines else []), END])
            section = f"{PLACE.sub('', section).rstrip()}\n\n{place}\n\n"
        made.append(section)
    return "".join(made).rstrip() + "\n"


if __name__ == "__main__":
    devices = rows_by_device(Path(name) for name in sys.argv[1:])
    PAGE.write_text(render(PAGE.read_text(encoding="utf-8"), devices), encoding="utf-8")

"""Rows of results in the sections of docs/policies.md."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import ModuleType

import pytest
from docs_scripts import docs_script
from sample_rows import MACHINE, many_rows, row

from nearfar.evaluation.harness.results import Row

PAGE = (
    "# Policies\n\n## Measured rows\n\nColumns.\n\n## full\n\nAll.\n\n"
    "## What else\n\nText.\n\n## sketch\n\nSome.\n"
)


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    return docs_script("make_rows")


def write(path: Path, rows: list[Row]) -> Path:
    path.write_text("".join(row.to_json() + "\n" for row in rows))
    return path


def on_gpu(rows: list[Row]) -> list[Row]:
    found = []
    for each in rows:
        assert each.cost is not None
        cost = dataclasses.replace(
            each.cost, machine=f"A GPU, {MACHINE}", peak_gpu_bytes=2**30, step_ms=(1.0, 2.5, 3.0)
        )
        found.append(dataclasses.replace(each, cost=cost))
    return found


def entries(page: str, policy: str) -> list[list[str]]:
    """Entries of the lines of a policy's table."""
    section = page.split(f"\n## {policy}\n")[1].split("\n## ")[0]
    lines = [line for line in section.split("\n") if line.startswith(f"| `{policy}")]
    return [[entry.strip() for entry in line.strip("|").split("|")] for line in lines]


def test_a_row_for_each_context_and_kind_of_machine(maker: ModuleType, tmp_path: Path) -> None:
    rows = many_rows(samples=2)
    files = [write(tmp_path / "a", rows), write(tmp_path / "b", on_gpu(rows))]
    page = maker.render(PAGE, maker.rows_by_device(files))
    found = entries(page, "sketch")
    places = [(device, n) for device in ("CPU", "GPU") for n in ("4,096", "32,768", "131,072")]
    assert [(each[1], each[2]) for each in found] == places
    assert [each[-1] for each in found] == ["10.0"] * 3 + ["2.5"] * 3
    for each in found:
        assert "" not in each
        assert each[0] == "`sketch`"
    legend = page.split("\n## full\n")[0]
    assert (
        f"- CPU: {MACHINE}. m in bfloat16, question agnostic.\n- GPU: A GPU, {MACHINE}." in legend
    )
    assert "\n## What else\n\nText.\n\n## sketch\n" in page  # no policy, no place


def test_what_the_entries_are(maker: ModuleType, tmp_path: Path) -> None:
    heads = [[0.1, 0.3], [0.2, 0.2]]
    rows = [
        row("vt", "full", 100.0),
        row("vt", "sketch", 50.0),
        row("vt", "sketch", 0.0, budget=64),
        row("niah_single_1", "full", 80.0),
        row("niah_single_1", "sketch", 60.0),
        row("cwe", "full", 10.0),
        row("needles", "sketch", 0.0),
        row("distances", "sketch", 0.125, details={"error": heads, "mass": heads}),
    ]
    page = maker.render(PAGE, maker.rows_by_device([write(tmp_path / "a", rows)]))
    [found] = entries(page, "sketch")
    # means over vt and niah_single_1 alone; near and 22 MiB of far are read
    assert found[3:9] == ["55.0 (n 2)", "90.0", "0.12", "0.2", "24.0 MiB", "2.0 MiB"]
    assert found[9:] == ["89.8 MiB", "12.5 MiB", "10.0"]
    assert entries(page, "full")[0][3:5] == ["63.3 (n 3)", "63.3"]


def test_writing_twice_changes_nothing_and_later_files_win(
    maker: ModuleType, tmp_path: Path
) -> None:
    old, new = [row("vt", "sketch", 0.0)], [row("vt", "sketch", 100.0)]
    files = [write(tmp_path / "a", old), write(tmp_path / "b", new)]
    once = maker.render(PAGE, maker.rows_by_device(files))
    assert entries(once, "sketch")[0][3] == "100.0 (n 1)"
    assert maker.render(once, maker.rows_by_device(files)) == once
    emptied = maker.render(once, {})
    assert entries(emptied, "sketch") == []
    assert maker.render(emptied, maker.rows_by_device(files)) == once


def test_variants_and_failures_have_rows(maker: ModuleType, tmp_path: Path) -> None:
    rows = [
        row("vt", "full", 100.0),
        row("vt", "sketch:bits=2", 100.0),
        row("vt", "sketch", error="It does not fit."),
    ]
    page = maker.render(PAGE, maker.rows_by_device([write(tmp_path / "a", rows)]))
    found = entries(page, "sketch")
    assert [each[0] for each in found] == ["`sketch:bits=2`", "`sketch`"]
    assert found[1][3:] == [""] * 9


def test_the_page_has_a_place_for_every_policy(maker: ModuleType) -> None:
    page = maker.PAGE.read_text(encoding="utf-8")
    for name in maker.policy_names():
        assert maker.START in page.split(f"\n## {name}\n")[1].split("\n## ")[0]

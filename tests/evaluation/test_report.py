from __future__ import annotations

import itertools
import math
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sample_rows import many_rows, row

from nearfar.errors import OutputError
from nearfar.evaluation import summary
from nearfar.evaluation.harness.plan import BOUNDED, EXACT, NO_CONTEXT, ONCE, SELECTS
from nearfar.evaluation.report import drawing, figures, place_figures
from nearfar.evaluation.report.page import render, write_report
from nearfar.evaluation.report.tables import cost_tables, relative_tables, score_tables
from nearfar.evaluation.statistics import Estimate

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
browser = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium is installed (Debian: apt-get install chromium)"
)
HEADINGS = (
    "Beside exact attention",
    "Accuracy against bytes read",
    "Against context length",
    "Scores: reads a subset at each step, keeps all",
    "Scores: bounded through decode",
    "Needles",
    "Speed and memory",
    "Memory by tier",
    "Throughput",
    "Distance to exact attention",
    "By layer",
    "By layer and head",
    "What failed",
)


@pytest.fixture(scope="module")
def page() -> str:
    failed = row("niah_single_3", "h2o", error="Near <memory> is full & more.")
    return render([*many_rows(samples=3), failed])


class Tags(HTMLParser):
    """Counts tags, and what a page would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.count: dict[str, int] = {}
        self.fetched: list[str] = []
        self.ids: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.count[tag] = self.count.get(tag, 0) + 1
        if tag not in ("meta", "br", "img", "link"):
            self.open.append(tag)
        self._look(attrs)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.count[tag] = self.count.get(tag, 0) + 1
        self._look(attrs)

    def _look(self, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            inside = ("#", "data:image/png;")  # of the page
            if name in ("src", "href", "xlink:href") and value and not value.startswith(inside):
                self.fetched.append(value)
            if name == "id" and value:
                self.ids.append(value)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_one_page_holds_everything_and_fetches_nothing(page: str) -> None:
    tags = Tags(page)
    assert tags.open == []
    assert tags.fetched == []
    assert "url(http" not in page
    assert "@import" not in page
    assert tags.count["figure"] > 20
    assert len(tags.ids) == len(set(tags.ids))  # pictures do not take each other's parts
    headings = re.findall(r"<h2>(.*?)</h2>", page)
    assert [each for each in headings if each != "How to read this"] == list(HEADINGS)
    assert "Near &lt;memory&gt; is full &amp; more." in page
    assert "f000" not in page  # every stand-in of a colour became a variable
    assert len(page) < 1_500_000


def test_what_keeps_a_comparison_fair_is_stated(page: str) -> None:
    for text in (
        "4 sinks, window of 64",
        "1024 keys per KV group (22.5 MiB)",
        "<dt>dense layers</dt><dd>none</dd>",
        "agnostic: questions come after the context was read and compressed",
        "95 % bootstrap interval",
        "<dt>seed</dt><dd>0</dd>",
    ):
        assert text in page


def test_treatments_never_share_a_table_and_exact_attention_leads_each() -> None:
    rows = many_rows(("full", "sketch", "h2o", "full-far"), samples=2)
    rows += [row("niah_single_1", NO_CONTEXT, 0.0)]
    cells = summary.summarise(rows)
    by_name = {cell.name: cell.treatment for cell in cells}
    found = score_tables(cells)
    assert list(found) == [SELECTS, BOUNDED]
    tables = [table for each in found.values() for table in each]
    tables += cost_tables(cells) + relative_tables(cells)
    for table in tables:
        treatments = [by_name[line.name] for line in table.rows]
        assert treatments[0] == EXACT
        assert len(set(treatments) - {EXACT, NO_CONTEXT}) == 1


def test_a_page_of_exact_attention_alone_and_of_one_row() -> None:
    assert "Scores: exact" in render(many_rows(("full",), contexts=(4096,), samples=2))
    assert "Policies compared" in render([row()])
    assert "What failed" in render([row(error="No.")])


def test_needles_are_placed_by_depth_and_length() -> None:
    rows = []
    for context in (1024, 2048):
        for i in range(10):
            score = 100.0 * (context == 1024 or i >= 5)
            where: dict[str, Any] = {"question": i, "context_tokens": context}
            rows.append(row("needles", score=score, depth=(i + 0.5) / 10, **where))
    [picture] = place_figures.needle_maps(summary.summarise(rows))
    shown = re.findall(r">(100|0)</text>", picture.svg)
    assert Counter(shown) == {"100": 15 + 1, "0": 5 + 1}  # and the axis


def test_lines_over_lengths_are_of_the_same_tasks() -> None:
    rows = [row(task, "h2o", context_tokens=4096) for task in ("vt", "cwe")]
    rows += [row("vt", "h2o", context_tokens=8192), row("fwe", "h2o", context_tokens=8192)]
    cells = summary.summarise(rows)
    lengths = [summary.select(cells, context=each) for each in (4096, 8192)]
    found = figures._of_the_same_tasks(lengths)
    assert [(cell.key.task, cell.key.context_tokens) for cell in found] == [
        ("vt", 4096),
        ("vt", 8192),
    ]
    assert figures._of_the_same_tasks([lengths[0], []]) == lengths[0]
    assert figures._of_the_same_tasks([]) == []


def test_means_in_pictures_are_over_tasks_that_all_did() -> None:
    tasks = ("niah_single_1", "niah_single_2", "niah_single_3", "vt")
    rows = [row(task, policy, 50.0) for task in tasks for policy in ("full", "h2o")]
    rows += [row(task, "sketch", 100.0) for task in tasks[:2]]  # half of them decide
    rows += [row("vt", "lsh-tables", 0.0)]  # a quarter does not
    cells = summary.summarise(rows)
    styles = drawing.styles_for([(cell.key.policy, cell.treatment) for cell in cells])
    found = figures.accuracy_against_bytes(cells, styles)
    assert [set(picture.policies) for picture in found] == [{"full", "h2o", "sketch"}]
    assert {cell.key.task for cell in figures._comparable(cells)} == set(tasks[:2])
    alone = summary.summarise([row("vt", "sketch"), row("cwe", "h2o")])
    assert [cell.name for cell in figures._comparable(alone)] == ["h2o · 1,024"]


def test_points_of_equal_bytes_stand_side_by_side_near_their_place() -> None:
    found = Estimate(50.0, 40.0, 60.0, 9)
    crowd = [figures._Point(f"p{i}", 25e6 + i, found) for i in range(20)]
    far = figures._Point("full", 700e6, found)
    placed = figures._side_by_side([far, *crowd])
    assert [point for point, _ in placed] == [*crowd, far]
    at = [x for _, x in placed]
    assert all(a < b for a, b in itertools.pairwise(at))
    assert at[-1] == 700e6  # nothing is beside it
    assert all(abs(math.log(x / 25e6)) < 0.05 * math.log(700 / 25) for x in at[:-1])
    assert [x for _, x in figures._side_by_side([far])] == [700e6]
    nothing = figures._Point("none", 0.0, found)
    assert [x for _, x in figures._side_by_side([nothing, nothing])] == [0.0, 0.0]


@pytest.mark.parametrize("most", [40e6, 300e6, 3000e6])
@pytest.mark.parametrize("ratio", [1.05, 1.15, 1.3, 1.5])
def test_what_reads_more_stands_farther_right(ratio: float, most: float) -> None:
    found = Estimate(50.0, 40.0, 60.0, 9)
    reads = [25e6 * ratio ** (i // 8) for i in range(16)] + [most]
    points = [figures._Point(f"p{i}", each, found) for i, each in enumerate(reads)]
    at = [x for _, x in figures._side_by_side(points)]
    assert all(a < b for a, b in itertools.pairwise(at))


def test_machines_are_named_once() -> None:
    cost = row("vt").cost
    assert cost is not None
    costs = [replace(cost, machine=name) for name in ("A", "B")]
    rows = [replace(row("vt", case=i), cost=each) for i, each in enumerate([*costs, costs[0]])]
    assert "<dd>A; B</dd>" in render(rows)


def test_times_that_were_not_measured_are_not_shown() -> None:
    timed, other = row("vt"), row("vt", case=1)
    assert timed.cost is not None
    none = replace(timed.cost, read_seconds=0.0, first_token_seconds=0.0, step_ms=None)
    [both] = summary.summarise([timed, replace(other, cost=none)])
    [alone] = summary.summarise([timed])
    assert both.costs is not None
    assert alone.costs is not None
    assert both.costs.first_token_seconds == alone.costs.first_token_seconds > 0
    assert both.costs.question_seconds == alone.costs.question_seconds
    page = render([row("vt", "full"), replace(other, cost=none)])
    assert ">0 ms<" not in page
    assert page.count(">500 ms<") == 1  # of `full`


def test_styles_differ_by_more_than_colour() -> None:
    styles = drawing.styles_for(
        [("full", EXACT), ("a", SELECTS), ("b", BOUNDED), ("c", ONCE), ("d", SELECTS)]
    )
    assert len({style.marker for style in styles.values()}) == 4
    assert len({style.colour for style in styles.values()}) == 5
    assert styles["full"].css == "var(--ink)"
    assert styles["a"].css == "var(--c0)"


def test_the_same_rows_make_the_same_page(page: str) -> None:
    failed = row("niah_single_3", "h2o", error="Near <memory> is full & more.")
    assert render([*many_rows(samples=3), failed]) == page


def test_a_report_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "new" / "report.html"
    write_report([row()], path)
    before = path.read_text()

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OutputError, match="disk full"):
        write_report([row(), row("vt")], path)
    assert path.read_text() == before
    assert list(path.parent.iterdir()) == [path]


def shoot(path: Path, width: int, *, dark: bool) -> np.ndarray:
    """A picture [height, width, 3] of the page as a browser shows it."""
    assert CHROMIUM is not None
    shot = path.with_suffix(".png")
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", scheme]
    options += [f"--window-size={width},4000", f"--screenshot={shot}"]
    done = subprocess.run(
        [CHROMIUM, *options, path.as_uri()], capture_output=True, text=True, timeout=120
    )
    assert shot.exists(), done.stderr
    return np.asarray(Image.open(shot).convert("RGB"))


@browser
@pytest.mark.slow
def test_a_browser_shows_it_light_and_dark_wide_and_narrow(page: str, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text(page)
    light, dark = (shoot(path, 1280, dark=dark) for dark in (False, True))
    assert light.shape == dark.shape == (4000, 1280, 3)
    assert light[0, 0].min() > 240 > 40 > dark[0, 0].max()  # the page's own colours
    for picture in (light, dark):
        colours = {tuple(pixel) for pixel in picture[::7, ::7].reshape(-1, 3)}
        assert len(colours) > 100  # text, lines and maps, not a blank page
    # the blue of the first policy is in both, as the page's scheme has it
    assert near(light, (0x00, 0x72, 0xB2)) > 50
    assert near(dark, (0x56, 0xB4, 0xE9)) > 50
    narrow = shoot(path, 500, dark=False)
    assert narrow.shape == (4000, 500, 3)
    assert (narrow[:, -8:].min(2) > 240).mean() > 0.99  # nothing reaches over the right edge


def near(picture: np.ndarray, colour: tuple[int, int, int]) -> int:
    """Pixels that are nearly of ``colour``."""
    return int((np.abs(picture.astype(int) - colour).max(2) < 8).sum())


@browser
@pytest.mark.slow
def test_a_browser_finds_no_fault(page: str, tmp_path: Path) -> None:
    """The document that Chromium made of the page has every picture, and all of its text."""
    assert CHROMIUM is not None
    path = tmp_path / "report.html"
    path.write_text(page)
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", "--enable-logging"]
    done = subprocess.run(
        [CHROMIUM, *options, "--log-level=0", path.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "CONSOLE" not in done.stderr
    assert done.stdout.count("<svg") == page.count("<svg")
    assert done.stdout.count("</figure>") == page.count("</figure>")
    assert "How to read this" in done.stdout

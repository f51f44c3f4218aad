"""Pictures of a page are small, and show what they showed."""

from __future__ import annotations

import gzip
import re
from pathlib import Path

import pytest
from matplotlib.axes import Axes

from nearfar.errors import DocumentError
from nearfar.evaluation.harness.results import read_rows
from nearfar.evaluation.report.compact import compact
from nearfar.evaluation.report.drawing import draw


def test_numbers_styles_and_groups_are_said_once() -> None:
    style = "font-size: 10px; font-family: 'DejaVu Sans', sans-serif; fill: red"
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" version="1.1"><defs><style>*{}</style></defs>\n'
        f' <g >\n  <g>\n   <text style="{style}" x="1.234567" y="2">8K</text>\n'
        f'   <text style="{style}" transform="rotate(-0 5.5 5)">a 1.5 b</text>\n  </g>\n </g>\n'
        '<path d="M 0.000001 3.999999 \nL 5 10.25 \n" style="fill: none"/></svg>'
    )
    small = compact(svg)
    (name,) = set(re.findall(r'class="(\w+)"', small))
    assert small == (
        f"<svg><defs><style>*{{}}.{name}{{font-size: 10px; fill: red}}</style></defs>"
        f'<text class="{name}" x="1.23" y="2">8K</text><text class="{name}">a 1.5 b</text>'
        '<path d="M 0 4 L 5 10.25" style="fill: none"/></svg>'
    )


def test_a_drawn_picture_keeps_its_labels_and_ids() -> None:
    def paint(axes: Axes) -> None:
        axes.plot([1.0, 2.0], [3.0, 4.0], marker="o")
        axes.set_xlabel("tokens of a context")

    svg = draw("A picture", paint)
    assert "tokens of a context" in svg
    assert "font-family" not in svg
    ids = set(re.findall(r'\bid="(\w+)"', svg))
    assert ids >= set(re.findall(r'href="#(\w+)"', svg)) | set(re.findall(r"url\(#(\w+)\)", svg))
    assert max(len(digits) for digits in re.findall(r"\.(\d+)", svg)) <= 2


def test_compressed_rows_are_read_and_damaged_ones_refused(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl.gz"
    path.write_bytes(gzip.compress(b""))
    assert read_rows([path]) == []
    path.write_bytes(gzip.compress(b"{}\n")[:-9])
    with pytest.raises(DocumentError, match=r"results\.jsonl\.gz cannot be read as results: "):
        read_rows([path])

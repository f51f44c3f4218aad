"""What the pictures of a report have in common: a title, an SVG, policies, lengths on an axis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nearfar.evaluation import summary
from nearfar.evaluation.report.drawing import Style
from nearfar.evaluation.summary import Cell

MIB = 2**20
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


def policies_in(cells: Sequence[Cell]) -> tuple[str, ...]:
    """For a legend."""
    return tuple(summary.names_in(cells, "policy"))

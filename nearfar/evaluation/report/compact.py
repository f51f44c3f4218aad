"""Shrinks an inline SVG to a third: removes what a page does not need, and repetitions.

Matplotlib writes six decimals, a style in every element and a list of fonts with every label. In a
page of a hundred pictures that is most of the file. The picture stays the same to a hundredth of a
point; labels take the page's font.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter

_STYLE = re.compile(r' style="([^"]*)"')
_GROUP = re.compile(r"<g>((?:(?!<g[ >]).)*?)</g>")  # a group without attributes
_NUMBER = re.compile(r"\d+\.\d{3,}")


def compact(svg: str) -> str:
    """``svg``, an element of an HTML page, with fewer bytes."""
    svg = re.sub(r" xmlns(:xlink)?=\"[^\"]*\"| version=\"[^\"]*\"", "", svg)
    svg = svg.replace("xlink:href", "href")
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)
    svg = re.sub(r' transform="rotate\(-?0 [^"]*\)"', "", svg)
    svg = _NUMBER.sub(_rounded, svg)
    svg = re.sub(r"\s*\n\s*", " ", svg)
    svg = re.sub(r"\s+(?=/?>)|(?<=>) (?=<)|(?<=\") (?=\")", "", svg)
    while (flat := _GROUP.sub(r"\1", svg)) != svg:
        svg = flat
    return _with_classes(re.sub(r"(?<=\bd=\")([^\"]*?) (?=\")", r"\1", svg))


def _rounded(found: re.Match[str]) -> str:
    return f"{float(found[0]):.2f}".rstrip("0").rstrip(".")


def _with_classes(svg: str) -> str:
    """Styles of several elements become classes, named by their content."""
    counts = Counter(_STYLE.findall(svg))
    names = {
        style: "s" + hashlib.sha256(style.encode()).hexdigest()[:6]
        for style, count in counts.items()
        if count > 1
    }
    rules = "".join(f".{name}{{{style}}}" for style, name in names.items())

    def named(found: re.Match[str]) -> str:
        name = names.get(found[1])
        return found[0] if name is None else f' class="{name}"'

    return _STYLE.sub(named, svg).replace("</style>", f"{rules}</style>", 1)

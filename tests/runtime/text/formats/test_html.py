from __future__ import annotations

import sys
from collections.abc import Callable

import pytest

from nearfar.runtime.text.formats.html_text import html_text


def text(markup: str, is_xml: bool = False) -> str:
    found, notes = html_text(markup, is_xml)
    assert notes == []
    return found


def lines_run(act: Callable[[], object]) -> int:
    """How many lines of Python `act` runs: time without a clock."""
    count = 0

    def trace(frame: object, event: str, _argument: object) -> object:
        nonlocal count
        count += event == "line"
        return trace

    sys.settrace(trace)  # type: ignore[arg-type]
    try:
        act()
    finally:
        sys.settrace(None)
    return count


@pytest.mark.parametrize(
    "unit",
    [
        "<li>item ", "<p>x", "<font>y ", "<pre>a", "<a ", "<a b='x", '<a b="', "<", "<!", "<!-- x",
        "</", "</a ", "&", "&#1", "<script>", "<title>", "<template>", "<table><tr><td>1", "<div>",
        "</div>", "<?", "<![CDATA[", "<a =x=",
    ],
)  # fmt: skip
def test_work_grows_with_length_whatever_is_unclosed(unit: str) -> None:
    short, long = (lines_run(lambda n=n: html_text(unit * n)) for n in (200, 1600))  # type: ignore[misc]
    assert long < 9 * short


@pytest.mark.parametrize("unit", ["<a b='x", '<a b="', "<a ", "<!-", "<title>", "<script>"])
def test_a_megabyte_of_what_is_unclosed(unit: str) -> None:
    html_text(unit * (2**20 // len(unit)))  # regular expressions that go back would take hours


def test_what_is_not_closed_is_read() -> None:
    assert text("<ul><li>a<li>b<p>c<p>d<b>e") == "a\nb\n\nc\n\nde"
    assert text("a < b and </ > c <3 d") == "a < b and c <3 d"
    assert text("<div>" * 5000 + "deep") == "deep"


def test_white_space_between_inline_tags_is_one_space() -> None:
    assert text("a <b> b</b>\n<i>c</i>&nbsp; d") == "a b c d"
    assert text("<p> a </p> <p> b") == "a\n\nb"


def test_preformatted_text_keeps_its_own() -> None:
    assert text("<pre>\n x\n\ty</pre>  z") == "x\n\ty\nz"
    assert text("<textarea>a\n  b &lt;i></textarea>") == "a\n  b <i>"
    assert text("<xmp><b>&amp;</xmp>") == "<b>&amp;"


def test_character_references() -> None:
    assert text("&lt;p&gt; &amp;amp; &eacute; &#233; &#xe9; &copy 5&euro;") == (
        "<p> &amp; é é é © 5€"
    )
    assert text("&#0; &#xD800; &#x110000; &#" + "9" * 5000 + "; &#x80;") == (
        "\ufffd \ufffd \ufffd \ufffd €"
    )
    assert text("&#000000065; &zzz; &notit;") == "A &zzz; ¬it;"


def test_what_is_not_shown() -> None:
    hidden = (
        "<!-- <p> --><script>'</p>' <!-- </script><style>p{}</style><template>a<template>b"
        "</template>c</template><noscript>d</noscript><iframe>e</iframe><!DOCTYPE html><?php ?>"
    )
    assert text(f"one {hidden}two<!-->three<!--->four<!--x--!>") == "one twothreefour"


def test_attributes_are_not_text() -> None:
    assert text("""<a title="x > y" alt='<b>' c=d>e</a><br/>f<i data-x=">">g""") == "e\nfg"
    assert text("<a title='" + "x" * 100_000 + "'>b") == "b"


def test_a_quote_that_is_never_closed_ends_with_its_tag() -> None:
    assert text('<a href="x>b</a> c') == "b c"


def test_tables() -> None:
    rows = "<table><thead><tr><th>a<th>b<tbody><tr><td>1<td>2<tr><td> <td>4</table>"
    assert text(rows) == "a b\n\n1 2\n4"


def test_xhtml_closes_empty_elements() -> None:
    page = '<title/><script src="x"/><pre/><p>a  b<![CDATA[<c> ]]></p><template/>d'
    assert text(page, is_xml=True) == "a b<c>\nd"


@pytest.mark.parametrize(
    ("rest", "what", "start"),
    [
        ("<!-- b", "a comment", 1),
        ("<b title", "a tag", 1),
        ("<script>b", "<script>", 9),
        ("<template>b", "<template>", 11),
        ("<!x", "a declaration", 1),
    ],
)
def test_an_end_that_a_browser_does_not_show_is_noted(rest: str, what: str, start: int) -> None:
    assert html_text("a" + rest) == (
        "a",
        [
            f"ends inside {what} that begins at character {start} and is never closed; as in a "
            "browser, what follows it is not read"
        ],
    )


def test_an_unclosed_title_is_read() -> None:
    assert text("a<title>b <i>") == "a\nb <i>"


def test_progress_counts_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nearfar.runtime.text.formats.html_text._BETWEEN_REPORTS", 1000)
    told: list[tuple[int, int]] = []
    markup = "<p>abc" * 400
    html_text(markup, progress=lambda *at: told.append(at))
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert len(told) == 2
    assert told[0][1] == len(markup)

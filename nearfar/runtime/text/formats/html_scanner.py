"""Tags and words of an HTML page, one after another, in time proportional to its length.

This is the tokenizer of the HTML standard (https://html.spec.whatwg.org, section 13.2.5) as far as
text depends on it. There is no tree, so unclosed tags cost nothing. Regular expressions never
backtrack (`*+`). The standard library's parser takes quadratic time on unclosed tags and comments
in most versions of Python.
"""

from __future__ import annotations

import html
import re
from collections.abc import Generator, Iterator
from typing import NamedTuple

_BLANK = r"[\t\n\f\r ]"
_VALUE = r"""(?:"[^"]*+"|'[^']*+'|(?!["'])[^\t\n\f\r >]*+)"""
_ATTRIBUTE = rf"[^\t\n\f\r />][^\t\n\f\r />=]*+(?:{_BLANK}*+={_BLANK}*+{_VALUE})?+"
_TAG = re.compile(rf"<(/?)([a-zA-Z][^\t\n\f\r />]*+)((?:[\t\n\f\r /]++|{_ATTRIBUTE})*+)>")
_TAG_START = re.compile(r"</?[a-zA-Z]")
_NAMED_VALUE = re.compile(
    rf"([^\t\n\f\r />][^\t\n\f\r />=]*+)(?:{_BLANK}*+={_BLANK}*+({_VALUE}))?+"
)
_COMMENT_END = re.compile(r"--!?>")
_LONG_NUMBER = re.compile(r"&#0*+[1-9][0-9]{7,}+;?")  # beyond Unicode, and beyond int()
_ESCAPABLE = frozenset({"textarea", "title"})  # raw text in which character references count
_RAW = frozenset(
    {"iframe", "noembed", "noframes", "noscript", "script", "style", "xmp"} | _ESCAPABLE
)
_ENDS = {name: re.compile(rf"</{name}(?=[\t\n\f\r />])", re.IGNORECASE) for name in _RAW}
_CDATA = "<![CDATA["


class Tag(NamedTuple):
    """A start tag or, where it ``closes``, an end tag."""

    name: str  # in lower case
    source: str  # of its attributes
    closes: bool
    stop: int  # the character behind it

    @property
    def attributes(self) -> dict[str, str]:
        """Values by name in lower case, the first of each name; character references stay."""
        found: dict[str, str] = {}
        for match in _NAMED_VALUE.finditer(self.source):
            value = match[2] or ""
            quoted = value[:1] in ("'", '"')
            found.setdefault(match[1].lower(), value[1:-1] if quoted else value)
        return found


class Words(NamedTuple):
    """Characters between tags, references resolved; ``inside`` is the raw text element, if any."""

    text: str
    inside: str = ""


class Unclosed(NamedTuple):
    """The page ends in something that hides the rest of it, from character ``start`` on."""

    what: str
    start: int


Token = Tag | Words | Unclosed


def scan(markup: str, is_xml: bool = False) -> Iterator[Token]:
    """The page's tags and words. ``is_xml``: `<a/>` closes itself and CDATA sections are text."""
    position, end = 0, len(markup)
    while position < end:
        start = markup.find("<", position)
        if start < 0:
            start = end
        if start > position:
            yield Words(resolved(markup[position:start]))
        if start == end:
            return
        if not _TAG_START.match(markup, start):
            position = yield from _declaration(markup, start, is_xml)
            continue
        token = _tag(markup, start)
        yield token
        if isinstance(token, Unclosed):
            return
        position = token.stop
        if is_xml and not token.closes and token.source.endswith("/"):
            yield token._replace(closes=True)
        elif not token.closes:
            position = yield from _raw_text(markup, token)


def resolved(text: str) -> str:
    """``text`` with characters for character references."""
    if "&" not in text:
        return text
    return html.unescape(_LONG_NUMBER.sub("\ufffd", text))


def _tag(markup: str, start: int) -> Tag | Unclosed:
    match = _TAG.match(markup, start)
    if match is None:
        return Unclosed("a tag", start)
    return Tag(match[2].lower(), match[3], bool(match[1]), match.end())


def _declaration(markup: str, start: int, is_xml: bool) -> Generator[Token, None, int]:
    """A comment, markup that is treated as one, or a bare `<`; returns the character after it."""
    if not markup.startswith(("<!", "</", "<?"), start):
        yield Words("<")
        return start + 1
    if markup.startswith("<!--", start):
        if markup.startswith((">", "->"), start + 4):
            return markup.index(">", start) + 1
        found = _COMMENT_END.search(markup, start + 4)
        if found is not None:
            return found.end()
        yield Unclosed("a comment", start)
        return len(markup)
    is_text = is_xml and markup.startswith(_CDATA, start)
    closing = "]]>" if is_text else ">"
    stop = markup.find(closing, start)
    if stop < 0:
        yield Unclosed("a declaration", start)
        return len(markup)
    if is_text:
        yield Words(markup[start + len(_CDATA) : stop])
    return stop + len(closing)


def _raw_text(markup: str, tag: Tag) -> Generator[Token, None, int]:
    """The content after a start tag that has no tags in it; returns the character after it."""
    if tag.name == "plaintext":
        yield Words(markup[tag.stop :], tag.name)
        return len(markup)
    if tag.name not in _RAW:
        return tag.stop
    found = _ENDS[tag.name].search(markup, tag.stop)
    stop = len(markup) if found is None else found.start()
    text = markup[tag.stop : stop]
    yield Words(resolved(text) if tag.name in _ESCAPABLE else text, tag.name)
    if found is None and tag.stop < stop:
        yield Unclosed(f"<{tag.name}>", tag.stop)
    return stop

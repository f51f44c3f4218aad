"""The text of an HTML page as a reader sees it: a line per block, white space as in browsers.

Scripts, styles, comments, templates and `<noscript>` are not text. Styles are ignored: text that
only a style or the attribute `hidden` hides is read.
"""

from __future__ import annotations

import re

from nearfar.progress import Progress, silent
from nearfar.runtime.text.formats.html_scanner import Tag, Unclosed, Words, scan

HIDDEN_TAGS = {"iframe", "noembed", "noframes", "noscript", "script", "style"}
PREFORMATTED_TAGS = {"listing", "plaintext", "pre", "textarea", "xmp"}
# fmt: off
LINE_TAGS = {"br", "dd", "dt", "li", "option", "tr"}  # begin a line
CELL_TAGS = {"td", "th"}
BLOCK_TAGS = {  # begin a line, and so does what follows
    "address", "article", "aside", "blockquote", "body", "caption", "center", "details", "dialog",
    "div", "dl", "fieldset", "figcaption", "figure", "footer", "form", "h1", "h2", "h3", "h4",
    "h5", "h6", "head", "header", "hgroup", "hr", "html", "legend", "listing", "main", "menu",
    "nav", "ol", "optgroup", "p", "plaintext", "pre", "search", "section", "select", "summary",
    "table", "tbody", "textarea", "tfoot", "thead", "title", "ul", "xmp",
}
# fmt: on
_SPACES = re.compile(r"[\t\n\f\r \xa0]+")
_BETWEEN_REPORTS = 2**20  # characters


def html_text(
    markup: str, is_xml: bool = False, progress: Progress = silent
) -> tuple[str, list[str]]:
    """The text, and notes on parts that a browser would not show; see `Unclosed`.

    ``progress`` counts the characters of ``markup`` that were read.
    """
    page, reported = _Page(), 0
    for token in scan(markup, is_xml):
        if isinstance(token, Words):
            page.add_words(token)
        elif isinstance(token, Tag):
            page.add_tag(token)
            if token.stop - reported >= _BETWEEN_REPORTS:
                reported = token.stop
                progress(reported, len(markup))
        else:
            page.end_in(token)
    if page.templates:
        page.end_in(Unclosed("<template>", page.template_start))
    return page.text(), page.notes


class _Page:
    """The text of a page so far."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.templates = 0  # that are open
        self.template_start = 0
        self._preformatted = 0  # elements that are open
        self._after_pre = False  # whose first line end does not count
        self._parts: list[str] = []
        self._last = "\n"  # character

    def add_words(self, words: Words) -> None:
        """Text, unless it is inside of something that is not shown."""
        if self.templates or words.inside in HIDDEN_TAGS:
            return
        text = words.text
        if self._preformatted:
            if self._after_pre:
                text = re.sub(r"\A(?:\r\n|\r|\n)", "", text)
        else:
            text = _SPACES.sub(" ", text)
            if self._last in " \n":
                text = text.removeprefix(" ")
        self._after_pre = False
        self._append(text)

    def add_tag(self, tag: Tag) -> None:
        """Applies the effect of a tag on lines and white space."""
        name = tag.name
        if name == "template":
            if not self.templates:
                self.template_start = tag.stop
            self.templates = max(0, self.templates + (-1 if tag.closes else 1))
        elif self.templates:
            return
        elif name in BLOCK_TAGS:
            # a paragraph ends the one before it, which may not have been closed
            self._append("\n\n" if name == "p" and not tag.closes else "\n")
        elif name in LINE_TAGS and (not tag.closes or name == "br"):
            self._append("\n")
        elif name in CELL_TAGS and not tag.closes and self._last not in " \n":
            self._append(" ")
        if name in PREFORMATTED_TAGS:
            self._preformatted = max(0, self._preformatted + (-1 if tag.closes else 1))
            self._after_pre = not tag.closes

    def end_in(self, unclosed: Unclosed) -> None:
        """Note that the rest of the page is not shown."""
        if unclosed.what not in ("<title>", "<textarea>", "<xmp>"):  # of those it is
            self.notes.append(
                f"ends inside {unclosed.what} that begins at character {unclosed.start:,} and is "
                "never closed; as in a browser, what follows it is not read"
            )

    def text(self) -> str:
        """All of it, with at most one empty line between lines."""
        lines = (line.rstrip() for line in "".join(self._parts).split("\n"))
        return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()

    def _append(self, text: str) -> None:
        if text:
            self._parts.append(text)
            self._last = text[-1]

"""Texts with the sources of their characters.

Reading a file changes its text: line ends become one character, several files are joined under
headings, and a reader takes white space off both ends. A `Source` undoes that for one file, and so
gives the place in the file for a place in the text. Offsets count characters of the file as
decoded; those of HTML and PDF, whose text is extracted, characters of the extracted text.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

UNNAMED = "text"  # what did not come from a file is called


def _no_breaks() -> NDArray[np.int32]:
    return np.zeros(0, np.int32)


@dataclass(frozen=True, eq=False)
class Source:
    """Where characters ``start`` to ``start + length`` of a text come from."""

    name: str
    start: int
    length: int
    skipped: int = 0  # characters of the file's text before them
    extracted: bool = False  # whether the file's text was made out of markup
    # where in the file's text a line end is one character for two of the file, ascending
    breaks: NDArray[np.int32] = field(default_factory=_no_breaks)

    @property
    def stop(self) -> int:
        """The first character that is not from here."""
        return self.start + self.length

    def original(self, position: int) -> int:
        """The offset in the file of the character at ``position`` of the text."""
        own = position - self.start + self.skipped
        return own + int(np.searchsorted(self.breaks, own))

    def cut(self, start: int, stop: int) -> Source | None:
        """The part of it from ``start`` to ``stop`` of a text, for the text that starts there."""
        first, last = max(self.start, start), min(self.stop, stop)
        if first >= last:
            return None
        skipped = self.skipped + first - self.start
        return replace(self, start=first - start, length=last - first, skipped=skipped)

    def moved(self, by: int) -> Source:
        """The same in a text that has ``by`` more characters before it."""
        return replace(self, start=self.start + by)


class Text(str):
    """A string with the sources of its characters; those of headings and joints have none."""

    __slots__ = ("sources",)
    sources: tuple[Source, ...]

    def __new__(cls, text: str, sources: Iterable[Source] | None = None) -> Text:
        """With ``sources`` None: the sources of ``text``, or one without a name."""
        if not isinstance(text, str):  # of bytes, str() would make what Python writes them as
            raise TypeError(
                f"A text must be a str, and bytes be decoded. Got {type(text).__name__}."
            )
        made = super().__new__(cls, text)
        if sources is None:
            known = text.sources if isinstance(text, Text) else (Source(UNNAMED, 0, len(text)),)
            sources = known
        made.sources = tuple(sources)
        return made

    def stripped(self) -> Text:
        """Without white space at both ends."""
        start = len(self) - len(self.lstrip())
        stop = max(start, len(self.rstrip()))
        cut = (source.cut(start, stop) for source in self.sources)
        return Text(self[start:stop], [source for source in cut if source is not None])

    def source_at(self, position: int) -> Source | None:
        """The source of a character."""
        return next((s for s in self.sources if s.start <= position < s.stop), None)


def joined(parts: Sequence[str]) -> Text:
    """Joins texts into one; a part that is a `Text` keeps its sources."""
    sources: list[Source] = []
    length = 0
    for part in parts:
        if isinstance(part, Text):
            sources += [source.moved(length) for source in part.sources]
        length += len(part)
    return Text("".join(parts), sources)


def sources_as_json(sources: Iterable[Source]) -> list[dict[str, Any]]:
    """The sources without their breaks, which may be many."""
    return [
        {
            "name": source.name,
            "start": source.start,
            "length": source.length,
            "skipped": source.skipped,
            "extracted": source.extracted,
            "breaks": len(source.breaks),
        }
        for source in sources
    ]


def sources_from_json(
    values: Any, breaks: NDArray[np.int32], text_length: int
) -> tuple[Source, ...]:
    """The sources from `sources_as_json` and all their breaks; ValueError for invalid ones."""
    sources, first = [], 0
    for value in values:
        numbers = [value[key] for key in ("start", "length", "skipped", "breaks")]
        if not all(type(number) is int and 0 <= number < 2**31 for number in numbers):
            raise ValueError("a source has an impossible size")
        start, length, skipped, count = numbers
        name, extracted = value["name"], value["extracted"]
        if not isinstance(name, str) or not isinstance(extracted, bool):
            raise ValueError("a source is not described as it should be")
        own = breaks[first : first + count]
        first += count
        if start + length > text_length or len(own) != count:
            raise ValueError("a source is longer than its text")
        sources.append(Source(name, start, length, skipped, extracted, own))
    return tuple(sources)

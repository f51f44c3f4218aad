"""Which characters of a PDF's fonts are known, and which only have a number or a name of their own.

A font may show glyphs by numbers that mean nothing elsewhere. Without a map to Unicode its text is
extracted as other characters: it looks right on paper and is garbage here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from fontTools.agl import toUnicode
from pypdf.generic import ArrayObject, DictionaryObject, NameObject, StreamObject

from nearfar.runtime.text.unicode_text import REPLACEMENT

# CMaps that pypdf decodes; codes of Identity-H are the font's own
_KNOWN_CMAP = re.compile(
    "/(?:GB-EUC|GBpc-EUC|GBK-EUC|GBK2K|ETen-B5|ETenms-B5|90ms-RKSJ|Uni[A-Za-z]+-(?:UCS2|UTF16))-[HV]"
)
_MAPPINGS = re.compile(rb"beginbf(char|range)(.*?)endbf", re.DOTALL)
_TOKENS = re.compile(rb"<[^<>]*>|\[|\]")
_MOST_CODES = 0xFFFF
# what no font shows: control characters, halves of surrogate pairs, code points that are none
_NO_CHARACTER = re.compile(
    "[\x00-\x08\x0b-\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffd-\uffff]"
)


def replace_unknown(text: str) -> tuple[str, int]:
    """``text`` with U+FFFD for what is no character, and how many of these there are."""
    return _NO_CHARACTER.subn(REPLACEMENT, text)


class FontCheck:
    """Looks at the text that each font of a page shows."""

    def __init__(self) -> None:
        self.unmapped = 0  # characters whose Unicode is not known
        self._unknown: dict[int, re.Pattern[str] | None] = {}  # of each font, by its id
        self._fonts: list[DictionaryObject] = []  # so that no id is used again

    def look(self, text: str, font: DictionaryObject | None) -> None:
        """Count the characters of ``text``, shown in ``font``, that are not known."""
        if font is None or not text.strip():
            return
        if id(font) not in self._unknown:
            self._fonts.append(font)
            self._unknown[id(font)] = _unknown_characters(font)
        pattern = self._unknown[id(font)]
        if pattern is not None:
            self.unmapped += sum(len(found) for found in pattern.findall(text))


def _unknown_characters(font: DictionaryObject) -> re.Pattern[str] | None:
    """A pattern for decoded characters that the font does not map; None if it maps all."""
    to_unicode: Any = font.get("/ToUnicode")
    to_unicode = to_unicode.get_object() if to_unicode is not None else None
    mapped = ""
    if isinstance(to_unicode, StreamObject):
        mapped = "".join(_mapped_characters(to_unicode.get_data()))
    encoding: Any = font.get("/Encoding")
    encoding = encoding.get_object() if encoding is not None else None
    if font.get("/Subtype") == "/Type0":
        known = isinstance(encoding, NameObject) and _KNOWN_CMAP.fullmatch(encoding)
        # a code that the map lacks is shown as the character of that number
        return None if known else re.compile(rf"[^\s{re.escape(mapped)}]")
    if not isinstance(encoding, DictionaryObject):
        return None
    differences: Any = encoding.get("/Differences")
    differences = differences.get_object() if differences is not None else None
    names = _unknown_names(differences if isinstance(differences, ArrayObject) else [])
    return re.compile("|".join(map(re.escape, names))) if names else None


def _mapped_characters(cmap: bytes) -> set[str]:
    """All characters that a map to Unicode maps codes to."""
    found: set[str] = set()
    for kind, body in _MAPPINGS.findall(cmap):
        tokens = [token.strip(b"<> \t\r\n") for token in _TOKENS.findall(body)]
        if kind == b"char":
            found.update(*map(_utf_16, tokens[1::2]))
            continue
        while len(tokens) >= 3:
            first, last, target, *tokens = tokens
            if target == b"[":
                end = tokens.index(b"]") if b"]" in tokens else len(tokens)
                found.update(*map(_utf_16, tokens[:end]))
                tokens = tokens[end + 1 :]
            elif text := _utf_16(target):
                count = min(_number(last) - _number(first), _MOST_CODES) + 1
                found.update(text[:-1])
                start = ord(text[-1])
                found.update(map(chr, range(start, min(start + count, 0x110000))))
    return found


def _utf_16(digits: bytes) -> str:
    """The characters that hexadecimal ``digits`` stand for."""
    with suppress(ValueError):
        return bytes.fromhex(digits.decode("latin-1")).decode("utf-16-be", "replace")
    return ""


def _number(digits: bytes) -> int:
    with suppress(ValueError):
        return int(digits, 16)
    return 0


def _unknown_names(differences: Iterable[Any]) -> list[str]:
    """Glyph names that the Adobe Glyph List does not know, the longest first."""
    names = {str(each) for each in differences if isinstance(each, NameObject)}
    unknown = [each for each in names if each != "/.notdef" and not toUnicode(each[1:])]
    return sorted(unknown, key=len, reverse=True)

"""Checks text from outside for valid Unicode.

Python's strings can hold halves of surrogate pairs, which no encoding can write. They stand for
bytes of an argument or a file name that are not UTF-8, or come from JSON. No tokenizer takes them.
"""

from __future__ import annotations

import re

from nearfar.errors import InvalidOptionError

REPLACEMENT = "\ufffd"
_SURROGATE = re.compile("[\ud800-\udfff]")
# characters that move a terminal's cursor or change its state, line ends and tabs included
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def unicode_fault(text: str) -> str | None:
    """Where and why ``text`` is not valid Unicode, as the end of a sentence; None if it is."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        start = error.start
    else:
        return None
    code = ord(text[start])
    # PEP 383: how Python carries the byte 0x80 + n of an argument that is not UTF-8
    what = f"the byte 0x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"U+{code:04X}"
    return f"is not valid Unicode: {what} at character {start:,}"


def check_unicode(text: str, what: str) -> None:
    """Raise InvalidOptionError if ``text``, which the message calls ``what``, is not valid."""
    if (fault := unicode_fault(text)) is not None:
        raise InvalidOptionError(f"{what} {fault}. Give it in UTF-8.")


def without_surrogates(text: str) -> str:
    """``text`` with U+FFFD for what is not valid Unicode."""
    return text if text.isascii() else _SURROGATE.sub(REPLACEMENT, text)


def shown(text: str) -> str:
    """``text`` on one line of a terminal: U+FFFD for what is invalid or controls the terminal."""
    return _CONTROL.sub(REPLACEMENT, without_surrogates(text))

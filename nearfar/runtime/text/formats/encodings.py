"""Bytes to characters: by a byte order mark, as UTF-8, or as browsers decode a label.

Labels and what they stand for are those of the WHATWG encoding standard
(https://encoding.spec.whatwg.org): `iso-8859-1` is windows-1252, `gb2312` is GB 18030. Python's
codecs of like names are stricter in places, and `_as_browsers_do` adds what they lack.
"""

from __future__ import annotations

import codecs
import re

import webencodings

from nearfar.errors import DocumentError, InvalidOptionError

BOMS = {  # UTF-32 before UTF-16: its little-endian mark begins with that of UTF-16
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
REPLACED = "replacement"  # the standard's name for encodings that are not safe to decode
_CODECS = {"gbk": "gb18030", "iso-2022-jp": "iso2022_jp_ext"}  # the standard's, where they differ
_HANDLER = "nearfar.as_browsers_do"
_STRAY_IN_CP932 = re.compile("[\uf8f0-\uf8f3]")  # what Python makes of A0, FD, FE and FF
_CONTROLS = range(0x80, 0xA0)
_NULS_LOOKED_AT = 4096  # bytes, to tell UTF-16 from other binary data


def marked_encoding(data: bytes) -> str | None:
    """The encoding that a byte order mark names; None without one."""
    return next((known for bom, known in BOMS.items() if data.startswith(bom)), None)


def decode_text(data: bytes, name: str) -> str:
    """Text by its byte order mark if it has one, else UTF-8. DocumentError if it is not that."""
    marked = marked_encoding(data)
    if marked is None:
        refuse_zero_bytes(data, name)
    try:
        return data.decode(marked or "utf-8")
    except UnicodeDecodeError as error:
        encoding = (marked or "utf-8").upper().removesuffix("-SIG")
        remedy = (
            "Its byte order mark says that it is. It may be cut off: fetch or export it again."
            if marked
            else "If it is in another encoding, name that, for example: --encoding windows-1252"
        )
        raise DocumentError(f"{name} is not valid {encoding}: {_where(error)}. {remedy}") from None


def decode_declared(data: bytes, name: str, label: str) -> str:
    """Text that declares the encoding ``label``, which `known_encoding` knows.

    Raises DocumentError if its bytes are not in it.
    """
    encoding = known_encoding(label)
    assert encoding is not None
    if encoding == REPLACED:
        raise DocumentError(
            f"{name} declares the encoding {label!r}, which browsers refuse to decode. Convert "
            f"it: iconv -f {label} -t utf-8 {name} > converted"
        )
    refuse_zero_bytes(data, name)
    try:
        return _decoded(data, encoding)
    except UnicodeDecodeError as error:
        raise DocumentError(
            f"{name} is not valid {encoding}, which it declares ({label!r}): {_where(error)}. If "
            "it is in another encoding, name that: --encoding LABEL"
        ) from None


def decode_given(data: bytes, name: str, label: str) -> tuple[str, list[str]]:
    """Text in the encoding ``label``, which `check_label` knows, and a note if that may be wrong.

    A byte order mark counts first. Raises DocumentError if the bytes are not in the encoding.
    """
    if marked_encoding(data) is not None:
        return decode_text(data, name), []
    encoding = check_label(label)
    if not encoding.startswith("utf-16"):
        refuse_zero_bytes(data, name)
    try:
        text = _decoded(data, encoding)
    except UnicodeDecodeError as error:
        raise DocumentError(
            f"{name} is not valid {encoding}: {_where(error)}. Name the encoding that it is in "
            "(--encoding)."
        ) from None
    if encoding == "utf-8" or data.isascii() or not is_utf_8(data):
        return text, []
    return text, [
        f"is read as {encoding}, as --encoding says, but its bytes are valid UTF-8, so that may be "
        "wrong"
    ]


def check_label(label: str) -> str:
    """The standard's name of the encoding ``label``; InvalidOptionError for an unknown one."""
    known = webencodings.lookup(label)
    if known is None or known.name == REPLACED:
        raise InvalidOptionError(
            f"Unknown encoding {label!r}. Give a label of the WHATWG encoding standard, like "
            "windows-1252, shift_jis or utf-16le."
        )
    return str(known.name)


def is_utf_8(data: bytes) -> bool:
    """Whether the bytes are valid UTF-8."""
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _decoded(data: bytes, encoding: str) -> str:
    """Text in the encoding of that name, as browsers decode it; UnicodeDecodeError otherwise."""
    text = data.decode(_CODECS.get(encoding, _python_codec(encoding)), _HANDLER)
    if encoding == "shift_jis" and (stray := _STRAY_IN_CP932.search(text)) is not None:
        start = len(text[: stray.start()].encode("cp932"))
        raise UnicodeDecodeError("cp932", data, start, start + 1, "no character")
    return text


def known_encoding(label: str) -> str | None:
    """The standard's name of the encoding that a page means with ``label``; None if unknown.

    A page whose declaration can be read as ASCII is not UTF-16, even if it says so.
    """
    known = webencodings.lookup(label)
    if known is None:
        return None
    name: str = known.name
    return {"utf-16le": "utf-8", "utf-16be": "utf-8", "x-user-defined": "windows-1252"}.get(
        name, name
    )


def refuse_zero_bytes(data: bytes, name: str) -> None:
    """Raise DocumentError if there is a zero byte, and tell UTF-16 from other binary data."""
    if (zero := data.find(0)) < 0:
        return
    start = data[:_NULS_LOOKED_AT]
    zeros = [sum(byte == 0 for byte in start[first::2]) for first in (0, 1)]
    if max(zeros) > len(start) // 4 and min(zeros) == 0:  # every other byte, as of Latin letters
        order = "le" if zeros[1] else "be"
        raise DocumentError(
            f"{name} looks like UTF-16 without a byte order mark. Say so: --encoding utf-16{order}"
        )
    raise DocumentError(
        f"{name} is a binary file (a zero byte at offset {zero:,}). "
        "Give text, Markdown, HTML or PDF."
    )


def _python_codec(encoding: str) -> str:
    return str(webencodings.lookup(encoding).codec_info.name)


def _where(error: UnicodeDecodeError) -> str:
    return f"byte 0x{error.object[error.start]:02x} at offset {error.start:,}"


def _as_browsers_do(error: UnicodeError) -> tuple[str, int]:
    """Characters that the standard has and Python's codecs lack; raises ``error`` for others."""
    assert isinstance(error, UnicodeDecodeError)
    pair = error.object[error.start : error.start + 2]
    first = pair[0]
    if error.encoding == "charmap" and first in _CONTROLS:  # of windows-1250 to 1258 and 874
        return chr(first), error.start + 1
    if error.encoding == "gb18030" and first == 0x80:
        return "€", error.start + 1
    try:
        if error.encoding == "euc_jp" and re.fullmatch(rb"[\xa1-\xfe]{2}", pair):
            return _shift_jis_pair(pair).decode("cp932"), error.start + 2
        if error.encoding == "big5hkscs":
            return pair.decode("cp950"), error.start + 2
    except UnicodeDecodeError:
        pass
    raise error


def _shift_jis_pair(pair: bytes) -> bytes:
    """The bytes in Shift JIS of a character of EUC-JP: the same place in JIS X 0208's table."""
    lead, trail = divmod((pair[0] - 0xA1) * 94 + pair[1] - 0xA1, 188)
    return bytes([lead + (0x81 if lead < 0x1F else 0xC1), trail + (0x40 if trail < 0x3F else 0x41)])


codecs.register_error(_HANDLER, _as_browsers_do)

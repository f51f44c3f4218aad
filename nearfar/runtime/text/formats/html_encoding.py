"""Which encoding an HTML page is in, by the rules of the HTML standard (section 13.2.3).

A byte order mark counts first, then a `<meta>` that declares an encoding, then an XML declaration;
in XHTML the XML declaration before the `<meta>`. Without any of these a page must be UTF-8.
Browsers then guess by the user's country, which would be silently wrong elsewhere.
"""

from __future__ import annotations

import re

from nearfar.runtime.text.formats.encodings import (
    REPLACED,
    decode_declared,
    decode_given,
    decode_text,
    is_utf_8,
    known_encoding,
    marked_encoding,
)
from nearfar.runtime.text.formats.html_scanner import Tag, resolved, scan

_XML_DECLARATION = re.compile(
    rb"""\s*<\?xml\s[^>]*?\bencoding\s*=\s*(?:"([^"<>]*)"|'([^'<>]*)')[^>]*>"""
)
_UTF_16_XML = {"<?x".encode("utf-16-le"): "utf-16-le", "<?x".encode("utf-16-be"): "utf-16-be"}
_CONTENT_CHARSET = re.compile(
    r"""charset[\t\n\f\r ]*=[\t\n\f\r ]*(?:"([^"]*)"|'([^']*)'|([^"'\t\n\f\r ;][^\t\n\f\r ;]*))""",
    re.IGNORECASE,
)


def decode_page(
    data: bytes, name: str, is_xml: bool, given: str | None = None
) -> tuple[str, list[str]]:
    """The markup of a page, and notes on its encoding. DocumentError as of `decode_text`.

    A ``given`` label counts before what the page declares, as one from a server does in browsers.
    """
    if given is not None:
        return decode_given(data, name, given)
    for start, encoding in _UTF_16_XML.items():
        if data.startswith(start):
            bom = "\ufeff".encode(encoding)
            return decode_text(bom + data, name), []
    if marked_encoding(data) is not None:
        return decode_text(data, name), []
    label = declared_encoding(data, is_xml)
    if label is None:
        return decode_text(data, name), []
    markup = decode_declared(data, name, label)
    notes = []
    if known_encoding(label) not in ("utf-8", REPLACED) and not data.isascii() and is_utf_8(data):
        notes.append(
            f"declares the encoding {label!r} and is read as that, but its bytes are valid UTF-8, "
            "so the declaration may be wrong"
        )
    return markup, notes


def declared_encoding(data: bytes, is_xml: bool) -> str | None:
    """The first label in ``data`` that the encoding standard knows."""
    in_xml = _XML_DECLARATION.match(data)
    xml_label = "" if in_xml is None else (in_xml[1] or in_xml[2] or b"").decode("latin-1")
    labels = [xml_label] if is_xml else []
    labels += _meta_labels(data) if b"charset" in data.lower() else []
    labels.append(xml_label)
    return next((label for label in labels if known_encoding(label) is not None), None)


def _meta_labels(data: bytes) -> list[str]:
    """What `<meta>` tags declare, in order; the standard looks beyond the first 1,024 bytes too."""
    labels = []
    for token in scan(data.decode("latin-1")):
        if not isinstance(token, Tag) or token.name != "meta" or token.closes:
            continue
        values = {name: resolved(value) for name, value in token.attributes.items()}
        if "charset" in values:
            labels.append(values["charset"])
        elif values.get("http-equiv", "").strip().lower() == "content-type":
            found = _CONTENT_CHARSET.search(values.get("content", ""))
            labels += [found[1] or found[2] or found[3] or ""] if found else []
        if labels and known_encoding(labels[-1]) is not None:
            break
    return labels

"""Text out of files: plain text, Markdown, HTML, PDF, or bytes from a pipe.

Markdown is read as it is: its marks are part of the text. Knows nothing of tokens or models. A file
without text raises a DocumentError that says what to do. If only a part of a document cannot be
read, that is a DocumentWarning, or an error if the reading is strict.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nearfar.config import counted
from nearfar.errors import DocumentError, DocumentWarning
from nearfar.progress import Progress, silent
from nearfar.runtime.text.formats.encodings import check_label, decode_given, decode_text
from nearfar.runtime.text.formats.html_encoding import decode_page
from nearfar.runtime.text.formats.html_text import html_text
from nearfar.runtime.text.formats.kinds import XML_SUFFIXES, is_html, is_pdf, other_kind
from nearfar.runtime.text.formats.pdf import pdf_text
from nearfar.runtime.text.named_files import read_named
from nearfar.runtime.text.text_origins import Source, Text, joined
from nearfar.runtime.text.unicode_text import shown


def read_document(
    path: str | Path,
    *,
    strict: bool = False,
    encoding: str | None = None,
    progress: Progress = silent,
) -> Text:
    """The text of a file; PDF and HTML are recognised by suffix, PDF also by its first bytes.

    It is a string with the places of its characters in the file. ``progress`` counts a
    PDF's pages and a page's characters. If a part cannot be read, such as pages of pictures, that
    is a DocumentWarning or, if ``strict``, an error. ``encoding`` is that of text and HTML without
    a byte order mark, a label of the WHATWG encoding standard; None is UTF-8, or what a page says.

    Raises DocumentNameError for a file that is missing, a folder or unreadable, DocumentError for
    one that is empty, binary, mis-encoded, encrypted, corrupt, or a PDF of pictures, and
    InvalidOptionError for an unknown encoding.
    """
    name = shown(str(path))
    data = read_named(path, f"Name the files in it, like {name}/*.md.")
    return document_text(data, name, strict=strict, encoding=encoding, progress=progress)


def document_text(
    data: bytes,
    name: str,
    *,
    strict: bool = False,
    encoding: str | None = None,
    progress: Progress = silent,
) -> Text:
    """The text in the bytes of a file called ``name``; as in `read_document`."""
    if encoding is not None:
        check_label(encoding)
    if not data.strip():
        raise DocumentError(
            f"{name} is empty ({counted(len(data), 'byte')}). Give a document with text."
        )
    text, notes, extracted = _extract(data, name, encoding, progress)
    if notes and strict:
        raise DocumentError(
            f"{name}: {'; '.join(notes)}. Without strict reading the rest of it can be used."
        )
    for note in notes:
        warnings.warn(f"{name}: {note}.", DocumentWarning, stacklevel=3)
    pairs = np.array([match.start() for match in re.finditer("\r\n", text)], np.int32)
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if not text.strip():
        raise DocumentError(f"{name} holds no text, only white space or markup.")
    # each pair before a place has made it one character nearer to the start
    breaks = (pairs - np.arange(len(pairs)))[: 0 if extracted else None].astype(np.int32)
    return Text(text, [Source(name, 0, len(text), 0, extracted, breaks)])


def join_documents(documents: Sequence[tuple[str, str]], always_named: bool = False) -> Text:
    """One text from (name, text) pairs, each under a heading line with its name.

    A single document stays as it is unless ``always_named``. Files of equal name from different
    folders keep their paths.
    """
    if len(documents) == 1 and not always_named:
        return Text(documents[0][1])
    short = [Path(name).name for name, _ in documents]
    headings = [
        last if short.count(last) == 1 else name
        for last, (name, _) in zip(short, documents, strict=True)
    ]
    parts: list[str] = []
    for heading, (_, text) in zip(headings, documents, strict=True):
        parts += ["\n\n"] if parts else []
        parts += [f"# {shown(heading)}\n\n", Text(text).stripped()]
    return joined(parts)


def _extract(
    data: bytes, name: str, encoding: str | None, progress: Progress
) -> tuple[str, list[str], bool]:
    """Text, notes on its missing parts, and whether it was extracted from markup."""
    suffix = Path(name).suffix.lower()
    kind = other_kind(data, name)
    if kind is not None:
        what, advice = kind
        raise DocumentError(f"{name} is {what}, which cannot be read. {advice}")
    if is_pdf(data, suffix):
        return *pdf_text(data, name, progress), True
    if is_html(data, suffix):
        is_xml = suffix in XML_SUFFIXES
        markup, on_encoding = decode_page(data, name, is_xml, encoding)
        text, on_text = html_text(markup, is_xml, progress)
        return text, on_encoding + on_text, True
    if encoding is not None:
        return *decode_given(data, name, encoding), False
    return decode_text(data, name), [], False

"""Text out of files: plain text, Markdown, HTML, PDF, or bytes from a pipe.

Markdown is read as it is: its marks are part of the text. Knows nothing of tokens or models. Every
reason why a file has no text is a DocumentError that says what to do.
"""

from __future__ import annotations

import codecs
import difflib
import logging
import re
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
import pypdf
from bs4 import BeautifulSoup
from bs4.dammit import EncodingDetector
from bs4.element import NavigableString

from nearfar.errors import DocumentError
from nearfar.runtime.text_origins import Source, Text, joined

HTML_SUFFIXES = {".html", ".htm", ".xhtml"}
PDF_MAGIC = b"%PDF-"
BOMS = {  # UTF-32 before UTF-16: its little-endian mark begins with that of UTF-16
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
HIDDEN_TAGS = ["script", "style", "template", "noscript"]
# fmt: off
LINE_TAGS = ["br", "dd", "dt", "li", "tr"]  # begin a line
CELL_TAGS = ["td", "th"]
BLOCK_TAGS = [  # begin a line, and so does what follows
    "address", "article", "aside", "blockquote", "body", "caption", "details", "div", "dl",
    "fieldset", "figcaption", "figure", "footer", "form", "h1", "h2", "h3", "h4", "h5", "h6",
    "header", "hr", "html", "legend", "main", "nav", "ol", "p", "pre", "section", "summary",
    "table", "tbody", "tfoot", "thead", "title", "ul",
]
# fmt: on

logging.getLogger("pypdf").setLevel(logging.ERROR)  # repairs of a PDF are no news to the reader


def read_document(path: str | Path) -> Text:
    """The text of a file; PDF and HTML are told by their suffix, PDF also by its first bytes.

    It is a string that also knows where in the file its characters come from.

    Raises DocumentError for a file that is missing, a folder, unreadable, empty, binary,
    mis-encoded, encrypted, corrupt, or a PDF of pictures.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise DocumentError(_missing(path)) from None
    except IsADirectoryError:
        raise DocumentError(
            f"{path} is a folder. Name the files in it, like {path}/*.md."
        ) from None
    except PermissionError:
        raise DocumentError(
            f"{path} cannot be read: permission denied. Change it with: chmod u+r {path}"
        ) from None
    except OSError as error:
        raise DocumentError(f"{path} cannot be read: {error.strerror or error}.") from error
    return document_text(data, str(path))


def document_text(data: bytes, name: str) -> Text:
    """The text in the bytes of a file called ``name``; errors as in `read_document`."""
    suffix = Path(name).suffix.lower()
    if not data.strip():
        raise DocumentError(f"{name} is empty ({len(data):,} bytes). Give a document with text.")
    extracted = True
    if data.startswith(PDF_MAGIC) or suffix == ".pdf":
        text = _pdf_text(data, name)
    elif suffix in HTML_SUFFIXES:
        declared = EncodingDetector.find_declared_encoding(data, is_html=True)
        text = _html_text(_decode(data, name, declared or "utf-8"))
    else:
        text, extracted = _decode(data, name, "utf-8"), False
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
        parts += [f"# {heading}\n\n", Text(text).stripped()]
    return joined(parts)


def _missing(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f"{path} does not exist, nor does the folder {folder}. Check the path."
    try:
        names = [entry.name for entry in folder.iterdir()]
    except OSError:
        names = []
    close = difflib.get_close_matches(path.name, names, n=1)
    return f"{path} does not exist. " + (
        f"Did you mean {folder / close[0]}?" if close else "Check the path."
    )


def _decode(data: bytes, name: str, encoding: str) -> str:
    """Text of ``data``: by its byte order mark if it has one, else strictly as ``encoding``."""
    marked = next((known for bom, known in BOMS.items() if data.startswith(bom)), None)
    if marked is None and (zero := data.find(0)) >= 0:
        raise DocumentError(
            f"{name} is a binary file (a zero byte at offset {zero:,}). "
            "Give text, Markdown, HTML or PDF."
        )
    try:
        return data.decode(marked or encoding)
    except LookupError:  # an HTML page may declare an encoding that does not exist
        return _decode(data, name, "utf-8")
    except UnicodeDecodeError as error:
        where = f"byte 0x{data[error.start]:02x} at offset {error.start:,}"
        raise DocumentError(
            f"{name} is not valid {(marked or encoding).upper().removesuffix('-SIG')}: {where}. If "
            f"it is in another encoding, convert it: iconv -f latin1 -t utf-8 {name} > converted"
        ) from None


def _html_text(markup: str) -> str:
    """The visible text of a page: one line per block, white space as a browser shows it."""
    soup = BeautifulSoup(markup, "html.parser")
    for tag in soup.find_all(HIDDEN_TAGS):
        tag.decompose()
    for node in soup.find_all(string=True):
        # comments and the like are subclasses, and are not text
        if type(node) is NavigableString and node.find_parent("pre") is None:
            node.replace_with(NavigableString(re.sub(r"\s+", " ", node)))
    for tag in soup.find_all([*LINE_TAGS, *BLOCK_TAGS, *CELL_TAGS]):
        tag.insert_before(" " if tag.name in CELL_TAGS else "\n")
        if tag.name in BLOCK_TAGS:
            tag.insert_after("\n")
    # one space may be left of markup between lines; more are the indentation of a <pre>
    lines = (re.sub(r"^ (?! )", "", line.rstrip()) for line in soup.get_text().split("\n"))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def _pdf_text(data: bytes, name: str) -> str:
    if not data.lstrip().startswith(PDF_MAGIC):
        raise DocumentError(f"{name} is not a PDF: it does not begin with %PDF. Check the file.")
    try:
        reader = pypdf.PdfReader(BytesIO(data))
        if reader.is_encrypted and not _opens_without_password(reader):
            raise DocumentError(
                f"{name} is encrypted. Save it without a password, for example: "
                f"qpdf --decrypt --password=... {name} open.pdf"
            )
        pages = [page.extract_text().strip() for page in reader.pages]
    except DocumentError:
        raise
    except Exception as error:  # on damaged files pypdf raises whatever its parser runs into
        reason = str(error) or type(error).__name__
        raise DocumentError(
            f"{name} is a corrupt PDF and cannot be read ({reason}). Fetch or export it again."
        ) from error
    if not any(pages):
        raise DocumentError(
            f"{name} has {len(pages)} page(s) but no text: it is probably scanned. Run text "
            f"recognition first, for example: ocrmypdf {name} readable.pdf"
        )
    return "\n\n".join(pages)


def _opens_without_password(reader: pypdf.PdfReader) -> bool:
    """Whether only changing the file is protected, which is the empty password."""
    try:
        return reader.decrypt("") != pypdf.PasswordType.NOT_DECRYPTED
    except pypdf.errors.DependencyError:  # AES without the optional package for it
        return False

"""Recognises files by their first bytes, not by their name, and says what to do with them."""

from __future__ import annotations

import re
from io import BytesIO
from zipfile import BadZipFile, ZipFile

PDF_MAGIC = b"%PDF-"
HTML_SUFFIXES = {".html", ".htm", ".xhtml", ".xht", ".shtml"}
XML_SUFFIXES = {".xhtml", ".xht"}
HEADER_BYTES = 1024  # a PDF has its header within these, after any other bytes
_OFFICE = "Save it as PDF or text, for example: libreoffice --headless --convert-to pdf {name}"
_TEXT_RECOGNITION = "Run text recognition first, for example: tesseract {name} readable pdf"
_UNPACK = "Unpack it, and name the files in it."
_DEFAULT_ADVICE = "Give text, Markdown, HTML or PDF."
_MAGIC: tuple[tuple[bytes, str, str], ...] = (
    (b"\x89PNG\r\n\x1a\n", "a PNG picture", _TEXT_RECOGNITION),
    (b"\xff\xd8\xff", "a JPEG picture", _TEXT_RECOGNITION),
    (b"GIF87a", "a GIF picture", _TEXT_RECOGNITION),
    (b"GIF89a", "a GIF picture", _TEXT_RECOGNITION),
    (b"II*\0", "a TIFF picture", _TEXT_RECOGNITION),
    (b"MM\0*", "a TIFF picture", _TEXT_RECOGNITION),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old Office document", _OFFICE),
    (b"{\\rtf", "a document in RTF", _OFFICE),
    (b"%!PS", "PostScript", "Convert it: ps2pdf {name}"),
    (b"AT&TFORM", "a DjVu document", "Convert it: ddjvu -format=pdf {name} converted.pdf"),
    (b"\x1f\x8b", "compressed by gzip", "Unpack it: gunzip {name}"),
    (b"BZh", "compressed by bzip2", "Unpack it: bunzip2 {name}"),
    (b"\xfd7zXZ\0", "compressed by xz", "Unpack it: unxz {name}"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd", "Unpack it: unzstd {name}"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK),
    (b"Rar!\x1a\x07", "a RAR archive", _UNPACK),
    (b"SQLite format 3\0", "an SQLite database", _DEFAULT_ADVICE),
    (b"GGUF", "a model (GGUF)", "Give it as --model, and a document beside it."),
    (b"\x89NEARFAR", "a document that nearfar saved", "Ask it: nearfar ask {name}"),
)
_ZIPPED = (  # the beginning of the name of a file in it
    ("word/", "a Word document", _OFFICE),
    ("xl/", "an Excel workbook", _OFFICE),
    ("ppt/", "a PowerPoint presentation", _OFFICE),
)
_ZIPPED_TYPES = (  # of the file `mimetype`
    ("application/epub", "an EPUB book", "Convert it, for example: pandoc {name} -o converted.md"),
    ("application/vnd.oasis", "an OpenDocument file", _OFFICE),
)
_HTML_START = re.compile(
    rb"\s*(?:<\?xml[^>]*>\s*)?(?:<!--.{0,512}?-->\s*)?<(?:!doctype\s+html|html)[\s>]",
    re.IGNORECASE | re.DOTALL,
)


def is_pdf(data: bytes, suffix: str) -> bool:
    """Whether ``data`` is to be read as PDF, which it may turn out not to be."""
    return suffix == ".pdf" or data[:HEADER_BYTES].lstrip(b"\xef\xbb\xbf\0\t\n\f\r ").startswith(
        PDF_MAGIC
    )


def is_html(data: bytes, suffix: str) -> bool:
    """Whether ``data`` is a page: by its suffix, or without any by how it begins."""
    if suffix:
        return suffix in HTML_SUFFIXES
    return _HTML_START.match(data[:HEADER_BYTES].removeprefix(b"\xef\xbb\xbf")) is not None


def other_kind(data: bytes, name: str) -> tuple[str, str] | None:
    """The kind of ``data`` and advice, if it is a known kind without text to read."""
    for magic, what, advice in _MAGIC:
        if data.startswith(magic):
            return what, advice.format(name=name)
    if data.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        what, advice = _zipped(data)
        return what, advice.format(name=name)
    if data[257:262] == b"ustar":
        return "a tar archive", _UNPACK
    return None


def _zipped(data: bytes) -> tuple[str, str]:
    """The kind of a ZIP archive, by its content."""
    try:
        with ZipFile(BytesIO(data)) as archive:
            names = archive.namelist()
            start = archive.open("mimetype").read(64) if "mimetype" in names else b""
    except (BadZipFile, OSError, RuntimeError, NotImplementedError, ValueError, EOFError):
        return "a ZIP archive", _UNPACK
    kind = start.decode("latin-1").strip()
    for beginning, what, advice in _ZIPPED_TYPES:
        if kind.startswith(beginning):
            return what, advice
    for beginning, what, advice in _ZIPPED:
        if any(each.startswith(beginning) for each in names):
            return what, advice
    return "a ZIP archive", _UNPACK

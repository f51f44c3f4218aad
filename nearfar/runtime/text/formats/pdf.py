"""The text of a PDF, and notes on the parts that cannot be read.

Pages are separated by an empty line; values of form fields follow the text of their page.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from io import BytesIO

import pypdf
from pypdf.errors import DependencyError

from nearfar.config import counted
from nearfar.errors import DocumentError
from nearfar.progress import Progress, silent
from nearfar.runtime.text.formats.kinds import HEADER_BYTES, PDF_MAGIC
from nearfar.runtime.text.formats.pdf_fonts import FontCheck, replace_unknown
from nearfar.runtime.text.formats.pdf_form import Form

logging.getLogger("pypdf").setLevel(logging.CRITICAL)  # what matters is in notes and errors


@dataclass
class _Found:
    """Texts of the pages, and numbers of faulty pages, from 1 on."""

    pages: list[str] = field(default_factory=list)
    unmapped: list[int] = field(default_factory=list)  # most of the text is not known
    doubtful: list[int] = field(default_factory=list)  # some of it
    broken: dict[int, str] = field(default_factory=dict)  # why
    comments: int = 0

    @property
    def empty(self) -> list[int]:
        """Pages without text that are not named for another reason."""
        others = {*self.unmapped, *self.broken}
        return [n for n, page in enumerate(self.pages, 1) if not page and n not in others]


def pdf_text(data: bytes, name: str, progress: Progress = silent) -> tuple[str, list[str]]:
    """Text, and notes on missing parts; ``progress`` counts pages.

    Raises DocumentError for a file that is damaged, needs a password or has no text at all.
    """
    start = data.find(PDF_MAGIC, 0, HEADER_BYTES + len(PDF_MAGIC))
    if start < 0:
        raise DocumentError(f"{name} is not a PDF: it does not begin with %PDF. Check the file.")
    try:
        reader = pypdf.PdfReader(BytesIO(data[start:]))
        _check_open(reader, name)
        found, form = _Found(), Form(reader)
        declared = _declared_pages(reader)
        pages = list(reader.pages)
        for number, page in enumerate(pages, start=1):
            _read_page(page, number, form, found)
            progress(number, len(pages))
        last = "\n".join(form.other_lines())
        notes = _document_notes(reader, form, found, declared)
    except (DocumentError, KeyboardInterrupt):
        raise
    except MemoryError:
        raise DocumentError(
            f"{name} needs more memory to be read than there is. Split it: qpdf --split-pages=100 "
            f"{name} part.pdf"
        ) from None
    except Exception as error:  # on damaged files pypdf raises errors of any type
        raise DocumentError(_corrupt(name, error)) from error
    _check_found(found, last, name)
    text = "\n\n".join([*found.pages, last] if last else found.pages)
    return replace_unknown(text)[0], _page_notes(found, name) + notes


def _check_open(reader: pypdf.PdfReader, name: str) -> None:
    """Raise DocumentError if more than changing the file needs a password."""
    if not reader.is_encrypted:
        return
    try:
        opened = reader.decrypt("") != pypdf.PasswordType.NOT_DECRYPTED
    except DependencyError as error:
        raise DocumentError(
            f"{name} is encrypted with AES, for which the package cryptography is needed and "
            f"does not load ({error}). Install it: pip install cryptography"
        ) from None
    if not opened:
        raise DocumentError(
            f"{name} is encrypted. Save it without a password, for example: "
            f"qpdf --decrypt --password=... {name} open.pdf"
        )


def _read_page(page: pypdf.PageObject, number: int, form: Form, found: _Found) -> None:
    """Add the page; one that cannot be read is named, and the others are still read."""
    fonts = FontCheck()
    try:
        text = page.extract_text(
            visitor_text=lambda shown, _cm, _tm, font, _size: fonts.look(shown, font)
        ).strip()
        lines, comments = form.lines_on(page)
    except MemoryError:
        raise
    except Exception as error:  # as in `pdf_text`
        found.pages.append("")
        found.broken[number] = _reason(error)
        return
    found.comments += comments
    strange = fonts.unmapped + replace_unknown(text)[1]
    if strange > len("".join(text.split())) / 2:
        found.unmapped.append(number)
        text = ""
    elif strange:
        found.doubtful.append(number)
    found.pages.append("\n".join(filter(None, [text, *lines])))


def _check_found(found: _Found, last: str, name: str) -> None:
    """Raise DocumentError where there is no text."""
    if any(found.pages) or last:
        return
    if found.broken:
        raise DocumentError(_corrupt(name, found.broken[min(found.broken)]))
    if not found.pages:
        raise DocumentError(f"{name} is a PDF without pages. Fetch or export it again.")
    if found.unmapped:
        raise DocumentError(
            f"{name} has no text that can be read: its fonts have no map to Unicode, so that its "
            "characters are not known. Run text recognition first, for example: "
            f"ocrmypdf --force-ocr {name} readable.pdf"
        )
    raise DocumentError(
        f"{name} has {counted(len(found.pages), 'page')} but no text: it is probably scanned. Run "
        f"text recognition first, for example: ocrmypdf {name} readable.pdf"
    )


def _page_notes(found: _Found, name: str) -> list[str]:
    """Notes on single pages."""
    notes = []

    def some(pages: Collection[int], one: str, several: str) -> str:
        verb = one if len(pages) == 1 else several
        return f"{len(pages)} of {counted(len(found.pages), 'page')} {verb}"

    if found.empty:
        notes.append(
            f"{some(found.empty, 'has', 'have')} no text: {page_ranges(found.empty)} (to "
            f"recognise text in pictures: ocrmypdf --skip-text {name} readable.pdf)"
        )
    if found.unmapped:
        notes.append(
            f"{some(found.unmapped, 'is', 'are')} not read because their fonts have no map "
            f"to Unicode: {page_ranges(found.unmapped)} (to recognise their text: "
            f"ocrmypdf --force-ocr {name} readable.pdf)"
        )
    if found.doubtful:
        notes.append(
            f"{some(found.doubtful, 'has', 'have')} characters that their fonts do not map "
            f"to Unicode, which are wrong here: {page_ranges(found.doubtful)}"
        )
    if found.broken:
        notes.append(
            f"{some(found.broken, 'is', 'are')} damaged and not read: "
            f"{page_ranges(list(found.broken))} ({found.broken[min(found.broken)]})"
        )
    return notes


def _document_notes(
    reader: pypdf.PdfReader, form: Form, found: _Found, declared: int | None
) -> list[str]:
    """Notes on parts other than pages."""
    notes = []
    if declared is not None and declared > len(found.pages):
        there = len(found.pages)
        verb = "is" if there == 1 else "are"
        notes.append(f"{declared} pages are declared, but only {there} {verb} there")
    if found.comments:
        verb = "is" if found.comments == 1 else "are"
        notes.append(f"{counted(found.comments, 'comment')} beside the text {verb} not read")
    root = reader.root_object
    first = found.pages[0] if found.pages else ""
    if form.has_xfa and (root.get("/NeedsRendering") or first.startswith("Please wait")):
        notes.append(
            "the document is an XFA form, whose content only some programs show, so that perhaps "
            "only a page that says so was read; print it to PDF with one that does"
        )
    if "/Collection" in root:
        names = sorted(reader.attachments)
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        notes.append(
            f"the document is a collection of files, which are not read: "
            f"{', '.join(names[:5])}{more}"
        )
    return notes


def _declared_pages(reader: pypdf.PdfReader) -> int | None:
    """The number of pages that the root of the page tree declares."""
    pages = reader.root_object.get("/Pages")
    count = pages.get_object().get("/Count") if pages is not None else None
    return count if isinstance(count, int) else None


def page_ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers for people: `2-4, 7`."""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ", ".join(f"{a}-{b}" if a < b else str(a) for a, b in ranges)


def _corrupt(name: str, error: Exception | str) -> str:
    return (
        f"{name} is a corrupt PDF and cannot be read ({_reason(error)}). Fetch or export it again."
    )


def _reason(error: Exception | str) -> str:
    """One line of an error's text."""
    reason = " ".join(str(error).split()) or type(error).__name__
    return reason.rstrip(".")[:200]

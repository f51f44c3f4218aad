"""Questions in JSONL files: one document, or one book, with its questions on each line.

    {"id": "...", "context": "the document", "title": "...",
     "questions": [{"question": "...", "answers": ["...", "..."]}]}

`context` is one of three ways to give the text:

- `context`: the document itself. Several are joined to any length, under their titles.
- `paragraphs`, a list of texts or of {"title", "text"}: with `supporting_titles`, or with the index
  `paragraph` in each question, the ones with the answer are known; they are put among paragraphs of
  other lines.
- `book`: the path of a text file, from the folder of this file or one above it. `char_offset` of a
  question, or the first of its `evidence_offsets`, is the place of its answer in the book, with
  single spaces for runs of whitespace (and none in scripts without spaces); a window around it is
  read.

`answer`, one text, may stand for `answers`. Other fields are left alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from nearfar.errors import DocumentError
from nearfar.runtime.text.named_files import read_named
from nearfar.runtime.text.text_files import read_document
from nearfar.runtime.text.unicode_text import unicode_fault

RECALL = "next_sentence_recall"  # the `task` of lines whose answers are to be quoted
_CJK = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]")
_CJK_SHARE = 0.2
_MOST_KNOWN = 16  # files
_Stamp = tuple[int, int, int, int]  # number, size and times of a file


@dataclass(frozen=True)
class DatasetQuestion:
    """A question and its right answers."""

    text: str
    answers: tuple[str, ...]
    offset: int | None = None  # of the answer in a book
    paragraph: int | None = None  # that has the answer


@dataclass(frozen=True)
class Paragraph:
    """A short text, under a title or none."""

    text: str
    title: str = ""


@dataclass(frozen=True)
class Source:
    """One line of a file."""

    name: str
    task: str
    title: str
    text: str  # of the document or of the book
    is_book: bool
    paragraphs: tuple[Paragraph, ...]
    supporting: tuple[str, ...]  # titles of the paragraphs that have the answer
    questions: tuple[DatasetQuestion, ...]

    def gold(self, question: DatasetQuestion) -> list[Paragraph]:
        """The paragraphs that have the answer, where that is known."""
        if question.paragraph is not None:
            return [self.paragraphs[question.paragraph]]
        return [each for each in self.paragraphs if each.title in self.supporting]

    @property
    def knows_gold(self) -> bool:
        """Whether `gold` finds something for every question."""
        return bool(self.paragraphs) and all(self.gold(each) for each in self.questions)


def read_questions(path: Path) -> tuple[Source, ...]:
    """All lines of ``path``. DocumentError names the line that cannot be used, and why.

    They are cached until the file or one of its books changes.
    """
    known = _known.get(path.absolute())
    if known is not None and all(_stamp(file) == stamp for file, stamp in known.stamps.items()):
        return known.sources
    stamps = {path: _stamp(path)}
    sources = _read_sources(path, stamps)
    while len(_known) >= _MOST_KNOWN:
        _known.pop(next(iter(_known)))
    _known[path.absolute()] = _Known(stamps, sources)
    return sources


@dataclass(frozen=True)
class _Known:
    """The content of a file, and the attributes of it and its books at that time."""

    stamps: dict[Path, _Stamp | None]
    sources: tuple[Source, ...]


_known: dict[Path, _Known] = {}


def _stamp(path: Path) -> _Stamp | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _read_sources(path: Path, stamps: dict[Path, _Stamp | None]) -> tuple[Source, ...]:
    try:
        # only line ends part lines: JSON may have U+2028 and the like in a text
        lines = read_named(path).decode("utf-8-sig").split("\n")
    except ValueError as error:
        raise DocumentError(f"{path} cannot be read as questions: {error}.") from error
    sources = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            sources.append(_source(_row(line), path, number, stamps))
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise DocumentError(
                f"Line {number} of {path} is not a document with questions: {what}. Each line is a "
                'JSON object with "questions", and "context", "paragraphs" or "book".'
            ) from error
    if not sources:
        raise DocumentError(f"{path} has no questions. Give a JSONL file with one document a line.")
    return tuple(sources)


def _row(line: str) -> Mapping[str, Any]:
    row = json.loads(line)
    if not isinstance(row, dict):
        raise ValueError("it is not an object")
    # escapes of JSON can say halves of surrogate pairs, which no tokenizer takes
    if r"\u" in line and (fault := unicode_fault(json.dumps(row, ensure_ascii=False))) is not None:
        raise ValueError(f"it {fault}")
    return row


def _source(
    row: Mapping[str, Any], path: Path, number: int, stamps: dict[Path, _Stamp | None]
) -> Source:
    paragraphs = tuple(_paragraph(each) for each in row.get("paragraphs", ()))
    supporting = tuple(row.get("supporting_titles", ()))
    questions = tuple(_asked(each) for each in row["questions"])
    for each in questions:
        if each.paragraph is not None and not 0 <= each.paragraph < len(paragraphs):
            raise ValueError(f"there is no paragraph {each.paragraph}")
    if "book" in row:
        book = _book_path(path, row["book"])
        stamps[book] = _stamp(book)
        text = normalise_book(read_document(str(book)))
    elif "context" in row:
        text = row["context"].strip()
    else:
        text = "\n\n".join(each.text for each in paragraphs)
    if not text:
        raise ValueError("it has no text")
    name = str(row.get("id", f"{path.stem}-{number}"))
    title = str(row.get("title", "")).replace("_", " ")
    return Source(
        name, row.get("task", ""), title, text, "book" in row, paragraphs, supporting, questions
    )


def _paragraph(value: str | Mapping[str, str]) -> Paragraph:
    if isinstance(value, str):
        return Paragraph(value)
    return Paragraph(value["text"], value.get("title", ""))


def _asked(row: Mapping[str, Any]) -> DatasetQuestion:
    answers = row["answers"] if "answers" in row else [row["answer"]]
    if not answers or not all(isinstance(each, str) and each.strip() for each in answers):
        raise ValueError("a question has no answer")
    offsets = row.get("evidence_offsets") or [None]
    return DatasetQuestion(
        row["question"].strip(),
        tuple(each.strip() for each in answers),
        row.get("char_offset", offsets[0]),
        row.get("paragraph"),
    )


def _book_path(path: Path, book: str) -> Path:
    for folder in (path.parent, *list(path.resolve().parents)[1:3]):
        if (folder / book).is_file():
            return folder / book
    raise ValueError(f"the book {book} is neither beside the file nor in a folder above it")


@lru_cache(maxsize=4)
def normalise_book(text: str) -> str:
    """``text`` with single spaces, or without any where its script has none."""
    without = len(_CJK.findall(text)) > _CJK_SHARE * len(text)
    return re.sub(r"\s+", "" if without else " ", text)

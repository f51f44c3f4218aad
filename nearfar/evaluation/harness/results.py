"""Result files: one JSON object a line, appended as it comes, resumed after any end.

A row is one question (or one text) under one policy. Its key identifies the work; a row whose key
exists is not made again. All but `cost` is the same in every run with the same key. A killed
process leaves at most one incomplete line, which the next one drops.
"""

from __future__ import annotations

import fcntl
import gzip
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType, UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from nearfar.errors import DocumentError, InvalidOptionError
from nearfar.output.place import check_replaced, find_place
from nearfar.runtime.text.named_files import read_named

SCHEMA = 1
_Record = TypeVar("_Record")
_START = f'{{"schema": {SCHEMA}'.encode()  # of a line


@dataclass(frozen=True)
class Key:
    """Identifies the work. Rows with equal keys are repetitions of each other."""

    model: str
    task: str
    context_tokens: int  # wanted; 0: the document as it is
    case: int
    question: int
    policy: str  # as given: name or name:parameter=value
    budget: float | None  # None: the policy reads everything
    query: str  # when the question is known, see `plan`
    seed: int
    source: str  # of the text or questions, see `Task.source`
    dtype: str
    far_dtype: str
    sinks: int
    window: int

    def variation(self, *, without: tuple[str, ...] = ("case", "question")) -> tuple[Any, ...]:
        """Everything but the number of the sample."""
        return tuple(value for name, value in vars(self).items() if name not in without)


@dataclass(frozen=True)
class Outcome:
    """The result."""

    metric: str
    score: float | None = None
    prediction: str | None = None
    references: tuple[str, ...] = ()
    question_text: str | None = None
    token_ids: tuple[int, ...] = ()
    agreement: float | None = None  # with exact attention's tokens, from their start, 0 to 1
    depth: float | None = None
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Cost:
    """The cost: seconds, 0 if not measured, and bytes. Differs by run."""

    machine: str
    prompt_tokens: int = 0
    read_seconds: float = 0.0  # the context, with exact attention
    shared_reading: bool = False  # whether other policies took the same reading in
    take_in_seconds: float = 0.0  # the policy's own part of that: copying, indexing, evicting
    first_token_seconds: float = 0.0  # from the end of the context to the answer's first token
    step_ms: tuple[float, float, float] | None = None  # p20, p50, p80 of decoding a token
    near_bytes: int = 0
    far_bytes: int = 0
    index_bytes: int = 0
    far_bytes_read_per_token: float = 0.0
    peak_rss_bytes: int = 0
    peak_gpu_bytes: int = 0
    tokens_per_second: dict[str, float] = field(default_factory=dict)  # by batch


@dataclass(frozen=True)
class Row:
    """One line."""

    key: Key
    treatment: str  # what the policy does to the cache, see `plan`
    budget_bytes: int | None  # that the budget is, in one step and all layers
    of: int  # questions of the case
    outcome: Outcome | None
    cost: Cost | None
    error: str | None = None

    def to_json(self) -> str:
        """The line."""
        return json.dumps({"schema": SCHEMA, **asdict(self)}, ensure_ascii=False, allow_nan=False)


_HINTS: dict[type, dict[str, Any]] = {
    kind: get_type_hints(kind) for kind in (Key, Outcome, Cost, Row)
}


def row_of(line: str) -> Row:
    """A row from its line; ValueError, TypeError or RecursionError if it is not one."""
    values = json.loads(line)
    if not isinstance(values, dict) or values.pop("schema", None) != SCHEMA:
        raise ValueError(f"not a result of schema {SCHEMA}")
    values["key"] = _typed(Key, values["key"])
    if values["outcome"] is not None:
        outcome = values["outcome"]
        outcome["references"] = tuple(outcome["references"])
        outcome["token_ids"] = tuple(outcome["token_ids"])
        values["outcome"] = _typed(Outcome, outcome)
    if values["cost"] is not None:
        cost = values["cost"]
        cost["step_ms"] = cost["step_ms"] and tuple(cost["step_ms"])
        values["cost"] = _typed(Cost, cost)
    return _typed(Row, values)


def _typed(kind: type[_Record], values: dict[str, Any]) -> _Record:
    """A record of ``values``; ValueError names one that is of another type than the field."""
    record = kind(**values)
    for name, hint in _HINTS[kind].items():
        if not _fits(getattr(record, name), hint):
            raise ValueError(f"{name!r} is {getattr(record, name)!r}")
    return record


def _fits(value: object, hint: Any) -> bool:
    """Whether a value that came from JSON is of a type, to the elements of a tuple."""
    kind, inner = get_origin(hint) or hint, get_args(hint)
    if kind is UnionType:
        return any(_fits(value, each) for each in inner)
    if isinstance(value, bool):
        return kind is bool
    if kind is tuple:
        return isinstance(value, tuple) and all(_fits(each, inner[0]) for each in value)
    return isinstance(value, int | float if kind is float else kind)


class Results:
    """Rows by key, in order; with a path, also a file that grows with them.

    Used as a context manager; only one process may have a file open.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._rows: dict[Key, Row] = {}
        self._file: int | None = None

    def __enter__(self) -> Results:
        if self._path is None:
            return self
        self._path.parent.mkdir(parents=True, exist_ok=True)
        check_results(self._path)
        file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            drop_torn_line(self._path)
            self._rows = {row.key: row for row in read_rows([self._path])}
        except BlockingIOError:
            os.close(file)
            raise InvalidOptionError(
                f"Another nearfar is writing {self._path}. Wait for it or give another --output."
            ) from None
        except BaseException:
            os.close(file)
            raise
        self._file = file
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is not None:
            os.close(self._file)  # and the lock is given back

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self._rows.values())

    def __contains__(self, key: Key) -> bool:
        return key in self._rows

    def get(self, key: Key) -> Row | None:
        """The row of ``key``, or None."""
        return self._rows.get(key)

    def add(self, row: Row) -> None:
        """Add a row; once this returns, a killed process does not lose it."""
        assert row.key not in self._rows
        if self._file is not None:
            line = (row.to_json() + "\n").encode()
            while line:
                line = line[os.write(self._file, line) :]
        self._rows[row.key] = row


def check_results(path: Path) -> None:
    """Raise if rows cannot be added to ``path``: a file without results must stay.

    Raises OutputNameError for a name that cannot be written to, DocumentError for another file.
    """
    place = find_place(path)
    check_replaced(place, "results of nearfar compare", lambda _: True)
    rows, torn = read_rows([path] if path.exists() else []), _torn_line(path)
    if torn.strip(b"\0") and not torn.startswith(_START[: len(torn)]):
        what = "has a last line that" if rows else "is not results that"
        raise DocumentError(
            f"{path} {what} nearfar compare did not write. Give another folder: --output."
        )


def drop_torn_line(path: Path) -> None:
    """Cut the incomplete line that a killed process left at the end of ``path``."""
    torn = _torn_line(path)
    if torn:
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size - len(torn))


def _torn_line(path: Path) -> bytes:
    """The content after the last complete line."""
    content = path.read_bytes() if path.exists() else b""
    return content[content.rfind(b"\n") + 1 :]


def read_rows(paths: Iterable[Path]) -> list[Row]:
    """Rows of several files, each key once: that of the last file, in the place of the first.

    A row that says why a policy failed gives way to one that has a result. A name that ends in .gz
    is a file compressed by gzip, as published rows are.
    """
    rows: dict[Key, Row] = {}
    for path in paths:
        try:
            lines = _text_of(path).split("\n")
        except (gzip.BadGzipFile, EOFError, ValueError, zlib.error) as error:
            raise DocumentError(f"{path} cannot be read as results: {error}.") from error
        if lines and lines[-1]:
            lines.pop()  # torn by a kill
        for number, line in enumerate(lines, start=1):
            if not line:
                continue
            try:
                row = row_of(line)
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                reason = "it is not JSON" if isinstance(error, json.JSONDecodeError) else error
                raise DocumentError(
                    f"Line {number} of {path} is not a result of nearfar compare: {reason}. "
                    "Give the results.jsonl that it wrote, or remove the line."
                ) from error
            if row.error is None or row.key not in rows:
                rows[row.key] = row
    return list(rows.values())


def _text_of(path: Path) -> str:
    data = read_named(path)
    return (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")

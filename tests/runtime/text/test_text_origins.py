from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from nearfar.runtime.text.text_files import document_text, join_documents
from nearfar.runtime.text.text_origins import (
    Source,
    Text,
    joined,
    sources_as_json,
    sources_from_json,
)


def check(text: Text, originals: dict[str, str]) -> int:
    """Every character with a source is at its offset there; how many have one."""
    known = 0
    for position, character in enumerate(text):
        source = text.source_at(position)
        if source is not None:
            known += 1
            original = originals[source.name][source.original(position)]
            assert original == character or (character == "\n" and original == "\r")
    return known


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
def test_line_ends_are_counted_as_in_the_file(line_end: str) -> None:
    original = line_end.join(["", "  one", "", "two ü 世", "three", "", ""])
    text = document_text(original.encode(), "a.txt")
    assert check(text, {"a.txt": original}) == len(text)
    stripped = text.stripped()
    assert stripped == text.strip()
    assert check(stripped, {"a.txt": original}) == len(stripped)


def test_mixed_line_ends() -> None:
    rng = random.Random(0)
    for _ in range(50):
        original = "x" + "".join(rng.choices(["a", "b", "\n", "\r\n", "\r", "ü"], k=40))
        text = document_text(original.encode(), "a")
        assert check(text, {"a": original}) == len(text)


def test_a_byte_order_mark_is_not_counted() -> None:
    text = document_text("\ufefftwo\r\nlines".encode(), "a.txt")
    assert check(text, {"a.txt": "two\r\nlines"}) == len(text)


def test_files_that_are_joined() -> None:
    originals = {"x/a.txt": "\r\n\r\n first\r\nfile \r\n", "b.md": "# second\n", "stdin": "third"}
    documents = [(name, document_text(text.encode(), name)) for name, text in originals.items()]
    text = join_documents(documents)
    assert text == "# a.txt\n\nfirst\nfile\n\n# b.md\n\n# second\n\n# stdin\n\nthird"
    assert check(text, originals) == len("first\nfile") + len("# second") + len("third")
    assert text.source_at(0) is None
    assert [source.name for source in text.sources] == list(originals)
    more = joined([text, "\n\n", Text("plain")])
    last = more.source_at(len(more) - 1)
    assert last is not None
    assert (last.name, last.original(len(more) - 1)) == ("text", 4)


def test_one_document_may_have_its_name_above_it() -> None:
    text = join_documents([("x/a.txt", document_text(b"first\n", "x/a.txt"))], always_named=True)
    assert text == "# a.txt\n\nfirst"
    assert check(text, {"x/a.txt": "first\n"}) == 5


def test_extracted_text_counts_for_itself() -> None:
    text = document_text(b"<p>One</p>\r\n<p>Two</p>\r\n", "a.html")
    [source] = text.sources
    assert source.extracted
    assert [source.original(i) for i in range(len(text))] == list(range(len(text)))


def test_a_plain_string_is_its_own_source() -> None:
    text = Text("abc")
    assert text.source_at(1) is text.sources[0]
    assert text.source_at(3) is None
    assert text.sources[0].name == "text"
    assert Text(text).sources == text.sources
    assert Text("  \n ").stripped() == ""
    assert Text("  \n ").stripped().sources == ()


def test_sources_survive_being_written() -> None:
    sources = (
        Source("a", 3, 10, 2, False, np.array([1, 4], np.int32)),
        Source("b", 20, 5, 0, True),
    )
    breaks = np.concatenate([source.breaks for source in sources])
    again = sources_from_json(sources_as_json(sources), breaks, 30)
    assert [source.original(source.start + 4) for source in again] == [8, 4]
    assert [(s.name, s.stop, s.extracted) for s in again] == [("a", 13, False), ("b", 25, True)]


@pytest.mark.parametrize(
    "change",
    [
        {"start": -1},
        {"length": 28},
        {"breaks": 3},
        {"skipped": 2**31},
        {"name": 3},
        {"extracted": "no"},
        {"length": 1.0},
    ],
)
def test_sources_that_cannot_be(change: dict[str, object]) -> None:
    [value] = sources_as_json([Source("a", 3, 10, 2, False, np.array([1, 4], np.int32))])
    with pytest.raises(ValueError, match="source"):
        sources_from_json([value | change], np.array([1, 4], np.int32), 30)


def test_a_file_on_disk(tmp_path: Path) -> None:
    from nearfar.runtime.text.text_files import read_document

    path = tmp_path / "a.txt"
    path.write_bytes(b"one\r\ntwo")
    assert check(read_document(path), {str(path): "one\r\ntwo"}) == 7

"""What every command that reads documents does with those that are not as they should be."""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from fake_engine import install, nearfar
from tiny_pdf import PICTURE, line, tiny_pdf

NOTE = (
    "mixed.pdf: 1 of 2 pages has no text: 2 (to recognise text in pictures: "
    "ocrmypdf --skip-text mixed.pdf readable.pdf)."
)
BYTE = "caf\udce9"  # an argument in Latin-1


@pytest.fixture(autouse=True)
def log(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mixed.pdf").write_bytes(tiny_pdf(line("(Cover)"), PICTURE))
    (tmp_path / "a.txt").write_text("Some text.")
    return install(monkeypatch)


READERS = [
    ("qa", "mixed.pdf", "-q", "What?", "--no-cache"),
    ("qa", "-", "-q", "What?", "--no-cache"),
    ("index", "mixed.pdf"),
    ("generate", "--file", "mixed.pdf"),
    ("generate", "-"),
    ("compare", "mixed.pdf", "-q", "What?", "--policies", "sketch"),
]


@pytest.mark.parametrize("command", READERS, ids=" ".join)
def test_an_encoding_is_checked_before_a_file_is_opened(
    command: tuple[str, ...], log: list[Any]
) -> None:
    Path("mixed.pdf").unlink()
    result = nearfar(*command, "--encoding", "utf-7")
    assert (result.exit_code, log) == (2, [])
    assert result.stderr.startswith("Error: Unknown encoding 'utf-7'. Give a label of the WHATWG")


@pytest.mark.parametrize("name", ["a.txt", "a.html", "-"])
def test_text_is_read_in_the_encoding_that_is_named(name: str, log: list[Any]) -> None:
    data = "жаба".encode("koi8-r")
    if name != "-":
        Path(name).write_bytes(data)
    command = ("qa", name, "-q", "What?", "--no-cache")
    result = nearfar(*command, "--encoding", "koi8-r", stdin=data)
    assert result.exit_code == 0, result.output
    assert ("read", "жаба") in log
    assert nearfar(*command, stdin=data).exit_code == 1


@pytest.mark.parametrize("command", READERS, ids=" ".join)
def test_strict_refuses_what_is_partly_read(command: tuple[str, ...], log: list[Any]) -> None:
    data = Path("mixed.pdf").read_bytes()
    result = nearfar(*command, "--strict", stdin=data)
    note = NOTE.replace("mixed.pdf", "stdin") if "-" in command else NOTE
    assert result.exit_code == 1
    assert result.stderr == f"Error: {note} This is refused because of --strict.\n"
    assert log == []


def test_without_strict_it_is_noted() -> None:
    result = nearfar("qa", "mixed.pdf", "-q", "What?", "--no-cache", "--json")
    assert result.exit_code == 0
    assert result.stderr.count(f"Note: {NOTE}\n") == 1
    assert json.loads(result.stdout)["document_notes"] == [NOTE]
    whole = nearfar("qa", "a.txt", "-q", "What?", "--no-cache", "--json", "--strict")
    assert "document_notes" not in json.loads(whole.stdout)
    assert "Note" not in whole.stderr


def test_books_of_questions_are_documents_too() -> None:
    questions = {"book": "mixed.pdf", "questions": [{"question": "Who?", "answer": "Ada"}]}
    Path("data.jsonl").write_text(json.dumps(questions))
    command = ("compare", "--tasks", "qa", "--data", "data.jsonl", "--policies", "sketch")
    result = nearfar(*command, "--strict")
    assert (result.exit_code, result.stderr) == (
        1,
        f"Error: {NOTE} This is refused because of --strict.\n",
    )


@pytest.mark.parametrize(
    ("command", "what"),
    [
        (("qa", "a.txt", "-q", BYTE), "A question (-q)"),
        (("ask", "a.nearfar", "-q", BYTE), "A question (-q)"),
        (("generate", BYTE), "The prompt"),
        (("compare", "a.txt", "-q", BYTE, "--policies", "full"), "A question or an answer"),
        (
            ("compare", "a.txt", "-q", "?", "--answer", BYTE, "--policies", "full"),
            "A question or an answer",
        ),
    ],
)
def test_arguments_that_are_not_utf_8(command: tuple[str, ...], what: str) -> None:
    result = nearfar(*command)
    assert (result.exit_code, result.stderr) == (
        2,
        f"Error: {what} is not valid Unicode: the byte 0xe9 at character 3. Give it in UTF-8.\n",
    )


def test_a_typed_question_that_is_not_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nearfar.cli.answering.on_terminal", lambda: True)
    monkeypatch.setattr("builtins.input", lambda _: BYTE)
    result = nearfar("qa", "a.txt", "--no-cache")
    assert result.exit_code == 2
    assert "The question is not valid Unicode: the byte 0xe9" in result.stderr

    def cannot_decode(_: str) -> str:
        return io.TextIOWrapper(io.BytesIO(b"caf\xe9 \n"), "utf-8").readline()

    monkeypatch.setattr("builtins.input", cannot_decode)
    result = nearfar("qa", "a.txt", "--no-cache")
    assert result.exit_code == 2
    assert "A question that is typed must be UTF-8: invalid continuation byte at byte 3." in (
        result.stderr
    )


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_names_that_are_not_utf_8(log: list[Any], tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9\n.txt")
    Path(name).write_text("Inside.")
    result = nearfar("qa", name, "a.txt", "-q", "What?", "--no-cache", "--json")
    assert result.exit_code == 0, result.output
    assert ("read", "# caf\ufffd\ufffd.txt\n\nInside.\n\n# a.txt\n\nSome text.") in log
    missing = nearfar("qa", name + "x", "-q", "What?")
    assert "Error: caf\ufffd\ufffd.txtx does not exist." in missing.stderr
    other = nearfar("index", name, "-o", os.fsdecode(b"\xe9.nearfar"), "--json")
    assert "\\ud" not in other.stdout


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ('{"context": "half \\ud83d", "questions": []}', "it is not valid Unicode: U+D83D"),
        ("[1]", "it is not an object"),
        ('{"context": 5, "questions": []}', "'int' object has no attribute 'strip'"),
        ("[" * 100_000, "maximum recursion depth exceeded"),
    ],
)
def test_lines_of_questions_that_cannot_be_used(line: str, why: str, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(line)
    result = nearfar("compare", "--tasks", "qa", "--data", path, "--policies", "sketch")
    assert result.exit_code == 1
    assert result.stderr.startswith(
        f"Error: Line 1 of {path} is not a document with questions: {why}"
    )
    assert result.stderr.count("\n") == 1

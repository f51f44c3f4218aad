"""Commands never destroy what is there: other documents, notes, devices; and say so first."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from fake_engine import install, nearfar
from sample_rows import row
from saved_cases import HOW, TEXT, tiny_engine

from nearfar.cli import outputs
from nearfar.evaluation.report.page import write_report

OTHER = "exists and is not a saved document that was made from the same documents."


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    tiny_engine(folder)
    return str(folder)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("book.txt").write_text(TEXT)
    Path("book.html").write_text(f"<p>{TEXT}</p>")
    Path("notes.md").write_text("my thesis")
    os.mkfifo("pipe")
    Path("dangling").symlink_to("gone/a")
    return tmp_path


def test_two_documents_of_one_default_name(model: str, here: Path) -> None:
    def index(*arguments: object) -> tuple[int, str]:
        done = nearfar("index", *arguments, *HOW, "--model", model)
        return done.exit_code, done.stderr

    assert index("book.txt")[0] == 0
    first = Path("book.nearfar").read_bytes()
    code, said = index("book.html")
    assert (code, "Loading" in said) == (2, False)
    assert (
        "book.nearfar exists and holds book.txt. Name another file, or replace it: --force." in said
    )
    assert Path("book.nearfar").read_bytes() == first
    Path("book.txt").write_text(f"{TEXT} and more")  # the same file, made anew
    assert index("book.txt")[0] == 0
    assert Path("book.nearfar").read_bytes() != first
    assert index("book.html", "--force")[0] == 0
    assert index("book.txt")[0] == 2
    Path("real").touch()
    Path("link").symlink_to("real")
    assert index("book.txt", "-o", "link")[0] == 0
    assert Path("link").is_symlink()
    assert Path("real").stat().st_size > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("index", "book.txt", "-o", "gone/a"), "The folder of 'gone/a' does not exist."),
        (("index", "book.txt", "-o", "dangling"), "The folder of 'dangling' (a link to '/"),
        (("index", "book.txt", "-o", "x" * 300), "cannot be written: File name too long."),
        (("index", "book.txt", "-o", ""), "'' is not a file name."),
        (("index", "book.txt", "-o", "notes.md"), f"notes.md {OTHER}"),
        (("index", "-", "-o", "notes.md"), f"notes.md {OTHER}"),
        (("index", "book.txt", "-o", "pipe"), "pipe is a FIFO, but this output needs"),
        (("index", "book.txt", "-o", "book.txt", "--force"), "book.txt is also an input."),
        (("ask", "x", "-q", "a", "--session", "gone/t"), "The folder of 'gone/t' does not exist."),
        (("ask", "x", "-q", "a", "--session", "pipe"), "pipe is a FIFO"),
        (
            ("qa", "book.txt", "-q", "a", "--cache-dir", "notes.md"),
            "notes.md is a file. Name a folder.",
        ),
        (("cache", "clear", "--cache-dir", "notes.md"), "notes.md is a file. Name a folder."),
        (("bench", "decode", "--trace", "notes.md"), "notes.md exists and is not a trace that"),
        (("bench", "decode", "--picture", "gone/a.svg"), "The folder of 'gone/a.svg' does not"),
        (
            ("bench", "decode", "--trace", "a.svg", "--picture", "./a.svg"),
            "--trace and --picture name one file. Name two.",
        ),
    ],
)
def test_refused_before_the_work(
    here: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    log = install(monkeypatch)
    done = nearfar(*arguments, stdin="text")
    assert (done.exit_code, log) == (2, [])
    assert message in done.stderr
    assert Path("notes.md").read_text() == "my thesis"
    assert Path("book.txt").read_text() == TEXT
    assert stat.S_ISFIFO(Path("pipe").lstat().st_mode)


def test_a_session_in_a_file_of_notes(here: Path) -> None:
    done = nearfar("ask", "x", "-q", "a", "--session", "notes.md")
    assert done.exit_code == 2
    assert done.stderr == (
        "Error: notes.md exists and is not an earlier part of this conversation. Name another file "
        "for the conversation.\n"
    )


def test_a_page_replaces_pages_and_nothing_else(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("results.jsonl").write_text(row().to_json() + "\n")

    def page(*arguments: str, stdin: str | None = None) -> tuple[int, str]:
        done = nearfar("report", "page", "results.jsonl", "--output", *arguments, stdin=stdin)
        return done.exit_code, done.stderr

    said = "Error: notes.md exists and is not a page that nearfar made. Name another file, or "
    assert page("notes.md")[0] == 2
    assert said in page("notes.md")[1]
    assert page("results.jsonl", "--force")[0] == 2
    monkeypatch.setattr(outputs, "may_ask", lambda: True)
    assert page("notes.md", stdin="n\n")[0] == 2
    assert Path("notes.md").read_text() == "my thesis"
    assert page("notes.md", stdin="y\n")[0] == 0
    assert Path("notes.md").read_text().startswith("<!doctype html>")
    monkeypatch.undo()
    os.chdir(here)
    assert page("notes.md")[0] == 0  # a page now
    assert page("book.txt", "-f")[0] == 0
    assert page("new/page.html")[0] == 0


def test_a_comparison_leaves_other_files_alone(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = install(monkeypatch)
    Path("out").mkdir()
    results, report = Path("out/results.jsonl"), Path("out/report.html")

    def compare(*arguments: str) -> tuple[int, str]:
        done = nearfar(
            "compare", "book.txt", "-q", "a", "--policies", "h2o", "--output", "out", *arguments
        )
        return done.exit_code, done.stderr

    for content in ("one line without its end", '{"a": 1}\n', '{"schema": 7, "x'):
        results.write_text(content)
        assert compare("--force")[0] == 1
        assert results.read_text() == content
    results.unlink()
    report.write_text("mine")
    code, said = compare()
    assert (code, log) == (2, [])
    assert "report.html exists and is not a page that nearfar made." in said
    write_report([row()], report, overwrite=True)
    report.chmod(0o444)
    assert "report.html is read-only." in compare()[1]

"""`nearfar index`, `ask` and `cache`, and the cache of `qa`, with a tiny real model."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from fake_engine import nearfar
from saved_cases import HOW, TEXT, tiny_engine
from tiny_folder import make_folder

from nearfar.cli import answering, cache
from nearfar.cli.main import cli
from nearfar.runtime.saved import container
from nearfar.runtime.text.tokenizer import Tokenizer

QUESTION = ("-q", "what did the cat do?")
ASK = tuple(word for word in HOW if word not in ("--window", "8"))
SHORT = ("--max-new-tokens", "5")
MORE = "and the red house ran. " * 20


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    tiny_engine(folder)
    return str(folder)


@pytest.fixture
def book(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "book.txt"
    path.write_text(TEXT)
    return path


def run(*arguments: object, stdin: str | None = None) -> Any:
    result = nearfar(*arguments, "--json", stdin=stdin)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def answers(record: Any) -> list[str]:
    return [answer["answer"] for answer in record["answers"]]


def words(*arguments: object) -> tuple[int, str]:
    result = nearfar(*arguments)
    last = result.stderr.strip().splitlines()[-1]
    return result.exit_code, last.removeprefix("Error: ")


def test_indexed_once_and_asked_many_times(model: str, book: Path) -> None:
    fresh = run("qa", book, *QUESTION, *HOW, *SHORT, "--model", model, "--no-cache")
    made = run("index", book, "-o", "a.nearfar", *HOW, "--model", model)
    assert (made["file"], made["model"], made["policy"]) == ("a.nearfar", model, "sketch")
    assert made["file_bytes"] == Path("a.nearfar").stat().st_size
    assert made["context_tokens"] == fresh["context_tokens"]
    for _ in range(2):
        asked = run("ask", "a.nearfar", *QUESTION, *QUESTION, *ASK, *SHORT)
        assert answers(asked) == answers(fresh) * 2
        assert asked["prefill_seconds"] == made["prefill_seconds"]
        assert (fresh["opened"], asked["opened"]) == (False, True)
    table = nearfar("ask", "a.nearfar", *QUESTION, *ASK, *SHORT).stdout
    assert "s, when it was read\n" in re.sub(" +\n", "\n", table)


def test_the_file_is_beside_the_document_by_default(model: str, book: Path) -> None:
    result = nearfar("index", book, *HOW, "--model", model)
    assert result.exit_code == 0, result.output
    assert re.search(rf"^file +{book.with_suffix('.nearfar')} *$", result.stdout, re.M)
    assert book.with_suffix(".nearfar").exists()


def test_a_file_is_read_on_and_given_another_index(model: str, book: Path) -> None:
    run("index", book, "-o", "a.nearfar", *HOW, "--model", model)
    Path("more.txt").write_text("and the red house ran.")
    first = run("index", "a.nearfar", "more.txt", "-o", "b.nearfar", *HOW)
    whole = run(
        "qa", "-", *QUESTION, *HOW, *SHORT, "--model", model, "--policy", "full-far", "--no-cache",
        stdin=f"{TEXT}\n\n# more.txt\n\nand the red house ran.",
    )  # fmt: skip
    exact = run("ask", "b.nearfar", *QUESTION, *ASK, *SHORT, "--policy", "full-far")
    assert first["context_tokens"] == whole["context_tokens"] == exact["context_tokens"]
    assert answers(exact) == answers(whole)
    run("index", "a.nearfar", "more.txt", *HOW)
    code, said = words("index", book, "-o", "a.nearfar", *HOW)
    holds = f"a.nearfar exists and holds {book}, more.txt."
    assert (code, said) == (2, f"{holds} Name another file, or replace it: --force.")
    again = run("index", "b.nearfar", *HOW, "--policy", "lsh-tables:num_tables=20")
    assert again["file"] == "b.nearfar"
    shown = run("cache", "show", "b.nearfar")["documents"][0]
    assert [form["index"] for form in shown["indexes"]] == ["sketch", "lsh-tables"]
    assert shown["sources"] == [str(book), "more.txt"]


def test_a_file_knows_its_model_and_its_policy(model: str, book: Path) -> None:
    options = ("--policy", "h2o", "-o", "a.nearfar", "--model", model)
    run("index", book, *HOW, *options)
    asked = run("ask", "a.nearfar", *QUESTION, "--device", "cpu", "--dtype", "float32", *SHORT)
    assert (asked["policy"], asked["model"]) == ("h2o:recent_share=0.5", model)
    code, said = words("ask", "a.nearfar", *QUESTION, "--policy", "sketch")
    assert code == 1
    assert said.startswith("a.nearfar holds what h2o with a budget of 16 kept, and sketch with")


def test_a_model_that_is_gone_is_asked_for(
    model: str, book: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    here = tmp_path_factory.mktemp("moved") / "m"
    shutil.copytree(model, here)
    run("index", book, "-o", "a.nearfar", *HOW, "--model", here)
    here.rename(here.with_name("there"))
    code, said = words("ask", "a.nearfar", *QUESTION)
    assert code == 2
    assert f"was read by the model '{here}', which is not on this disk. Name it," in said
    moved = run("ask", "a.nearfar", *QUESTION, *ASK, *SHORT, "--model", here.with_name("there"))
    assert moved["opened"]


def test_another_model_is_seen_before_weights_load(model: str, book: Path, tmp_path: Path) -> None:
    run("index", book, "-o", "a.nearfar", *HOW, "--model", model)
    (tmp_path / "other").mkdir()
    make_folder(tmp_path / "other", rms_norm_eps=1e-3)
    result = nearfar("ask", "a.nearfar", *QUESTION, "--model", tmp_path / "other")
    assert result.exit_code == 1
    assert "Loading" not in result.stderr
    assert "a.nearfar was read by another model" in result.stderr


def test_a_session_goes_on_from_call_to_call(model: str, book: Path) -> None:
    run("index", book, "-o", "a.nearfar", *HOW, "--model", model)
    second = ("-q", "and then?")
    together = run("ask", "a.nearfar", *QUESTION, *second, *ASK, *SHORT, "--session", "one")
    first = run("ask", "a.nearfar", *QUESTION, *ASK, *SHORT, "--session", "two")
    then = run("ask", "a.nearfar", *second, *ASK, *SHORT, "--session", "two")
    assert answers(first) + answers(then) == answers(together)
    alone = run("ask", "a.nearfar", *second, *ASK, *SHORT)
    assert answers(alone) != answers(then)
    code, said = words("ask", "a.nearfar", *QUESTION, "--session", "a.nearfar")
    assert (code, said) == (2, "a.nearfar is also an input. Name another file to write.")
    shutil.copy("a.nearfar", "b.nearfar")
    code, said = words("ask", "a.nearfar", *QUESTION, "--session", "b.nearfar")
    other = "Name another file for the conversation."
    assert (code, said) == (2, f"b.nearfar is a document and not a conversation. {other}")
    code, said = words("ask", "a.nearfar", *QUESTION, "--session", "book.txt")
    kind = "an earlier part of this conversation"
    assert (code, said) == (2, f"book.txt exists and is not {kind}. {other}")
    code, said = words("ask", "two", *QUESTION)
    assert code == 1
    assert said == (
        "two is a conversation and not a document. Name the document that it is about, and go on "
        "with it: nearfar ask DOCUMENT --session two"
    )
    Path("two").write_bytes(Path("two").read_bytes()[:-1])
    code, said = words("ask", "a.nearfar", *QUESTION, "--session", "two")
    assert code == 1
    assert said.endswith("Name another file to begin a new conversation")


def test_sources_are_shown(model: str, book: Path) -> None:
    run("index", book, "-o", "a.nearfar", *HOW, "--model", model)
    asked = run("ask", "a.nearfar", *QUESTION, *ASK, *SHORT, "--sources")
    sources = asked["answers"][0]["sources"]
    assert 1 <= len(sources) <= 3
    for source in sources:
        assert source["source"] == str(book)
        assert TEXT[source["start"] : source["stop"]] == source["text"]
    shown = nearfar("ask", "a.nearfar", *QUESTION, *ASK, *SHORT, "--sources").stdout
    assert f"%  {book}:{sources[0]['start']}-{sources[0]['stop']}  " in shown
    without = run("ask", "a.nearfar", *QUESTION, *ASK, *SHORT)
    assert without["answers"][0]["sources"] == []
    assert answers(without) == answers(asked)
    code, said = words("ask", "a.nearfar", *QUESTION, *ASK, "--sources", "--policy", "full")
    assert code == 2
    assert said.startswith("Under full no key is far")


def test_questions_are_read_either_way(model: str, book: Path) -> None:
    run("index", book, "-o", "a.nearfar", *HOW, "--model", model)
    for reading in ("exact", "policy"):
        run("ask", "a.nearfar", *QUESTION, *ASK, *SHORT, "--question", reading)
    code, said = words("ask", "a.nearfar", *QUESTION, "--question", "exactly")
    assert code == 2
    assert said == (
        "Unknown way to read a question (-q is its text) 'exactly'. Did you mean 'exact'? "
        "Known: exact, policy."
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("index", "-"), "Say where to keep what comes from stdin: -o FILE."),
        (("index", "book.txt", "-o", "."), ". is a folder. Name a file: -o book.nearfar"),
        (
            ("index", "book.txt", "-o", "book.txt"),
            "book.txt is also an input. Name another file to write.",
        ),
        (("ask", "book.nearfar"), "Give at least one question: -q QUESTION."),
        (("ask", "book.nearfar", "-q", " "), "A question (-q) is empty."),
        (("cache", "list", "x"), "list takes no names."),
        (
            ("cache", "list", "--cache-dir", ""),
            "Invalid value for '--cache-dir': '' is no name of a folder. Name one.",
        ),
        (("index", ""), "'' is not a file name. Name documents."),
        (("cache", "show"), "Say which document to show: nearfar cache show NAME."),
        (
            ("cache", "show", "zzz"),
            "'zzz' names no documents. Give a file, or a name that `nearfar cache list` shows.",
        ),
    ],
)
def test_command_lines_that_cannot_be_used(
    book: Path, arguments: tuple[str, ...], message: str
) -> None:
    assert words(*arguments) == (2, message)
    assert book.read_text() == TEXT


def test_files_that_cannot_be_asked(book: Path) -> None:
    missing = "a.nearfar does not exist. Make one with: nearfar index DOCUMENT -o FILE"
    assert words("ask", "a.nearfar", *QUESTION) == (2, missing)
    code, said = words("ask", "book.txt", *QUESTION)
    assert code == 1
    assert said.startswith("book.txt is not a saved document: it does not begin as one does.")


@pytest.fixture
def cached(model: str, book: Path) -> tuple[str, ...]:
    """Options under which `qa` keeps what it read in the folder `kept`."""
    return (*QUESTION, *HOW, *SHORT, "--model", model, "--cache-dir", "kept")


def test_qa_reads_a_document_once(book: Path, cached: tuple[str, ...]) -> None:
    first, second = run("qa", book, *cached), run("qa", book, *cached)
    assert (first["opened"], second["opened"]) == (False, True)
    assert answers(first) == answers(second)
    assert first["prefill_seconds"] == second["prefill_seconds"]
    assert not run("qa", book, *cached, "--no-cache")["opened"]
    assert run("qa", book, *cached, "--policy", "lsh-tables:num_tables=20")["opened"]
    assert not run("qa", book, *cached, "--policy", "h2o")["opened"]
    book.write_text(f"{TEXT} more")
    assert not run("qa", book, *cached)["opened"]
    listed = run("cache", "list", "--cache-dir", "kept")
    assert len(listed["documents"]) == 3
    assert listed["bytes"] == sum(path.stat().st_size for path in Path("kept").iterdir())
    table = nearfar("cache", "list", "--cache-dir", "kept").stdout
    for part in ("what h2o kept", "all keys, index of sketch, lsh-tables", "3 documents, "):
        assert part in table


def test_the_cache_is_looked_after(
    book: Path, cached: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    run("qa", book, *cached)
    [entry] = run("cache", "list", "--cache-dir", "kept")["documents"]
    shown = nearfar("cache", "show", entry["name"], "--cache-dir", "kept").stdout
    assert f"{entry['tokens']:,}" in shown
    assert str(book) in shown
    verified = run("cache", "verify", "--cache-dir", "kept")
    assert (verified["verified"], verified["problems"]) == ([entry["file"]], {})
    path = Path(entry["file"])
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.unlink()
    path.write_bytes(data)
    code, said = words("cache", "verify", entry["name"], "--cache-dir", "kept")
    assert code == 1
    assert said.startswith(f"{path} is damaged: section 'index.0.2.counts' differs at byte ")
    assert run("cache", "prune", "--cache-dir", "kept")["removed"] == []
    limited = ("--cache-dir", "kept", "--cache-limit", "1KiB")
    assert run("cache", "prune", *limited)["removed"] == [path.name]
    run("qa", book, *cached)
    whole = nearfar("cache", "verify", "--cache-dir", "kept").stdout
    assert whole == "1 file is as it was written.\n"
    monkeypatch.setattr(cache, "may_ask", lambda: True)  # someone is at a terminal
    kept = "--cache-dir", "kept"
    declined = CliRunner().invoke(cli, ["cache", "clear", *kept], input="n\n")
    assert (declined.exit_code, declined.stdout) == (0, "Nothing is removed.\n")
    assert declined.stderr.startswith("Remove 1 document from kept? [y/N]")
    assert run("cache", *kept)["documents"] == run("cache", "list", *kept)["documents"]
    assert nearfar("cache", "clear", "--yes", *kept).stdout == "1 document removed from kept\n"
    assert list(Path("kept").iterdir()) == []


def test_a_damaged_file_of_the_cache_costs_a_reading(
    book: Path, cached: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    first = run("qa", book, *cached)
    [path] = Path("kept").iterdir()
    data = path.read_bytes()[:-9]
    path.unlink()
    path.write_bytes(data)
    second = run("qa", book, *cached)
    assert answers(second) == answers(first)
    assert not second["opened"]
    assert "cannot be used, it is read again" in caplog.text
    assert run("qa", book, *cached)["opened"]


def test_questions_from_a_terminal(model: str, book: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run("index", book, "-o", "a.nearfar", *HOW, "--model", model)
    monkeypatch.setattr(answering, "on_terminal", lambda: True)
    left = ["what?", ""]
    monkeypatch.setattr("builtins.input", lambda _: left.pop(0))
    result = nearfar("ask", "a.nearfar", *ASK, *SHORT)
    assert result.exit_code == 0, result.output
    assert "Question: what?" in result.stdout


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """Texts that are tokenized, and files of saved documents and conversations that are opened."""
    seen: dict[str, list[str]] = {"tokenized": [], "opened": []}
    encode, opened = Tokenizer.encode_open, container._opened

    def encode_open(self: Tokenizer, parts: Any, *rest: Any, **how: Any) -> Any:
        seen["tokenized"] += [part.text for part in parts if len(part.text) >= len(MORE)]
        return encode(self, parts, *rest, **how)

    def open_file(path: Path, kind: container.Kind) -> Any:
        seen["opened"].append(path.name)
        return opened(path, kind)

    monkeypatch.setattr(Tokenizer, "encode_open", encode_open)
    monkeypatch.setattr(container, "_opened", open_file)
    return seen


def test_what_is_read_is_tokenized_once_and_what_is_saved_is_opened_once(
    model: str, book: Path, counted: dict[str, list[str]]
) -> None:
    def done(*arguments: object) -> tuple[int, list[str]]:
        for each in counted.values():
            each.clear()
        run(*arguments)
        return len(counted["tokenized"]), counted["opened"]

    Path("more.txt").write_text(MORE)
    both = (*QUESTION, *HOW, *SHORT, "--model", model)
    assert done("qa", book, *both, "--no-cache") == (1, [])
    assert done("index", book, "-o", "a.nearfar", *HOW, "--model", model) == (1, [])
    assert done("ask", "a.nearfar", *QUESTION, *ASK, *SHORT) == (0, ["a.nearfar"])
    assert done("index", "a.nearfar", "more.txt", *HOW) == (1, ["a.nearfar"])
    session = ("ask", "a.nearfar", *QUESTION, *ASK, *SHORT, "--session", "talk")
    assert done(*session) == (0, ["a.nearfar"])
    # the second time, before it is replaced: it may have changed since
    assert done(*session) == (0, ["talk", "a.nearfar", "talk"])
    how = (*HOW[:-2], *SHORT, "--model", model)  # budgets are --budgets
    assert done("compare", book, *QUESTION, *how, "--policies", "full,sketch,h2o") == (1, [])

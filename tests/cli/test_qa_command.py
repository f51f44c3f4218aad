from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fake_engine import ANSWERS, HELD, MAX_CONTEXT_TOKENS, install, nearfar

from nearfar.cli import answering
from nearfar.config import EngineConfig, SamplingConfig
from nearfar.errors import OutOfMemoryError
from nearfar.runtime.memory import hardware

QA_KEYS = {
    "model",
    "policy",
    "context_tokens",
    "prefill_seconds",
    "answers",
    "near_bytes",
    "far_bytes",
    "index_bytes",
    "far_bytes_read_per_token",
    "peak_rss_bytes",
    "peak_gpu_bytes",
}


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    return install(monkeypatch)


@pytest.fixture
def document(tmp_path: Path) -> Path:
    path = tmp_path / "notes.md"
    path.write_text("The code of the vault is 7421.")
    return path


def typed(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    """Someone at a terminal types these lines, then Ctrl-D."""
    monkeypatch.setattr(answering, "on_terminal", lambda: True)
    left = list(lines)

    def read_line(prompt: str) -> str:
        if not left:
            raise EOFError
        return left.pop(0)

    monkeypatch.setattr("builtins.input", read_line)


def test_reads_once_answers_all_and_ends_with_a_table(log: list[Any], document: Path) -> None:
    result = nearfar("qa", document, "-q", "What code?", "-q", "Again?")
    assert result.exit_code == 0, result.output
    assert [entry[0] for entry in log] == ["prepare", "plan", "read", "stream", "stream"]
    assert result.stdout.count(ANSWERS["sketch"]) == 2
    lines = " ".join(result.stdout.split())
    for fact in (
        "Question: What code?",
        "tokens read 7",
        "prefill 1.5 s",
        "first token after 250 ms (median of 2 answers)",
        "decoding 40.0 tokens/s",
        "near 2.0 KiB",
        "far 4.0 KiB",
        "index 512 B",
        "far read per token 4.0 KiB",
        "peak memory 1.0 MiB",
    ):
        assert fact in lines


def test_json_is_one_object_and_nothing_else_on_stdout(log: list[Any], document: Path) -> None:
    result = nearfar("qa", document, "-q", "What code?", "--json")
    record = json.loads(result.stdout)
    assert set(record) >= QA_KEYS
    assert record["context_tokens"] == 7
    assert record["policy"] == "sketch"
    assert record["far_bytes_read_per_token"] == 4096.0
    [answer] = record["answers"]
    assert answer["question"] == "What code?"
    assert answer["answer"] == ANSWERS["sketch"]
    assert answer["new_tokens"] == 4
    assert answer["seconds_to_first_token"] == 0.25
    assert answer["tokens_per_second"] == 40.0
    assert "a library prints this" in result.stderr


def test_options_reach_the_engine(log: list[Any], document: Path) -> None:
    options = "--policy streaming-llm --budget 0.5 --sinks 2 --window 9 --max-new-tokens 5 "
    options += "--temperature 0.7 --top-p 0.9 --seed 3 --threads 1 --dtype float32 "
    options += "--far-dtype float16 --near-memory 1GiB --far-memory 2GB --device cpu --model m"
    result = nearfar("qa", document, "-q", "one two", *options.split())
    assert result.exit_code == 0, result.output
    config = EngineConfig(
        policy="streaming-llm",
        budget=0.5,
        sinks=2,
        window=9,
        dtype="float32",
        far_dtype="float16",
        device="cpu",
        threads=1,
        near_memory_bytes=2**30,
        far_memory_bytes=2 * 10**9,
        seed=3,
    )
    assert log[:2] == [("prepare", "m"), ("plan", 7 + 2 + 5, config)]
    assert log[-1] == ("stream", "one two", SamplingConfig(5, 0.7, 0.9, 3))


def test_defaults_are_those_of_the_python_api(log: list[Any], document: Path) -> None:
    nearfar("qa", document, "-q", "What?")
    assert log[1][2] == EngineConfig()
    assert log[-1][2] == SamplingConfig()


def test_several_documents_are_joined_under_their_names(
    log: list[Any], document: Path, tmp_path: Path
) -> None:
    other = tmp_path / "page.html"
    other.write_text("<p>Second</p>")
    nearfar("qa", document, other, "-", "-q", "What?", stdin="Third\n")
    text = (
        "# notes.md\n\nThe code of the vault is 7421.\n\n# page.html\n\nSecond\n\n# stdin\n\nThird"
    )
    assert ("read", text) in log


def test_a_document_from_stdin(log: list[Any]) -> None:
    assert nearfar("qa", "-", "-q", "What?", stdin="piped text").exit_code == 0
    assert ("read", "piped text") in log


def test_stdin_is_read_once(log: list[Any]) -> None:
    result = nearfar("qa", "-", "-", "-q", "What?", stdin="x")
    assert result.exit_code == 2
    assert "stdin (-) can be read only once." in result.stderr


def test_stdin_is_judged_like_a_file(log: list[Any]) -> None:
    empty = nearfar("qa", "-", "-q", "What?", stdin="")
    assert empty.exit_code == 1
    assert empty.stderr == "Error: stdin is empty (0 bytes). Give a document with text.\n"
    binary = nearfar("qa", "-", "-q", "What?", stdin=b"ab\x00c")
    assert "stdin is a binary file (a zero byte at offset 2)." in binary.stderr


def test_questions_are_asked_for_on_a_terminal(
    log: list[Any], document: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    typed(monkeypatch, "First?", " Second? ", "", "never reached")
    result = nearfar("qa", document)
    assert result.exit_code == 0, result.output
    assert [entry[1] for entry in log if entry[0] == "stream"] == ["First?", "Second?"]
    assert result.stdout.count(ANSWERS["sketch"]) == 2
    assert "median of 2 answers" in result.stdout


def test_ctrl_d_ends_the_questions(
    log: list[Any], document: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    typed(monkeypatch)
    result = nearfar("qa", document)
    assert result.exit_code == 0, result.output
    assert "tokens read" in result.stdout
    assert "first token" not in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Give at least one question: -q QUESTION."),
        (["-q", " "], "A question (-q) is empty."),
        (["--json"], "With --json, give at least one question: -q QUESTION."),
    ],
)
def test_without_a_question(
    log: list[Any], document: Path, arguments: list[str], message: str
) -> None:
    result = nearfar("qa", document, *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stdout == ""
    assert log == []


def test_questions_cannot_come_from_a_stdin_that_is_the_document(
    log: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    typed(monkeypatch, "What?")
    assert nearfar("qa", "-", stdin="text").exit_code == 2


def test_a_document_that_is_too_long_is_refused_before_weights_load(
    log: list[Any], tmp_path: Path
) -> None:
    path = tmp_path / "long.txt"
    path.write_text("word " * (MAX_CONTEXT_TOKENS - 2))
    result = nearfar("qa", path, "-q", "one two three")
    assert result.exit_code == 1
    assert result.stderr == (
        "Error: The document has 998 tokens and the question needs 3, but the model reads at most "
        "1,000. Shorten the document, split it, or choose a model with a longer context "
        "(--model).\n"
    )
    assert [entry[0] for entry in log] == ["prepare"]


def test_memory_is_planned_within_the_models_limit(log: list[Any], tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    path.write_text("word " * (MAX_CONTEXT_TOKENS - 3))
    nearfar("qa", path, "-q", "one two")
    assert log[1][1] == MAX_CONTEXT_TOKENS


def test_an_error_with_json_leaves_stdout_empty(
    monkeypatch: pytest.MonkeyPatch, document: Path
) -> None:
    install(monkeypatch, fail_with=OutOfMemoryError("Far memory is full."))
    result = nearfar("qa", document, "-q", "What?", "--json")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.endswith("Error: Far memory is full.\n")


def test_ctrl_c_while_answering(monkeypatch: pytest.MonkeyPatch, document: Path) -> None:
    install(monkeypatch, fail_with=KeyboardInterrupt())
    result = nearfar("qa", document, "-q", "What?", "--json")
    assert result.exit_code == 130
    assert result.stderr.endswith("\nInterrupted.\n")
    assert result.stdout == ""


def test_a_bound_is_kept_and_told(log: list[Any], document: Path) -> None:
    result = nearfar("qa", document, "-q", "What code?", "--epsilon", "0.2")
    assert result.exit_code == 0, result.output
    line = (
        "error at most 0.184 by the policy's own estimate; of 5,400 selections 120 read more than"
    )
    assert f"{line} the budget, 7 of them everything" in result.stdout
    assert "Note: --epsilon means --policy verified:epsilon=0.2.\n" in result.stderr
    again = nearfar("qa", document, "-q", "What code?", "--epsilon", "0.2", "--json")
    record = json.loads(again.stdout)
    assert record["policy"] == "verified:epsilon=0.2"
    assert record["answers"][0]["verification"] == HELD._asdict()
    without = nearfar("qa", document, "-q", "What code?", "--json")
    assert json.loads(without.stdout)["answers"][0]["verification"] is None


def test_a_table_in_a_pipe_has_no_blanks_at_its_ends(log: list[Any], document: Path) -> None:
    lines = nearfar("qa", document, "-q", "What code?").stdout.splitlines()
    table = lines[next(i for i, line in enumerate(lines) if line.startswith("tokens read ")) :]
    assert len(table) > 5
    assert table == [line.rstrip() for line in table]


def test_more_threads_than_can_run_are_noted(
    log: list[Any], document: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "usable_cpus", lambda: {3})
    said = nearfar("qa", document, "-q", "What code?", "--threads", "99").stderr
    note = "Note: --threads is 99, and this process may use 1 logical CPU: threads take turns.\n"
    assert note in said
    assert "Note" not in nearfar("qa", document, "-q", "What code?", "--threads", "1").stderr


def test_a_bound_that_no_policy_keeps_to(log: list[Any], document: Path) -> None:
    result = nearfar("qa", document, "-q", "?", "--epsilon", "0.2", "--policy", "full")
    assert result.exit_code == 2
    lines = " ".join(result.output.replace("│", " ").split())
    assert "--epsilon is the error bound of the policy verified, and --policy is full." in lines
    result = nearfar("qa", document, "-q", "?", "--epsilon", "2")
    assert result.exit_code in (1, 2)
    assert "verified's epsilon must be between 0 and 1. Got 2.0." in result.output

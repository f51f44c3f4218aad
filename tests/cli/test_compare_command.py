from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fake_engine import install, nearfar
from tiny_folder import make_folder, text_of

from nearfar.policies import registry
from nearfar.policies.index import FarIndex
from nearfar.policies.topk_oracle import TopkOracle


class Broken(TopkOracle):
    def new_index(self, *_: Any) -> FarIndex:
        raise ValueError("a defect")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tiny")
    make_folder(folder)
    return str(folder)


@pytest.fixture
def document(tmp_path: Path) -> Path:
    path = tmp_path / "a.txt"
    path.write_text(text_of(150))
    return path


def compare(model: str, *args: object) -> Any:
    own = ("--model", model, "--threads", 1, "--dtype", "float32", "--max-new-tokens", 4)
    return nearfar("compare", *args, *own)


def test_questions_about_a_document(
    model: str, document: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(registry.BUILT_IN, "broken", f"{__name__}:Broken")
    options = ["-q", "what did it do", "--answer", "cat", "-q", "and", "--answer", "sat"]
    more = ["--policies", "sketch, broken,streaming-llm", "--budgets", 30]
    result = compare(model, document, *options, *more, "--json")
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert record["finished"] is True
    assert record["questions"] == ["what did it do", "and"]
    first = [row for row in record["answers"] if row.get("question") != "and"]
    by_policy = {row["policy"]: row for row in first}
    assert list(by_policy) == ["full", "no context", "sketch", "broken", "streaming-llm"]
    assert by_policy["full"]["agreement"] == 1.0
    assert by_policy["full"]["contains"] in (0, 100)
    assert by_policy["broken"]["error"] == "ValueError: a defect"
    assert by_policy["sketch"]["far_bytes"] > 0
    assert by_policy["sketch"]["new_tokens"] <= 4
    assert record["covered"] == []
    table = compare(model, document, *options, *more)
    text = " ".join(table.stdout.replace("│", " ").split())
    for part in ("what did it do", "contains", "agrees", "100%", "failed: ValueError: a defect"):
        assert part in text
    assert "broken 30: ValueError: a defect" in table.stderr


def test_a_budget_that_covers_the_context_and_one_sample(model: str) -> None:
    options = ["--tasks", "niah_single_1", "--policies", "sketch", "--contexts", 600]
    result = compare(model, *options, "--budgets", "20,540", "--samples", 1, "--json")
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert record["covered"] == [{"context_tokens": 600, "budget": 540}]
    assert (
        "Note: a budget of 540 keys covers a context of 600 tokens: there every policy attends to "
        "all keys. Lower --budgets to compare them.\n"
    ) in result.stderr
    assert [(cell["samples"], cell["interval"]) for cell in record["cells"]] == [(1, None)] * 3
    assert "case 1, question 1 · full · score " in result.stderr


@pytest.mark.slow
def test_tasks_go_on_where_they_were_and_end_in_a_page(model: str, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    common = ["--tasks", "needles,perplexity", "--policies", "sketch,h2o", "--contexts", "1K"]
    options = [*common, "--budgets", "30,60", "--output", folder]
    first = compare(model, *options, "--samples", 1)
    assert first.exit_code == 0, first.output
    rows = (folder / "results.jsonl").read_text().splitlines()
    assert len(rows) == 2 * (1 + 2 * 2)  # tasks; exact attention, two policies at two budgets
    second = compare(model, *options, "--samples", 2, "--json")
    assert f"{folder / 'results.jsonl'} has 10 rows; going on from there." in second.stderr
    assert (folder / "results.jsonl").read_text().splitlines()[:10] == rows
    record = json.loads(second.stdout)
    cells = [cell for cell in record["cells"] if cell["task"] == "perplexity"]
    assert [(cell["policy"], cell["budget"]) for cell in cells] == [
        ("full", None), ("sketch", 30), ("sketch", 60), ("h2o", 30), ("h2o", 60),
    ]  # fmt: skip
    for cell in cells:
        low, high = cell["interval"]
        assert low <= cell["score"] <= high
        assert cell["samples"] == 2
        assert cell["seed"] == 0
    assert "Policies compared" in (folder / "report.html").read_text()
    assert sorted(path.name for path in folder.iterdir()) == ["report.html", "results.jsonl"]
    text = " ".join(first.stdout.split())
    assert "1,024 tokens · reads a subset at each step, keeps all" in text
    assert "1,024 tokens · bounded through decode" in text
    assert "1,024 tokens · cost" in text
    assert "needles 1,024 · case 1, question 1 · full" in first.stderr  # later ones may be skipped


def test_time_that_is_up(model: str, tmp_path: Path) -> None:
    options = ["--tasks", "needles", "--policies", "sketch", "--contexts", 1000]
    result = compare(model, *options, "--output", tmp_path, "--minutes", 0, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["finished"] is False
    assert "The time is up. The same command goes on from here." in result.stderr


def test_every_policy_failed(model: str, tmp_path: Path) -> None:
    options = ["--tasks", "niah_single_1", "--policies", "full-far", "--contexts", 1000]
    result = compare(model, *options, "--samples", 1, "--far-memory", "1KiB", "--json")
    assert result.exit_code == 1
    assert result.stdout == ""
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("Error: Every policy failed. full-far: Not enough far memory:")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-q", "One?", "-q", "Two?", "--answer", "a"], "2 expected, 1 given"),
        (["-q", "One?", "--policies", " , "], "--policies names no policy"),
        (["-q", "One?", "--policies", "skech"], "Unknown policy 'skech'. Did you mean 'sketch'?"),
        (["-q", "One?", "--answer", " "], "is empty"),
        ([], "Give questions (-q) about DOCUMENTS, or --tasks: one of the two."),
        (["-q", "One?", "--tasks", "vt"], "one of the two"),
        (["-q", "One?", "--policies", "nonsense"], "Unknown policy 'nonsense'. Known: adakv,"),
        (["--tasks", "vt", "--output", ""], "'' is no name of a folder. Name one."),
        (["--tasks", "vt", "--budgets", "-3"], "Got -3."),
        (["--tasks", "vtt"], "Unknown task 'vtt'. Did you mean 'vt'?"),
        (["--tasks", "vt", "--contexts", "4G"], "A context is a number of tokens, like 8192"),
        (["--tasks", "vt", "--budgets", "x"], "A budget is a number, like 1024. Got 'x'."),
        (["--tasks", "vt", "--budgets", "-3"], "A budget is a whole number of far keys"),
        (["--tasks", "qa"], "The task qa needs a file of questions: --data FILE."),
        (["--tasks", "qa", "--data", "gone.jsonl"], "gone.jsonl does not exist. Check the path."),
    ],
)
def test_mistakes_are_found_before_the_model_is_opened(
    monkeypatch: pytest.MonkeyPatch, document: Path, options: list[str], message: str
) -> None:
    log = install(monkeypatch)
    policies = [] if "--policies" in options else ["--policies", "sketch"]
    result = nearfar("compare", document, *options, *policies)
    assert result.exit_code in (1, 2)
    assert message in result.stderr
    assert log == []


def test_questions_need_a_document() -> None:
    result = nearfar("compare", "-q", "One?", "--policies", "sketch")
    assert result.exit_code == 2
    assert "Give the DOCUMENTS that the questions are about." in result.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--contexts", "8K"], "A context of 8,192 tokens is not between 1 and the 4,096 that"),
        (["--samples", "0"], "samples must be 1 or more. Got 0."),
        (["--contexts", "100"], "A context of 100 tokens has no room for the question"),
        (["--tasks", "qa_1"], "qa_1 needs a file of questions with paragraphs"),
    ],
)
def test_mistakes_that_the_model_shows(model: str, options: list[str], message: str) -> None:
    tasks = [] if "--tasks" in options else ["--tasks", "niah_single_1"]
    result = compare(model, *tasks, "--policies", "sketch", *options)
    assert result.exit_code == 2
    assert message in result.stderr

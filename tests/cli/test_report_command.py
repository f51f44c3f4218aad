from __future__ import annotations

import json
from pathlib import Path

import pytest
from fake_engine import nearfar
from sample_rows import row
from tiny_folder import make_folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tiny")
    make_folder(folder)
    return str(folder)


def results(path: Path, cases: range) -> Path:
    path.write_text("".join(f"{row(case=case).to_json()}\n" for case in cases))
    return path


@pytest.mark.parametrize("word", [[], ["page"]])
def test_files_are_merged_into_one_page(tmp_path: Path, word: list[str]) -> None:
    first, second = results(tmp_path / "a", range(3)), results(tmp_path / "b", range(2, 7))
    page = tmp_path / "page.html"
    done = nearfar("report", *word, "--output", page, first, second)
    assert done.exit_code == 0, done.output
    assert done.stderr == f"Wrote {page} from 7 rows.\n"
    assert "from 7 rows" in page.read_text()


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    gone = nearfar("report", tmp_path / "gone.jsonl")
    assert gone.exit_code == 2
    assert "does not exist" in gone.stderr
    bad = tmp_path / "bad.jsonl"
    bad.write_text("{}\n")
    wrong = nearfar("report", bad)
    assert wrong.exit_code == 1
    assert f"Error: Line 1 of {bad} is not a result of nearfar compare" in wrong.stderr
    bad.write_text("")
    empty = nearfar("report", bad)
    assert empty.exit_code == 1
    assert f"{bad} has no results. Run nearfar compare --output first." in empty.stderr


def test_bytes_of_a_context(model: str) -> None:
    options = ["--model", model, "--context", 1500, "--threads", 1, "--dtype", "float32"]
    done = nearfar("report", "memory", *options, "--json")
    assert done.exit_code == 0, done.output
    record = json.loads(done.stdout)
    assert record["context_tokens"] == 1500
    policies = {each["policy"]: each for each in record["policies"]}
    assert {"full", "sketch", "h2o", "lsh-tables"} <= set(policies)
    assert "less" not in policies
    assert "less: less was trained for a model of 30 layers" in done.stderr
    for each in policies.values():
        assert abs(each["held_bytes"] - each["predicted_bytes"]) <= 0.05 * each["held_bytes"]
        tiers = {(part["tier"], part["name"]) for part in each["parts"]}
        assert ("near", "weights") in tiers
    table = nearfar("report", "memory", *options, "--policies", "sketch,h2o")
    text = " ".join(table.stdout.replace("│", " ").split())
    assert "Bytes of a context of 1,500 tokens" in text
    assert "positions and scores" in text


def test_contexts_that_do_not_fit(model: str) -> None:
    options = ["--model", model, "--policies", "sketch,full", "--far-memory", "1KiB"]
    done = nearfar("report", "memory", *options)
    assert done.exit_code == 0, done.output
    assert "sketch: Not enough far memory" in done.stderr
    assert "full" in done.stdout
    alone = nearfar("report", "memory", *options[:2], "--policies", "sketch", *options[4:])
    assert alone.exit_code == 1
    assert "No policy's context fits. Give a smaller --context." in alone.stderr
    assert nearfar("report", "memory", "--context", 0).exit_code == 2

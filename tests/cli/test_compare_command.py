from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fake_engine import install, nearfar


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    return install(monkeypatch)


@pytest.fixture
def document(tmp_path: Path) -> Path:
    path = tmp_path / "a.txt"
    path.write_text("The code is 7421.")
    return path


def test_json(log: list[Any], document: Path) -> None:
    options = ["-q", "What code?", "--answer", "7421", "--json"]
    policies = "sketch,streaming-llm, h2o ,topk-oracle"
    result = nearfar("compare", document, *options, "--policies", policies)
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    rows = {row["policy"]: row for row in record["policies"]}
    assert list(rows) == ["full", "sketch", "streaming-llm", "h2o", "topk-oracle"]
    full, sketch, streaming = (rows[name]["answers"][0] for name in list(rows)[:3])
    assert full["agreement"] == sketch["agreement"] == 1.0
    assert sketch["contains"] is True
    assert sketch["exact_match"] is False
    assert streaming["contains"] is False
    assert streaming["agreement"] == 0.0
    assert rows["sketch"]["far_bytes"] == 4096
    assert rows["h2o"]["error"] == "Near memory is full: 3 GiB needed, 2 GiB allowed."
    assert rows["topk-oracle"]["error"] == "ValueError: a defect"
    assert rows["h2o"]["answers"] == []
    assert log[1][1] is None  # memory is planned policy by policy


def test_the_table_says_all(log: list[Any], document: Path) -> None:
    result = nearfar(
        "compare", document, "-q", "What code?", "--answer", "7421", "--policies", "sketch,h2o"
    )
    assert result.exit_code == 0, result.output
    text = " ".join(result.stdout.replace("│", " ").split())
    for part in ("What code?", "exact", "contains", "agrees", "7421", "yes", "100%", "40.0"):
        assert part in text
    assert "failed:" in text
    assert "h2o: Near memory is full" in result.stderr


def test_every_policy_failed(monkeypatch: pytest.MonkeyPatch, document: Path) -> None:
    install(monkeypatch, fail_with=ValueError("broken"))
    result = nearfar("compare", document, "-q", "What?", "--policies", "sketch", "--json")
    assert result.exit_code == 1
    assert result.stdout == ""
    expected = "Error: Every policy failed. full: ValueError: broken sketch: ValueError: broken\n"
    assert result.stderr.endswith(expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--policies", "sketch", "--answer", "a"], "2 expected, 1 given"),
        (["--policies", " , "], "--policies names no policy"),
        (["--policies", "skech"], "Unknown policy 'skech'. Did you mean 'sketch'?"),
        ([], "Missing option '--policies'"),
        (["--policies", "sketch", "--answer", "a", "--answer", " "], "is empty"),
    ],
)
def test_mistakes_are_found_before_the_model_is_opened(
    log: list[Any], document: Path, options: list[str], message: str
) -> None:
    result = nearfar("compare", document, "-q", "One?", "-q", "Two?", *options)
    assert result.exit_code == 2
    assert message in result.stderr
    assert log == []

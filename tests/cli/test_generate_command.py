from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fake_engine import MAX_CONTEXT_TOKENS, install, nearfar

from nearfar.config import SamplingConfig


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    return install(monkeypatch)


def test_streams_the_text_alone_to_stdout(log: list[Any]) -> None:
    result = nearfar("generate", "Once upon", "--max-new-tokens", 3)
    assert result.exit_code == 0, result.output
    assert result.stdout == "and so on \n"
    assert log[-1] == ("generate", "Once upon", SamplingConfig(max_new_tokens=3), False)
    assert log[1][1] == 2 + 3
    assert "7 prompt tokens, 3 new; first after 250 ms, then 40.0 tokens/s" in result.stderr


def test_chat_template(log: list[Any]) -> None:
    nearfar("generate", "Hello", "--chat")
    assert log[-1][3] is True


def test_prompt_from_a_file_loses_the_line_end_that_closes_it(
    log: list[Any], tmp_path: Path
) -> None:
    path = tmp_path / "prompt.txt"
    path.write_text("  two\nlines\n")
    nearfar("generate", "--file", path)
    assert log[-1][1] == "  two\nlines"


def test_prompt_from_stdin(log: list[Any]) -> None:
    nearfar("generate", "-", stdin="piped\n")
    assert log[-1][1] == "piped"


def test_json(log: list[Any]) -> None:
    record = json.loads(nearfar("generate", "Once", "--json").stdout)
    assert record["text"] == "and so on"
    assert record["new_tokens"] == 3
    assert record["finish_reason"] == "stop"
    assert record["peak_rss_bytes"] == 2**20
    assert record["model"] == "fake"


@pytest.mark.parametrize("arguments", [[], ["x", "--file", "y"], [""]])
def test_not_exactly_one_prompt(log: list[Any], arguments: list[str]) -> None:
    result = nearfar("generate", *arguments)
    assert result.exit_code == 2
    assert "prompt" in result.stderr
    assert log == []


def test_a_prompt_that_is_too_long(log: list[Any]) -> None:
    assert nearfar("generate", "word " * MAX_CONTEXT_TOKENS).exit_code == 0
    log.clear()
    result = nearfar("generate", "word " * (MAX_CONTEXT_TOKENS + 1))
    assert result.exit_code == 1
    assert "The prompt has 1,001 tokens, but the model reads at most 1,000." in result.stderr

"""`--thinking`, `--no-thinking` and thoughts, through the commands, with a tiny real model."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from fake_engine import nearfar
from thinking import HEAD, QWEN3, R1, Says, library
from tiny_folder import make_folder, text_of

from nearfar.evaluation.harness import case_run
from nearfar.evaluation.harness.answering import answer as answer_of_model
from nearfar.runtime.checkpoints.tokenizer_files import read_tokenizer
from nearfar.runtime.engine import generation
from nearfar.runtime.text.tokenizer import Tokenizer

THOUGHT = "<think>the dog</think>\n\na cat"
HOW = ("--device", "cpu", "--dtype", "float32", "--threads", 1)
ASKED = ("-q", "who?", "--json", *HOW)


def model_with(folder: Path, template: str) -> str:
    folder.mkdir()
    make_folder(folder)
    (folder / "tokenizer.json").write_text(library(False).to_str())
    settings = {"eos_token": "<|im_end|>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder.parent / "book.txt").write_text(text_of(60))
    return str(folder)


def index(book: Path, model: str, *options: str) -> Path:
    target = book.parent / f"book{''.join(options)}.nearfar"
    result = nearfar("index", book, "-o", target, "--model", model, *HOW, *options)
    assert result.exit_code == 0, result.output
    return target


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The question as it was read, whatever is answered: a thought and an answer."""
    seen: list[str] = []
    drawn = generation.GenerationState.read_prompt

    def read_prompt(run: Any, decoder: Any, ids: list[int], chunk_tokens: int) -> None:
        own = Tokenizer(library(False).to_str(), {})
        seen.append(own.decode(ids, skip_special_tokens=False))
        run._sampler = Says(own.encode(THOUGHT + "<|im_end|>"))
        drawn(run, decoder, ids, chunk_tokens)

    monkeypatch.setattr(generation.GenerationState, "read_prompt", read_prompt)
    return seen


@pytest.mark.parametrize(
    ("options", "end"),
    [
        ([], "assistant\n"),
        (["--thinking"], "assistant\n"),
        (["--no-thinking"], "assistant\n<think>\n\n</think>\n\n"),
    ],
)
def test_one_file_is_asked_with_thinking_and_without(
    tmp_path: Path, read: list[str], options: list[str], end: str
) -> None:
    model = model_with(tmp_path / "model", QWEN3)
    for made in ([], ["--no-thinking"]):  # what is before the document is the same
        book = index(tmp_path / "book.txt", model, *made)
        result = nearfar("ask", book, *ASKED, *options)
        assert result.exit_code == 0, result.output
        [answer] = json.loads(result.stdout)["answers"]
        assert (answer["thought"], answer["answer"]) == ("the dog", "a cat")
        assert read[-1].endswith(f"who?<|im_end|>\n<|im_start|>{end}")


def test_a_file_that_was_read_under_another_setting_says_which(
    tmp_path: Path, read: list[str]
) -> None:
    model = model_with(tmp_path / "model", HEAD)
    plain = index(tmp_path / "book.txt", model)
    told = index(tmp_path / "book.txt", model, "--no-thinking")
    neither = "neither --thinking nor --no-thinking"
    cases: tuple[tuple[Path, list[str], str], ...] = (
        (told, [], "--no-thinking"),
        (told, ["--thinking"], "--no-thinking"),
        (plain, ["--no-thinking"], neither),
    )
    for book, options, named in cases:
        result = nearfar("ask", book, *ASKED, *options)
        message = (
            f"Error: {book} was read with {named}, and the chat template begins otherwise now. "
            f"Ask it with {named}, or index the document again."
        )
        assert (result.exit_code, " ".join(result.stderr.split())) == (1, message)
        assert read == []
    for book, options in ((told, ["--no-thinking"]), (plain, []), (plain, ["--thinking"])):
        assert nearfar("ask", book, *ASKED, *options).exit_code == 0
    (Path(model) / "tokenizer_config.json").write_text(json.dumps({"chat_template": f"a{QWEN3}"}))
    result = nearfar("ask", plain, *ASKED)
    assert "was read with another tokenizer or chat template than" in result.stderr


def test_a_template_without_a_switch(tmp_path: Path) -> None:
    model = model_with(tmp_path / "model", R1)
    target = tmp_path / "a.nearfar"
    for option in ("--thinking", "--no-thinking"):
        for command in (("index", tmp_path / "book.txt", "-o", target), ("qa", "-", *ASKED)):
            result = nearfar(*command, "--model", model, option, stdin="the cat")
            assert result.exit_code == 2
            assert "The model's chat template has no switch for thinking" in result.stderr
    assert not target.exists()


@pytest.mark.parametrize(("template", "said"), [(QWEN3, THOUGHT), (R1, THOUGHT[7:])])
def test_compare_counts_the_answer_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, template: str, said: str
) -> None:
    model = model_with(tmp_path / "model", template)
    ids = tuple(read_tokenizer(Path(model)).encode(said))

    def answer(*arguments: Any) -> Any:
        return dataclasses.replace(answer_of_model(*arguments), token_ids=ids)

    monkeypatch.setattr(case_run, "answer", answer)
    asked = ("-q", "who?", "--answer", "cat", "-q", "what?", "--answer", "dog")
    options = ("--policies", "sketch", "--budgets", 30, "--max-new-tokens", 3, "--json")
    result = nearfar("compare", tmp_path / "book.txt", *asked, *options, *HOW, "--model", model)
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["answers"]
    scores = {row["question"]: row["contains"] for row in rows if row["policy"] == "sketch"}
    assert scores == {"who?": 100, "what?": 0}
    assert {row["answer"] for row in rows} == {"a cat"}

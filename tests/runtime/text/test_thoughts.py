from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from thinking import HEAD, QWEN3, R1, Says, library
from tiny_folder import make_folder
from tiny_gguf import TEMPLATE

from nearfar.config import EngineConfig, SamplingConfig
from nearfar.errors import InvalidOptionError
from nearfar.runtime.engine import generation
from nearfar.runtime.engine.engine import Engine
from nearfar.runtime.text import tokenizer as tokenizer_module
from nearfar.runtime.text.thoughts import ThoughtSplitter, answer_of, opened_by


def split(pieces: list[str], closing: str | None = None) -> tuple[str, str, bool]:
    splitter = ThoughtSplitter(closing)
    parts = [*map(splitter.push, pieces), splitter.finish()]
    return "".join(t for t, _ in parts), "".join(a for _, a in parts), splitter.in_thought


TEXTS = [
    ("Ada.", None, "", "Ada.", False),
    ("  Ada.", None, "", "  Ada.", False),
    ("<think>Hm</think>\n\nAda.", None, "Hm", "Ada.", False),
    ("\n<think>Hm < 3</think> Ada </think>.", None, "Hm < 3", "Ada </think>.", False),
    ("<think>a</think>\n<think>b</think>c", None, "ab", "c", False),
    ("<think>Hm</thi", None, "Hm</thi", "", True),
    ("<think>", None, "", "", True),
    ("<thin ice>", None, "", "<thin ice>", False),
    ("<thi", None, "", "<thi", False),
    ("Say <think>x</think>", None, "", "Say <think>x</think>", False),
    ("Hm</think>Ada", "</think>", "Hm", "Ada", False),
    ("Hm", "</think>", "Hm", "", True),
    ("[THINK]Hm[/THINK]Ada", None, "Hm", "Ada", False),
    ("", None, "", "", False),
]


@pytest.mark.parametrize(("text", "closing", "thought", "answer", "in_thought"), TEXTS)
@given(cuts=st.lists(st.integers(0, 40), max_size=12))
def test_thought_and_answer_are_told_apart_however_the_text_comes(
    text: str, closing: str | None, thought: str, answer: str, in_thought: bool, cuts: list[int]
) -> None:
    ends = sorted({min(cut, len(text)) for cut in cuts} | {0, len(text)})
    pieces = [text[a:b] for a, b in pairwise(ends)]
    assert split(pieces, closing) == (thought, answer, in_thought)
    assert split(list(text), closing) == (thought, answer, in_thought)
    assert answer_of(text, closing) == answer


def test_a_prompt_begins_a_thought_where_its_last_mark_is_open() -> None:
    assert opened_by("<|im_start|>assistant\n<think>\n") == "</think>"
    assert opened_by("<think>\n\n</think>\n\n") is None
    assert opened_by("assistant\n") is None
    assert opened_by("[THINK]") == "[/THINK]"


def tokenizer_with(template: str | None, special: bool = False) -> tokenizer_module.Tokenizer:
    settings = {"eos_token": "<|im_end|>"}
    return tokenizer_module.Tokenizer(library(special).to_str(), settings, template)


@pytest.mark.parametrize("special", [False, True])
def test_marks_are_text_also_as_control_tokens(special: bool) -> None:
    tokenizer = tokenizer_with(TEMPLATE, special)
    ids = tokenizer.encode("[THINK]Hm[/THINK]Ada<|im_end|>")
    stream = tokenizer.stream()
    assert "".join([*map(stream.push, ids), stream.finish()]) == "[THINK]Hm[/THINK]Ada"
    assert tokenizer.decode(ids) == "[THINK]Hm[/THINK]Ada"


def test_a_template_is_told_to_let_the_model_think_or_not() -> None:
    tokenizer = tokenizer_with(QWEN3)
    assert tokenizer.with_thinking(None) is tokenizer
    ends = {}
    for wanted in (None, True, False):
        template = tokenizer.with_thinking(wanted).template
        assert template is not None
        ends[wanted] = template.around(["user"])[1]
    assert ends[None] == ends[True]
    assert ends[False] == ends[True] + "<think>\n\n</think>\n\n"
    assert tokenizer.with_thinking(False).identity == tokenizer.identity  # what is read is the same
    assert tokenizer.with_thinking(False).thought_of_prompt() is None
    assert tokenizer_with(R1).thought_of_prompt() == "</think>"
    told = tokenizer_with(HEAD)
    assert told.with_thinking(False).identity != told.identity
    assert told.with_thinking(True).identity == told.identity
    with pytest.raises(InvalidOptionError, match="no switch for thinking"):
        tokenizer_with(TEMPLATE).with_thinking(True)
    with pytest.raises(InvalidOptionError, match="no chat template, so thinking can be turned"):
        tokenizer_with(None).with_thinking(False)


@pytest.mark.parametrize(
    ("template", "says", "most", "thought", "text", "inside"),
    [
        (QWEN3, "<think>Hmok</think>\n\nAda<|im_end|>", 99, "Hmok", "Ada", False),
        (QWEN3, "<think>Hmok</think>Ada", 4, "Hmo", "", True),
        (R1, "Hmok</think>\n\nAda<|im_end|>", 99, "Hmok", "Ada", False),
        (R1, "Hmok", 3, "Hmo", "", True),
        (TEMPLATE, "Ada<|im_end|>", 99, "", "Ada", False),
    ],
)
def test_answers_come_without_their_thoughts(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    template: str,
    says: str,
    most: int,
    thought: str,
    text: str,
    inside: bool,
) -> None:
    folder = tmp_path / "model"
    make_folder(folder)
    (folder / "tokenizer.json").write_text(library(False).to_str())
    settings = {"eos_token": "<|im_end|>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    sizes: Any = {"policy": "full", "dtype": "float32", "far_dtype": "float32"}
    engine = Engine.from_pretrained(str(folder), EngineConfig(device="cpu", threads=1, **sizes))
    ids = engine.tokenizer.encode(says)
    monkeypatch.setattr(generation, "Sampler", lambda _config: Says(ids))
    heard: list[str] = []
    engine.on_thought = heard.append
    sampling = SamplingConfig(max_new_tokens=most)
    stream = engine.stream("who?", sampling, chat=True)
    assert "".join(stream) == stream.result.text == text
    assert stream.result.thought == "".join(heard).strip() == thought
    assert stream.result.ended_in_thought == inside
    assert stream.result.finish_reason == ("length" if inside else "stop")
    [batched] = engine.generate(["who?"], sampling, chat=True)
    assert (batched.text, batched.thought, batched.ended_in_thought) == (text, thought, inside)

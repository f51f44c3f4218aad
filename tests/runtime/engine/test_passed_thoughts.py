"""What later questions of a conversation see of the thoughts before earlier answers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from interruptions import every_so_often
from saved_cases import SETTINGS
from thinking import Says, library
from tiny_folder import make_folder, text_of
from transformers import PreTrainedTokenizerFast

from nearfar.config import SamplingConfig
from nearfar.runtime.engine import generation
from nearfar.runtime.engine.engine import Engine
from nearfar.runtime.text.chat import INSTRUCTION

TEXT = text_of(60)
FIVE = SamplingConfig(max_new_tokens=5)
TURNS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ SHOWN }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{{ OPENED }}{% endif %}"
)
KEPT = TURNS.replace("SHOWN", "m['content']").replace("OPENED", "''")
DROPPED = TURNS.replace("SHOWN", "m['content'].split('</think>')[-1].strip()")
QWEN3 = DROPPED.replace(
    "OPENED", "'<think>\n\n</think>\n\n' if enable_thinking is defined and not enable_thinking"
)
R1 = DROPPED.replace("OPENED", "'<think>\n'")
SWITCHED_OFF = {"enable_thinking": False}
THOUGHT = "<think>Hm</think>\n\nthe cat"
CASES: dict[str, tuple[str, bool | None, list[str]]] = {
    "kept": (KEPT, None, [THOUGHT, "a red cat"]),
    "qwen3": (QWEN3, None, [THOUGHT, "a red cat", THOUGHT]),
    "empty thought": (QWEN3, None, ["<think>\n\n</think>\n\nthe cat", "it"]),
    "qwen3 not thinking": (QWEN3, False, ["the cat", "a red cat"]),
    "r1": (R1, None, ["Hm</think>\n\nthe cat", "Hmok</think>it"]),
    "cut off in a thought": (R1, None, ["Hm"]),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("model")
    model = make_folder(folder, context=3000)
    (folder / "tokenizer.json").write_text(library(False).to_str())
    return folder, model


def engine_with(folder: Path, template: str, **changes: Any) -> Engine:
    settings = {"eos_token": "<|im_end|>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return Engine.from_pretrained(str(folder), SETTINGS.replace(**changes))


def answers(patch: pytest.MonkeyPatch, talk: Any, said: list[str], engine: Engine) -> Iterator[Any]:
    """Ask for each of ``said``, which the model is made to say."""
    for i, text in enumerate(said, start=len(talk.turns)):
        ids = engine.tokenizer.encode(text + "<|im_end|>")
        with patch.context() as forced:
            forced.setattr(generation, "Sampler", lambda _, ids=ids: Says(ids))
            yield talk.ask(f"q{i}?", SamplingConfig(max_new_tokens=len(ids)))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("policy", ["full", "full-far"])
def test_the_next_question_reads_what_the_template_shows(
    made: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch, name: str, policy: str
) -> None:
    template, thinking, said = CASES[name]
    engine = engine_with(made[0], template, policy=policy, thinking=thinking)
    talk = engine.read(TEXT).conversation()
    list(answers(monkeypatch, talk, said, engine))
    got = talk.ask("and?", FIVE)
    messages = [{"role": "user", "content": f"{INSTRUCTION}\n\n{TEXT}\n\nq0?"}]
    for i, text in enumerate(said):
        content = text if "</think>" in text or template != R1 else f"{text}</think>"
        messages += [
            {"role": "assistant", "content": content},
            {"role": "user", "content": f"q{i + 1}?" if i + 1 < len(said) else "and?"},
        ]
    theirs = PreTrainedTokenizerFast(tokenizer_object=library(False))
    options: Any = {"chat_template": template, "add_generation_prompt": True, "return_dict": False}
    switch = {} if thinking is None else SWITCHED_OFF
    ids = theirs.apply_chat_template(messages, **options, **switch)
    wanted = made[1].generate(
        torch.tensor([ids]), max_new_tokens=5, do_sample=False, eos_token_id=None
    )
    drawn = wanted[0, len(ids) :].tolist()
    own = [*got.token_ids, *([2] if got.finish_reason == "stop" else [])]
    assert own == drawn[: len(own)]
    assert talk._answerer.held.sequence.tokens == len(ids) + len(own) - 1


@pytest.mark.parametrize("policy", ["sketch", "h2o", "full"])
def test_a_question_interrupted_after_a_thought(
    made: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch, policy: str
) -> None:
    engine = engine_with(made[0], QWEN3, policy=policy)
    document = engine.read(TEXT)
    twin, talk = document.conversation(), document.conversation()
    said = [THOUGHT, "it", THOUGHT]
    wanted = [*answers(monkeypatch, twin, said, engine), twin.ask("and?", FIVE)]
    list(answers(monkeypatch, talk, said[:1], engine))
    tries = 0
    for line in every_so_often(
        lambda: list(answers(monkeypatch, talk, said[1:2], engine)), stride=997, first=61
    ):
        assert [turn.answer for turn in talk.turns] == ["the cat"], line
        tries += 1
    assert tries > 1
    list(answers(monkeypatch, talk, said[2:], engine))
    last = talk.ask("and?", FIVE)
    assert [turn.answer for turn in talk.turns][:3] == [each.text for each in wanted[:3]]
    assert last.token_ids == wanted[3].token_ids


@pytest.mark.parametrize("policy", ["sketch", "h2o", "adakv", "full"])
def test_it_is_saved_so_and_asked_in_between(
    made: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: str
) -> None:
    engine = engine_with(made[0], QWEN3, policy=policy)
    document = engine.read(TEXT)
    talk = document.conversation()
    for i, _ in enumerate(answers(monkeypatch, talk, [THOUGHT, THOUGHT, "it"], engine)):
        document.ask("other?", FIVE)
        talk.save(tmp_path / f"talk{i}")
    wanted = talk.ask("and?", FIVE).token_ids
    again = document.conversation(tmp_path / "talk2")
    assert [turn.answer for turn in again.turns] == ["the cat", "the cat", "it"]
    assert again.ask("and?", FIVE).token_ids == wanted
    early = document.conversation(tmp_path / "talk1")
    list(answers(monkeypatch, early, ["it"], engine))
    assert early.ask("and?", FIVE).token_ids == wanted

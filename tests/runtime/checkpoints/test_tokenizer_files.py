"""Settings and templates in all their places, against transformers' own reading of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing

from nearfar.errors import CheckpointError
from nearfar.runtime.checkpoints.tokenizer_files import read_tokenizer
from nearfar.runtime.text.tokenizer import Part

CONTROL = ["<s>", "</s>", "<|eot_id|>", "<|user|>", "<|assistant|>"]
TURNS = (
    "{{ bos_token }}{% for m in messages %}<|user|>{{ m['content'] }}END{% endfor %}<|assistant|>"
)


def library(bos: bool = False) -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({each: i for i, each in enumerate([*CONTROL, *alphabet])}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(each, normalized=False) for each in CONTROL])
    if bos:
        single = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
        made.post_processor = single
    return made


def folder_with(
    folder: Path, settings: Any, files: dict[str, str] | None = None, bos: bool = False
) -> Path:
    (folder / "tokenizer.json").write_text(library(bos).to_str())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    for name, text in (files or {}).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return folder


def of_transformers(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


PLACES: dict[str, tuple[Any, dict[str, str]]] = {
    "settings": ({"chat_template": "A"}, {}),
    "list": ({"chat_template": [{"name": "default", "template": "A"}]}, {}),
    "object": ({"chat_template": {"default": "A", "rag": "B"}}, {}),
    "file": ({"chat_template": "B"}, {"chat_template.jinja": "A"}),
    "file and more": (
        {"chat_template": "B"},
        {"chat_template.jinja": "A", "additional_chat_templates/rag.jinja": "C"},
    ),
    "more alone": ({"chat_template": "B"}, {"additional_chat_templates/default.jinja": "A"}),
    "processor's is second": ({"chat_template": "A"}, {"chat_template.json": "{}"}),
}


@pytest.mark.parametrize("place", PLACES)
def test_the_template_is_the_one_that_transformers_takes(tmp_path: Path, place: str) -> None:
    folder = folder_with(tmp_path, *PLACES[place])
    assert read_tokenizer(folder).chat_template == "A"
    assert of_transformers(folder).get_chat_template() == "A"


def test_a_template_that_only_processors_read_is_better_than_none(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, {}, {"chat_template.json": json.dumps({"chat_template": "A"})})
    assert read_tokenizer(folder).chat_template == "A"


@pytest.mark.parametrize(
    ("settings", "files", "text"),
    [
        (
            {
                "chat_template": [
                    {"name": "rag", "template": "A"},
                    {"name": "chat", "template": "B"},
                ]
            },
            {},
            r"has chat templates for chat, rag, and none that is named 'default'\. Give the one",
        ),
        ({}, {"additional_chat_templates/rag.jinja": "A"}, r"has chat templates for rag, and none"),
        ({"chat_template": [{"template": "x"}]}, {}, r"'chat_template' in .* must be a text, or "),
        ({"chat_template": [3]}, {}, r"'chat_template' in .* must be a text, or texts with names"),
        ({"chat_template": 7}, {}, r"'chat_template' in .* must be a text, or texts with names"),
        ({"chat_template": {}}, {}, r"has chat templates for nothing, and none that is named"),
        ([], {}, r"tokenizer_config\.json must hold a JSON object\. Got a list\. Download"),
        (
            {"eos_token": {"id": 3}},
            {},
            r"'eos_token' must be the text of a token\. Got \{'id': 3\}",
        ),
        ({"eos_token": ["</s>"]}, {}, r"'eos_token' must be the text of a token\. Got \['</s>'\]"),
        (
            {"bos_token": 3},
            {},
            r"'bos_token' must be the text of a token\. Got 3\. It is in .*json",
        ),
        (
            {"added_tokens_decoder": {"5": {}}},
            {},
            r"'added_tokens_decoder' in .* must be an object",
        ),
        ({"added_tokens_decoder": {"x": {"content": "a"}}}, {}, r"must be an object of ids"),
        ({}, {"special_tokens_map.json": "{"}, r"special_tokens_map\.json is not valid JSON"),
    ],
)
def test_settings_of_another_form_are_refused(
    tmp_path: Path, settings: Any, files: dict[str, str], text: str
) -> None:
    with pytest.raises(CheckpointError, match=text) as caught:
        read_tokenizer(folder_with(tmp_path, settings, files))
    assert "\n" not in str(caught.value)


def _token(content: str) -> dict[str, Any]:
    return {"__type": "AddedToken", "content": content, "special": True, "normalized": False}


NAMED: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "settings": ({"bos_token": "<s>", "eos_token": "</s>"}, {}),
    "objects": ({"bos_token": _token("<s>"), "eos_token": _token("</s>")}, {}),
    "map": ({}, {"special_tokens_map.json": '{"bos_token": "<s>", "eos_token": "</s>"}'}),
    "map wins": (
        {"eos_token": "<|user|>"},
        {"special_tokens_map.json": '{"bos_token": "<s>", "eos_token": {"content": "</s>"}}'},
    ),
    "map is too old": (
        {
            "bos_token": "<s>",
            "eos_token": "</s>",
            "added_tokens_decoder": {"0": {"content": "<s>"}},
        },
        {"special_tokens_map.json": '{"eos_token": "<|user|>"}'},
    ),
    "a token that is not there": ({"bos_token": "<s>", "eos_token": "</s>", "x_token": "<y>"}, {}),
    "more": ({"bos_token": "<s>", "eos_token": "</s>", "extra_special_tokens": ["<y>"]}, {}),
    "a word": ({"bos_token": "<s>", "eos_token": "a"}, {}),
    "add_bos_token": ({"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}, {}),
}


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("named", NAMED)
def test_tokens_and_their_places_are_those_of_transformers(
    tmp_path: Path, named: str, bos: bool
) -> None:
    settings, files = NAMED[named]
    folder = folder_with(tmp_path, settings | {"chat_template": TURNS}, files, bos)
    own, theirs = read_tokenizer(folder), of_transformers(folder)
    assert own.eos_token_ids[0] == theirs.eos_token_id
    assert own.vocab_size == len(theirs)
    for text in ("a", "b <y> a</s>a<|eot_id|>", "<s>"):
        plain = theirs(text, add_special_tokens=False).input_ids
        assert own.encode(text) == plain
        whole = theirs(text).input_ids
        assert own.encode(text, add_special_tokens=True) == (whole[:-1] if bos else whole)
    asked = [{"role": "user", "content": "a"}]
    parts = own.template.around(["user"]) if own.template else []
    ids = own.encode_parts([Part(parts[0], True), Part("a"), Part(parts[1], True)])
    assert ids == theirs.apply_chat_template(asked)["input_ids"]
    assert ids.count(0) == 1  # once, from the template


def test_the_end_of_a_turn_ends_an_answer(tmp_path: Path) -> None:
    """It is what the template writes behind an answer, or a name that is known."""
    turn = "{% for m in messages %}<|user|>{{ m['content'] }} \n<|assistant|>{% endfor %}"
    settings = {"eos_token": "</s>", "chat_template": turn}
    own = read_tokenizer(folder_with(tmp_path, settings), [7])
    assert own.eos_token_ids == (7, 1, 4, 2)
    broken = {"eos_token": "</s>", "chat_template": "{{ raise_exception('no') }}"}
    assert read_tokenizer(folder_with(tmp_path, broken)).eos_token_ids == (1, 2)
    opening = "{% for m in messages %}{{ bos_token }}{{ m['content'] }}{% endfor %}"
    opened = {"bos_token": "<s>", "chat_template": opening}
    assert read_tokenizer(folder_with(tmp_path, opened)).eos_token_ids == (2, 1)

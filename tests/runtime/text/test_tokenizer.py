from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from trained_tokenizers import LLAMA3, byte_level, sentencepiece

from nearfar.errors import CheckpointError
from nearfar.runtime.checkpoints.tokenizer_files import read_tokenizer
from nearfar.runtime.text.prefix_space import without_prefix_space
from nearfar.runtime.text.tokenizer import Part, Tokenizer

CONTROL = ["<s>", "<|end|>"]


MADE = {
    "gpt2": byte_level(),
    "llama3": byte_level(pre_tokenizers.Split(Regex(LLAMA3), behavior="isolated")),
    "first": sentencepiece("first"),
    "always": sentencepiece("always"),
    "prepend": sentencepiece("prepend"),
}
for _made in MADE.values():
    _made.add_special_tokens([AddedToken(token, normalized=False) for token in CONTROL])
    _made.add_tokens([AddedToken("<think>", normalized=False)])


def tokenizer_of(name: str, **options: Any) -> Tokenizer:
    return Tokenizer(MADE[name].to_str(), {"bos_token": "<s>", "eos_token": "<|end|>"}, **options)


@pytest.mark.parametrize("name", MADE)
def test_text_comes_back(name: str) -> None:
    tokenizer = tokenizer_of(name)
    text = "the cat. é漢🎉  123\n\n  why?\t<think>"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("") == []
    assert max(tokenizer.encode(text)) < tokenizer.vocab_size


@pytest.mark.parametrize("name", MADE)
def test_trusted_text_is_encoded_as_the_library_does(name: str) -> None:
    text = "<s>the cat<|end|>why?\n\nb<s> the<|end|>"
    assert tokenizer_of(name).encode(text) == MADE[name].encode(text).ids


@pytest.mark.parametrize("name", MADE)
def test_control_tokens_in_outside_text_stay_characters(name: str) -> None:
    tokenizer = tokenizer_of(name)
    control = {MADE[name].token_to_id(token) for token in CONTROL}
    parts = [Part("<s>", True), Part("the <|end|>cat<s>"), Part(" why<|end|>", True)]
    ids = tokenizer.encode_parts(parts)
    assert [i for i in ids if i in control] == [ids[0], ids[-1]]
    assert tokenizer.decode(ids).strip() == "the <|end|>cat<s> why"


def test_pieces_of_a_control_token_do_not_join_into_one() -> None:
    tokenizer = tokenizer_of("gpt2")
    ids = tokenizer.encode_parts([Part("<|e"), Part("nd|>"), Part("<|en", True), Part("d|>", True)])
    assert tokenizer.eos_token_ids[0] not in ids
    assert tokenizer.decode(ids) == "<|end|><|end|>"


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize("text", ["the cat sat.", "a", "the cat, ", "", "é漢🎉", "why?\n", "12 "])
def test_open_text_and_what_follows_are_the_ids_of_the_whole(name: str, text: str) -> None:
    tokenizer = tokenizer_of(name)
    before = [Part("<s>user\n", True), Part(text)]
    ids, rest, spans = tokenizer.encode_open(before, "\n\nwhat")
    assert len(spans) == len(ids)
    assert max(stop for _, stop in spans) == len("<s>user\n" + text) - len(rest)
    assert f"user\n{text}".endswith(rest)
    for question in ("what did the cat do?", "123?", "é"):
        after = [Part(f"{rest}\n\n{question}"), Part("<|end|>", True)]
        whole = MADE[name].encode(f"<s>user\n{text}\n\n{question}<|end|>").ids
        assert ids + tokenizer.encode_parts(after, continues=True) == whole


def test_only_what_can_change_is_left_open() -> None:
    parts = [Part("the cat sat.")]
    assert tokenizer_of("llama3").encode_open(parts, "\n\nwhat")[1] == "."
    assert tokenizer_of("gpt2").encode_open(parts, "\n\nwhat")[1] == ""
    assert tokenizer_of("gpt2").encode_open([Part("<s>", True)], "\n\nwhat")[1] == ""


@pytest.mark.parametrize("name", MADE)
@settings(max_examples=30, deadline=None)
@given(text=st.text(st.sampled_from("theca. \n1é漢🎉\u200d"), max_size=30))
def test_stream_says_the_text_in_whole_characters(name: str, text: str) -> None:
    tokenizer = tokenizer_of(name)
    ids = tokenizer.encode(text)
    stream = tokenizer.stream()
    pieces = [*map(stream.push, ids), stream.finish()]
    assert "\ufffd" not in "".join(pieces)
    assert "".join(pieces) == tokenizer.decode(ids)


def test_stream_never_says_a_part_of_a_character() -> None:
    tokenizer = tokenizer_of("gpt2")
    stream = tokenizer.stream()
    ids = [i for byte in "🦉".encode() for i in _byte_ids(byte)]
    assert [stream.push(i) for i in ids] == ["", "", "", "🦉"]
    stream = tokenizer.stream()
    assert [stream.push(i) for i in [*ids[:2], tokenizer.eos_token_ids[0]]] == ["", "", ""]


def _byte_ids(byte: int) -> list[int]:
    spelled = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str("🦉")[0][0]
    index = "🦉".encode().index(byte)
    token = MADE["gpt2"].token_to_id(spelled[index])
    assert token is not None
    return [token]


def test_start_of_a_text_is_what_the_file_says() -> None:
    made = tokenizers.Tokenizer.from_str(MADE["gpt2"].to_str())
    assert tokenizer_of("gpt2").opening_ids == []
    # a setting beside a tokenizer.json has no effect, as in transformers
    asked = Tokenizer(made.to_str(), {"bos_token": "<s>", "add_bos_token": True})
    assert asked.opening_ids == []
    bos = made.token_to_id("<s>")
    made.post_processor = TemplateProcessing(
        single="<s> $A <|end|>",
        special_tokens=[("<s>", bos), ("<|end|>", made.token_to_id("<|end|>"))],
    )
    processed = Tokenizer(made.to_str(), {"add_bos_token": False})
    assert processed.opening_ids == [bos]
    assert processed.encode("a") == asked.encode("a")
    assert processed.encode("a", add_special_tokens=True) == [bos, *asked.encode("a")]


def test_stop_tokens_are_the_models_and_the_tokenizers() -> None:
    own = MADE["gpt2"].token_to_id("<|end|>")
    assert tokenizer_of("gpt2", eos_token_ids=(3, own, 3)).eos_token_ids == (3, own)
    # "<|end|>" is known by its name; where it is not there, nothing ends an answer
    assert Tokenizer(MADE["gpt2"].to_str(), {}).eos_token_ids == (own,)
    plain = byte_level()
    assert Tokenizer(plain.to_str(), {}).eos_token_ids == ()
    letter = plain.token_to_id("a")
    assert Tokenizer(plain.to_str(), {"eos_token": "a"}).eos_token_ids == (letter,)


def test_truncation_and_padding_of_the_file_are_not_applied() -> None:
    made = tokenizers.Tokenizer.from_str(MADE["gpt2"].to_str())
    made.enable_truncation(3)
    made.enable_padding(length=50)
    assert len(Tokenizer(made.to_str(), {}).encode("the cat sat. why?")) == len(
        MADE["gpt2"].encode("the cat sat. why?").ids
    )


def test_control_token_swallows_the_blanks_that_it_is_said_to() -> None:
    made = byte_level()
    made.add_special_tokens([AddedToken("<x>", lstrip=True, rstrip=True, normalized=False)])
    text = "the  <x> \n cat"
    assert Tokenizer(made.to_str(), {}).encode(text) == made.encode(text).ids


def test_folder_gives_tokenizer_and_chat_template(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(MADE["gpt2"].to_str())
    assert read_tokenizer(tmp_path).chat_template is None
    marks = {"bos_token": {"content": "<s>"}, "eos_token": "<|end|>", "pad_token": None}
    named = [{"name": "default", "template": "A"}, {"name": "tool_use", "template": "B"}]
    settings_path = tmp_path / "tokenizer_config.json"
    settings_path.write_text(json.dumps(marks | {"chat_template": named}))
    read = read_tokenizer(tmp_path, [7])
    assert read.chat_template == "A"
    assert read.marks == {"bos_token": "<s>", "eos_token": "<|end|>"}
    assert read.eos_token_ids[0] == 7
    (tmp_path / "chat_template.jinja").write_text("C")
    assert read_tokenizer(tmp_path).chat_template == "C"


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("tokenizer.json", "{", r"tokenizer\.json is not a valid tokenizer \(.+\)\. Download"),
        ("tokenizer.json", "{}", r"tokenizer\.json is not a valid tokenizer"),
        ("tokenizer_config.json", "{", r"tokenizer_config\.json is not valid JSON"),
        ("tokenizer_config.json", "\udcff", r"tokenizer_config\.json cannot be read"),
    ],
)
def test_damaged_file_is_named(tmp_path: Path, name: str, content: str, expected: str) -> None:
    (tmp_path / "tokenizer.json").write_text(MADE["gpt2"].to_str())
    (tmp_path / name).write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointError, match=expected):
        read_tokenizer(tmp_path)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be read \(.*No such file"):
        read_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("name", "adds", "after_control"),
    [
        ("gpt2", False, False),
        ("llama3", False, False),
        ("first", True, False),
        ("always", True, True),
        ("prepend", True, True),
    ],
)
def test_prefix_space_is_found_and_taken_away(name: str, adds: bool, after_control: bool) -> None:
    changed, again = without_prefix_space(json.loads(MADE[name].to_str()))
    assert (changed is not None, again) == (adds, after_control)
    if changed is not None:
        assert without_prefix_space(changed) == (None, False)
        inner = tokenizers.Tokenizer.from_str(json.dumps(changed))
        assert not inner.encode("cat").tokens[0].startswith("▁")
        assert MADE[name].encode("cat").tokens[0].startswith("▁")


def test_prefix_space_of_a_byte_level_tokenizer_is_found() -> None:
    definition = json.loads(MADE["gpt2"].to_str())
    definition["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": True}
    changed, after_control = without_prefix_space(definition)
    assert changed is not None
    assert after_control
    assert changed["pre_tokenizer"]["add_prefix_space"] is False

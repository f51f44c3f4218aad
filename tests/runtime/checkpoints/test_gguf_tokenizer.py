"""The tokenizer inside a GGUF file, against that of the model which it was made from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers
from trained_tokenizers import CORPUS, ODD, byte_level
from transformers import LlamaTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from nearfar.errors import CheckpointError, UnsupportedModelError
from nearfar.runtime.checkpoints.gguf_file import GgufFile
from nearfar.runtime.checkpoints.gguf_tokenizer import write_gguf_tokenizer
from nearfar.runtime.checkpoints.tokenizer_files import read_tokenizer
from nearfar.runtime.text.tokenizer import Tokenizer

ONE = st.lists(st.sampled_from(ODD) | st.text(max_size=2), max_size=12)
CONTROL = ["<s>", "<\uff5cend\u2581of\u2581sentence\uff5c>"]  # DeepSeek's is not in bytes
WHOLE = "<think>"


class Described:
    """A GGUF file of which only the metadata are there."""

    path = Path("model.gguf")

    def __init__(self, metadata: dict[str, Any], architecture: str = "llama") -> None:
        self.architecture, self._metadata = architecture, metadata

    def value(self, key: str, default: Any = None) -> Any:
        return self._metadata.get(key, default)

    def keys(self, prefix: str) -> list[str]:
        return [key for key in self._metadata if key.startswith(prefix)]


def read(folder: Path, metadata: dict[str, Any], architecture: str = "llama") -> Tokenizer:
    folder.mkdir(exist_ok=True)
    write_gguf_tokenizer(cast("GgufFile", Described(metadata, architecture)), folder)
    return read_tokenizer(folder)


def byte_level_metadata(made: tokenizers.Tokenizer, **more: Any) -> dict[str, Any]:
    model = json.loads(made.to_str())["model"]
    tokens = [*model["vocab"], *CONTROL, WHOLE]
    kinds = [1] * len(model["vocab"]) + [3, 3, 4]
    merges = [" ".join(pair) for pair in model["merges"]]
    lists = {
        "tokens": tokens,
        "token_type": kinds,
        "merges": merges,
        "eos_token_id": len(tokens) - 2,
    }
    values = {"model": "gpt2", "bos_token_id": len(tokens) - 3, **lists, **more}
    return {f"tokenizer.ggml.{key}": value for key, value in values.items() if value is not None}


def same(own: Tokenizer, theirs: Any, text: str) -> None:
    ids = own.encode(text)
    assert ids == theirs.encode(text, add_special_tokens=False)
    assert own.decode(ids, skip_special_tokens=False) == theirs.decode(ids)


QWEN2 = GGUF_PRE_TOKENIZER_SPLITS["qwen2"]
MADE = byte_level(pre_tokenizers.Split(Regex(QWEN2), behavior="isolated"))
ADDED = "".join(["a", *CONTROL, " 12345", WHOLE, "x"])


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3"])
@pytest.mark.parametrize("named", ["qwen2", "default", None])
def test_qwens_rule_is_that_of_its_own_tokenizer(
    tmp_path: Path, architecture: str, named: str | None
) -> None:
    model = json.loads(MADE.to_str())["model"]
    theirs = Qwen2Tokenizer(vocab=model["vocab"], merges=[tuple(m) for m in model["merges"]])
    own = read(tmp_path, byte_level_metadata(MADE, pre=named), architecture)
    assert own.opening_ids == []

    @settings(max_examples=80, deadline=None)
    @given(text=ONE)
    def check(text: list[str]) -> None:
        ids = own.encode("".join(text))
        assert ids == theirs.encode("".join(text), add_special_tokens=False)

    check()


@pytest.mark.parametrize("rule", ["llama-bpe", "smaug-bpe", "tekken", "deepseek-r1-qwen", "smollm"])
def test_words_are_cut_by_the_rule_that_is_named(tmp_path: Path, rule: str) -> None:
    split = GGUF_PRE_TOKENIZER_SPLITS.get(rule)
    cut: Any = pre_tokenizers.Digits(individual_digits=True)
    if split is not None:
        cut = pre_tokenizers.Split(Regex(split), behavior="isolated")
    spelled = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    made = tokenizers.Tokenizer.from_str(MADE.to_str())
    made.pre_tokenizer = pre_tokenizers.Sequence([cut, spelled])
    made.add_special_tokens(CONTROL)
    made.add_tokens([WHOLE])
    theirs = PreTrainedTokenizerFast(tokenizer_object=made)
    own = read(tmp_path, byte_level_metadata(MADE, pre=rule))
    assert own.eos_token_ids == (made.token_to_id(CONTROL[1]),)
    assert own.opening_ids == ([made.token_to_id("<s>")] if rule in ("llama-bpe", "tekken") else [])
    same(own, theirs, ADDED)

    @settings(max_examples=80, deadline=None)
    @given(text=ONE)
    def check(text: list[str]) -> None:
        same(own, theirs, "".join(text))

    check()


def test_a_word_in_the_vocabulary_is_one_token_though_no_merge_makes_it(tmp_path: Path) -> None:
    metadata = byte_level_metadata(byte_level(), pre="llama-bpe")
    metadata["tokenizer.ggml.tokens"].append("unmerged")
    metadata["tokenizer.ggml.token_type"].append(1)
    last = len(metadata["tokenizer.ggml.tokens"]) - 1
    assert read(tmp_path, metadata).encode("unmerged") == [last]
    metadata["tokenizer.ggml.pre"] = "qwen2"
    assert len(read(tmp_path, metadata).encode("unmerged")) > 1


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A SentencePiece model and the metadata that llama.cpp makes of it."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("pieces")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=330,
        byte_fallback=True,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    count = range(model.vocab_size())
    kinds = [
        2 * model.is_unknown(i) or 3 * model.is_control(i) or 6 * model.is_byte(i) or 1
        for i in count
    ]
    values = {
        "model": "llama",
        "pre": "default",
        "tokens": [model.id_to_piece(i) for i in count],
        "scores": [model.get_score(i) for i in count],
        "token_type": kinds,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }
    return folder, {f"tokenizer.ggml.{key}": value for key, value in values.items()}


@pytest.mark.parametrize("spaced", [True, False])
def test_pieces_are_those_of_the_sentencepiece_model(
    tmp_path: Path, pieces: tuple[Path, dict[str, Any]], spaced: bool
) -> None:
    folder, metadata = pieces
    own = read(tmp_path, metadata | {"tokenizer.ggml.add_space_prefix": spaced})
    theirs = LlamaTokenizer.from_pretrained(folder, add_prefix_space=spaced)
    assert own.opening_ids == [1]
    assert own.eos_token_ids == (2,)

    @settings(max_examples=80, deadline=None)
    @given(text=ONE)
    def check(text: list[str]) -> None:
        same(own, theirs, "".join(text))

    check()
    same(own, theirs, "a<s> the</s>cat")
    plain = read(tmp_path, metadata | {"tokenizer.ggml.add_bos_token": False})
    assert plain.opening_ids == []


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("remove_extra_whitespaces", True),
        ("precompiled_charsmap", [1, 2]),
        ("escape_whitespaces", False),
    ],
)
def test_settings_of_other_pieces_are_refused(
    tmp_path: Path, pieces: tuple[Path, dict[str, Any]], key: str, value: object
) -> None:
    message = rf"^model\.gguf has the setting tokenizer\.ggml\.{key}, which is not supported\. Use "
    with pytest.raises(UnsupportedModelError, match=message):
        read(tmp_path, pieces[1] | {f"tokenizer.ggml.{key}": value})
    off = {
        "remove_extra_whitespaces": False,
        "precompiled_charsmap": [],
        "escape_whitespaces": True,
    }
    read(tmp_path, pieces[1] | {f"tokenizer.ggml.{key}": off[key]})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model": "t5"},
            r"has a tokenizer of the kind 't5' \(tokenizer\.ggml\.model\), and 'gpt2'",
        ),
        (
            {"model": None},
            r"has no tokenizer \(tokenizer\.ggml\.model\), and 'gpt2' and 'llama' are",
        ),
        (
            {"pre": "of-tomorrow"},
            "cuts text into words by the rule 'of-tomorrow', which is not sup",
        ),
        ({"pre": "default"}, r"does not name the rule that cuts text into words \(tokenizer\.ggml"),
        (
            {"pre": None},
            r"does not name the rule that cuts text into words \(tokenizer\.ggml\.pre\)",
        ),
    ],
)
def test_what_is_not_known_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    metadata = byte_level_metadata(MADE, **({"pre": "qwen2"} | change))
    with pytest.raises(UnsupportedModelError, match=rf"^model\.gguf {message}.* folder instead\.$"):
        read(tmp_path, metadata)


@pytest.mark.parametrize("name", ["tokens", "token_type", "merges"])
@pytest.mark.parametrize("value", [None, [], ["a", "a"]])
def test_a_tokenizer_that_is_not_whole(tmp_path: Path, name: str, value: object) -> None:
    metadata = byte_level_metadata(MADE, **({"pre": "qwen2"} | {name: value}))
    with pytest.raises(CheckpointError, match=r"^model\.gguf has no tokenizer that can be read: "):
        read(tmp_path, metadata)


def test_of_named_templates_the_default_is_used(tmp_path: Path) -> None:
    metadata = byte_level_metadata(MADE, pre="qwen2")
    assert read(tmp_path, metadata).chat_template is None
    tools = metadata | {"tokenizer.chat_template.tool_use": "T"}
    with pytest.raises(CheckpointError, match=r"^model\.gguf has chat templates for tool_use, and"):
        read(tmp_path, tools)
    assert read(tmp_path, tools | {"tokenizer.chat_template": "A"}).chat_template == "A"
    assert read(tmp_path, tools | {"tokenizer.chat_template.default": "B"}).chat_template == "B"

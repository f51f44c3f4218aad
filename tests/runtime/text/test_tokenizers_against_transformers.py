"""Every kind of tokenizer.json, token by token and back to text, against transformers."""

from __future__ import annotations

import json
from itertools import product
from typing import Any

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import UnigramTrainer
from trained_tokenizers import CORPUS, LLAMA3, ODD, byte_level, sentencepiece
from transformers import PreTrainedTokenizerFast

from nearfar.errors import UnsupportedModelError
from nearfar.runtime.text.tokenizer import Tokenizer

FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")
NAMES = {"bos_token": "<s>", "eos_token": "</s>"}
ODD += ["\ufffd", "\U0010ffff", "\u2028", "<0x41>", "\ufeff", "  ", "don't", "\r\n"]
ADDED = ["<s>", "</s>", "<think>", "<a>", "<B>", "<c c>"]


def unigram(*normalizer: Any) -> tokenizers.Tokenizer:
    """Like T5's: the likeliest pieces, with the space before them."""
    made = tokenizers.Tokenizer(models.Unigram())
    if normalizer:
        made.normalizer = normalizers.Sequence(list(normalizer))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    made.decoder = decoders.Metaspace(prepend_scheme="always")
    made.train_from_iterator(
        CORPUS,
        UnigramTrainer(vocab_size=80, unk_token="<unk>", special_tokens=["<unk>"]),
    )
    return made


def qwen2() -> tokenizers.Tokenizer:
    made = byte_level(pre_tokenizers.Split(Regex(LLAMA3), behavior="isolated"))
    made.normalizer = normalizers.NFC()
    return made


def spaced() -> tokenizers.Tokenizer:
    made = byte_level()
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return made


KINDS = {
    "gpt2": byte_level(),
    "gpt2 with a space": spaced(),
    "llama3": byte_level(pre_tokenizers.Split(Regex(LLAMA3), behavior="isolated")),
    "qwen2": qwen2(),
    "digits": byte_level(pre_tokenizers.Digits(individual_digits=True)),
    "first": sentencepiece("first"),
    "always": sentencepiece("always"),
    "never": sentencepiece("never"),
    "prepend": sentencepiece("prepend"),
    "unigram": unigram(),
    "unigram, respelled": unigram(normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")),
}


def with_tokens(kind: str, added: list[AddedToken], **changes: Any) -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer.from_str(KINDS[kind].to_str())
    made.add_tokens([AddedToken(name, special=True, normalized=False) for name in NAMES.values()])
    made.add_tokens(added)
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def check(made: tokenizers.Tokenizer, text: str, **options: Any) -> None:
    theirs = PreTrainedTokenizerFast(tokenizer_object=made, **NAMES, **options)
    own = Tokenizer(made.to_str(), NAMES | options)
    ids = own.encode(text)
    assert ids == theirs.encode(text, add_special_tokens=False)
    assert own.encode(text, add_special_tokens=True) == theirs.encode(text)
    assert own.decode(ids, skip_special_tokens=False) == theirs.decode(ids)


PLAIN = {kind: with_tokens(kind, [AddedToken("<think>", normalized=False)]) for kind in KINDS}
OWN = {kind: Tokenizer(made.to_str(), NAMES) for kind, made in PLAIN.items()}
THEIRS = {
    kind: PreTrainedTokenizerFast(tokenizer_object=made, **NAMES) for kind, made in PLAIN.items()
}


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=120, deadline=None)
@given(text=st.lists(st.sampled_from(ODD + ADDED[:3]) | st.text(max_size=2), max_size=12))
@example(text=["  <s>  the", "\x1c<think> cat</s> "])
def test_any_text_is_the_same_tokens(kind: str, text: list[str]) -> None:
    own, theirs, joined = OWN[kind], THEIRS[kind], "".join(text)
    ids = own.encode(joined)
    assert ids == theirs.encode(joined, add_special_tokens=False)
    assert own.decode(ids, skip_special_tokens=False) == theirs.decode(ids)
    assert own.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(ids=st.lists(st.integers(0, 600), max_size=12))
def test_any_tokens_are_the_same_text(kind: str, ids: list[int]) -> None:
    assert OWN[kind].decode(ids, skip_special_tokens=False) == THEIRS[kind].decode(ids)
    stream = OWN[kind].stream()
    said = "".join([*map(stream.push, ids), stream.finish()])
    assert said == THEIRS[kind].decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("flags", list(product([False, True], repeat=len(FLAGS))))
def test_added_tokens_stand_where_their_flags_say(flags: tuple[bool, ...]) -> None:
    how = dict(zip(FLAGS, flags, strict=True))
    texts = ["a<a>b <a> c", " \x1c<a>\x85 x", "<a><a> <s>\n<a>", "é<a>_ <A>-<a>", "<a >\u00a0<a>"]
    for kind in ("gpt2", "first", "unigram, respelled"):
        made = with_tokens(kind, [AddedToken("<a>", **how)])
        for text in texts:
            check(made, text)


@pytest.mark.parametrize("special", [False, True])
def test_an_added_token_that_is_sought_in_normalised_text(special: bool) -> None:
    added = [AddedToken("<B>", normalized=True, special=special)]
    made = with_tokens("gpt2", added, normalizer=normalizers.Lowercase())
    for text in ("<b> and <B>", "The<S>Cat<s>", "<B><b></s>"):
        check(made, text)


def test_added_tokens_that_overlap() -> None:
    names = ["<a>", "<a>b", "a>", "<s><a>", "<c c>"]
    for specials in ([0], [1, 3], [0, 1, 2, 3, 4]):
        added = [AddedToken(name, special=i in specials) for i, name in enumerate(names)]
        for text in ("<a>b<s><a>c", "x<a> >a><c c>", "<s><s><a>b"):
            check(with_tokens("llama3", added), text)


@pytest.mark.parametrize("kind", ["gpt2", "first", "unigram"])
def test_what_begins_a_text(kind: str) -> None:
    made = with_tokens(kind, [])
    bos = made.token_to_id("<s>")
    made.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    for text in ("the cat", " the", "<s>the", ""):
        check(made, text)


@pytest.mark.parametrize("option", ["clean_up_tokenization_spaces", "legacy", "add_prefix_space"])
@pytest.mark.parametrize("value", [False, True])
def test_settings_beside_the_file(option: str, value: bool) -> None:
    for kind in ("gpt2", "first", "prepend"):
        check(with_tokens(kind, []), "the cat . why ? do n't ' s", **{option: value})


def test_blanks_taken_out_of_answers_are_refused() -> None:
    clean = {"clean_up_tokenization_spaces": True}
    forced = {"clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output": True}
    message = r"^The model's tokenizer settings say clean_up_tokenization_spaces, which takes blan"
    for kind, said in (("unigram", clean), ("gpt2", clean | forced)):
        with pytest.raises(UnsupportedModelError, match=message):
            Tokenizer(KINDS[kind].to_str(), said)
        theirs = PreTrainedTokenizerFast(tokenizer_object=KINDS[kind], **said)
        assert theirs.decode(theirs.encode("a .")) != "a ."
    Tokenizer(KINDS["gpt2"].to_str(), clean)


def test_tokens_that_only_the_settings_add() -> None:
    listed = {"900": {"content": "<z>", "special": True, "normalized": False, "lstrip": True}}
    made = with_tokens("llama3", [])
    own = Tokenizer(made.to_str(), NAMES | {"added_tokens_decoder": listed})
    made.add_tokens([AddedToken("<z>", special=True, normalized=False, lstrip=True)])
    theirs = PreTrainedTokenizerFast(tokenizer_object=made, **NAMES)
    for text in ("the <z> cat", "<z><z>", "  <z>the"):
        assert own.encode(text) == theirs.encode(text, add_special_tokens=False)
    assert own.vocab_size == len(theirs) == json.loads(made.to_str())["added_tokens"][-1]["id"] + 1

"""Text that comes piece by piece against the text of all ids, for any ids at all."""

from __future__ import annotations

import json
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from nearfar.runtime.text.tokenizer import Tokenizer

CONTROL = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
WORDS = ["▁", "a", "b", "é", "▁a", ".", "\ufffd", "▁▁"]


def byte_level() -> tokenizers.Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*CONTROL, *alphabet, "Ġa", "Ã©", "©a", "😀"]
    made = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return made


def byte_fallback(*decoding: Any, prefix: bool = True) -> tokenizers.Tokenizer:
    tokens = [*CONTROL, *BYTES, *WORDS]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    model = models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True)
    made = tokenizers.Tokenizer(model)
    steps = [normalizers.Prepend("▁")] if prefix else []
    made.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *decoding]
    )
    return made


def metaspace() -> tokenizers.Tokenizer:
    vocabulary = [(token, -1.0 - i) for i, token in enumerate([*CONTROL, *WORDS])]
    made = tokenizers.Tokenizer(models.Unigram(vocabulary, unk_id=0))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    return made


def word_ends() -> tokenizers.Tokenizer:
    tokens = [*CONTROL, "a", "b</w>", "c</w>", "."]
    made = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    made.decoder = decoders.BPEDecoder()
    return made


def no_decoder() -> tokenizers.Tokenizer:
    vocabulary = {each: i for i, each in enumerate([*CONTROL, "a"])}
    return tokenizers.Tokenizer(models.BPE(vocabulary, []))


KINDS = {
    "byte level": byte_level(),
    "llama 2": byte_fallback(decoders.Strip(" ", 1, 0)),
    "gemma": byte_fallback(prefix=False),
    "unigram": metaspace(),
    "word ends": word_ends(),
    "no decoder": no_decoder(),
}
for _made in KINDS.values():
    _made.add_special_tokens([AddedToken(each, normalized=False) for each in CONTROL])
    _made.add_tokens([AddedToken(each, normalized=False) for each in ("<think>", "\n\n")])
TOKENIZERS = {name: Tokenizer(made.to_str(), {}) for name, made in KINDS.items()}
BAD_IDS = [-1, -(2**70), 10**6, 2**32, 2**70]


def streamed(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    stream = tokenizer.stream()
    return [*map(stream.push, ids), stream.finish()]


def token(name: str, spelling: str) -> int:
    found = KINDS[name].token_to_id(spelling)
    assert found is not None
    return found


def ids_of(name: str) -> st.SearchStrategy[list[int]]:
    size = KINDS[name].get_vocab_size()
    return st.lists(st.integers(0, size - 1) | st.sampled_from(BAD_IDS), max_size=24)


@pytest.mark.parametrize("name", KINDS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_pieces_join_to_the_text_of_all_ids(name: str, data: st.DataObject) -> None:
    ids = data.draw(ids_of(name))
    assert "".join(streamed(TOKENIZERS[name], ids)) == TOKENIZERS[name].decode(ids)


@pytest.mark.parametrize("name", ["llama 2", "gemma"])
@settings(max_examples=120, deadline=None)
@given(run=st.lists(st.sampled_from([0xC3, 0xA9, 0xE2, 0x82, 0xAC, 0x41, 0xFF]), max_size=12))
def test_runs_of_bytes_join_to_the_text_of_all_ids(name: str, run: list[int]) -> None:
    ids = [token(name, BYTES[byte]) for byte in run]
    ids.insert(len(ids) // 2, token(name, "<s>"))  # says nothing and ends no run
    known = [*ids, token(name, "a"), *ids]
    assert "".join(streamed(TOKENIZERS[name], known)) == KINDS[name].decode(known)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_ids_that_exist_are_decoded_as_the_library_does(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(list(KINDS)))
    ids = data.draw(ids_of(name))
    size = KINDS[name].get_vocab_size()
    known = [i for i in ids if 0 <= i < size]
    assert TOKENIZERS[name].decode(ids) == KINDS[name].decode(known)


def test_a_whole_character_and_then_a_broken_one_are_said() -> None:
    ids = [token("llama 2", BYTES[byte]) for byte in (0xC3, 0xA9, 0xE2)]
    ids = [token("llama 2", "b"), *ids, token("llama 2", "a")]
    # the run as a whole is no UTF-8, so all of it is replaced, as the library does
    assert streamed(TOKENIZERS["llama 2"], ids) == ["b", "", "", "", "\ufffd\ufffd\ufffda", ""]
    assert streamed(TOKENIZERS["llama 2"], ids[:3]) == ["b", "", "", "é"]
    assert streamed(TOKENIZERS["llama 2"], ids[:2]) == ["b", "", "\ufffd"]


def test_text_is_said_as_soon_as_it_is_settled() -> None:
    ids = [token("llama 2", spelling) for spelling in ("▁a", "▁", "b", "</s>", ".", "▁a")]
    assert streamed(TOKENIZERS["llama 2"], ids) == ["a", " ", "b", "", ".", " a", ""]
    ids = [token("byte level", spelling) for spelling in ("a", "Ġ", "Ã", "©a", "Ã©", "ã")]
    assert streamed(TOKENIZERS["byte level"], ids) == ["a", " ", "", "éa", "é", "", "\ufffd"]


def test_long_answers_do_not_take_longer_per_token() -> None:
    """No more than the tokens that are held back, and one before them, are decoded again."""
    tokenizer, lengths = TOKENIZERS["byte level"], []
    stream = tokenizer.stream()
    decode = tokenizer.decode

    def counting(ids: Any, *rest: Any) -> str:
        lengths.append(len(ids))
        return decode(ids, *rest)

    stream._decode = counting
    for one in json.loads(KINDS["byte level"].to_str())["model"]["vocab"].values():
        stream.push(one)
    assert max(lengths) < 150  # the alphabet has 128 bytes in a row that are no characters
    assert lengths[-1] <= 2

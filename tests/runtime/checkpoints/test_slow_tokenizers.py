"""A folder whose tokenizer is a SentencePiece model and nothing else, against transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_gguf import tiny_config, tiny_state, write_folder

from nearfar.errors import CheckpointError, UnsupportedModelError
from nearfar.runtime.checkpoints.model_config import parse_config
from nearfar.runtime.checkpoints.model_source import open_source

TEXTS = ["the cat", " the  cat.\n\nwhy? 123", "é漢🎉 ﬁ\u200d", "a<s>b", "\t x", ""]


@pytest.mark.parametrize("fallback", [True, False])
def test_a_sentencepiece_model_alone_is_read_as_transformers_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fallback: bool
) -> None:
    import sentencepiece
    from transformers import AutoTokenizer

    monkeypatch.setenv("NEARFAR_CACHE_DIR", str(tmp_path / "cache"))
    config = tiny_config("llama", num_attention_heads=4, head_dim=16)
    folder = write_folder(tmp_path / "model", config, tiny_state(config))
    corpus = ["the cat sat on the mat", "why did the cat run, and where? 123"] * 20
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=310 if fallback else 54,
        byte_fallback=fallback,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    own, theirs = open_source(str(folder)).load_tokenizer(), AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        assert own.encode(text) == theirs(text, add_special_tokens=False).input_ids
        assert own.encode(text, add_special_tokens=True) == theirs(text).input_ids
        ids = own.encode(text)
        assert own.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


def test_a_tokenizer_of_tiktoken_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEARFAR_CACHE_DIR", str(tmp_path / "cache"))
    config = tiny_config("llama", num_attention_heads=4, head_dim=16)
    folder = write_folder(tmp_path / "model", config, tiny_state(config))
    (folder / "tokenizer.model").write_text("IQ== 0\nIg== 1\nIw== 2\n")
    message = (
        r"tokenizer\.model is a tokenizer of tiktoken, which says neither .* tokenizer\.json bes"
    )
    with pytest.raises(UnsupportedModelError, match=message):
        open_source(str(folder)).load_tokenizer()
    for other in ("", "IQ== 0 1\n", "a b\n", "I!== 3\n"):
        (folder / "tokenizer.model").write_text(other)
        with pytest.raises(CheckpointError, match="has no tokenizer that can be read"):
            open_source(str(folder)).load_tokenizer()


@pytest.mark.parametrize("eos", ["2", [1, "2"], -1, 1.5, True, [None], {"id": 2}])
def test_stop_tokens_that_are_no_ids_are_refused(eos: object) -> None:
    with pytest.raises(CheckpointError, match=r"'eos_token_id' of test, or of .* Got ") as caught:
        parse_config(tiny_config(), "test", {"eos_token_id": eos})
    assert str(caught.value).endswith(f"must be the id of a token or a list of ids. Got {eos!r}.")

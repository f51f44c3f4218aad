"""Tokenizers trained on a few words."""

from __future__ import annotations

import json
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers
from tokenizers.trainers import BpeTrainer

CORPUS = [
    "the cat sat. the cat ran.\n\nwhat did the cat do?\n\n",
    "a, b. c.\n\nwhy? 123 é漢🎉",
] * 40


def byte_level(*before: Any) -> tokenizers.Tokenizer:
    """Like GPT-2's, or cut into words by ``before``."""
    made = tokenizers.Tokenizer(models.BPE())
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not before)
    made.pre_tokenizer = pre_tokenizers.Sequence([*before, last])
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(CORPUS, BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    return made


LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def sentencepiece(scheme: str) -> tokenizers.Tokenizer:
    """Like Llama 2's: words with the space before them, other characters as bytes."""
    made = tokenizers.Tokenizer(models.BPE(byte_fallback=True))
    end = [decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), *end])
    if scheme == "prepend":
        steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        made.normalizer = normalizers.Sequence(steps)
    else:
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = BpeTrainer(vocab_size=500, limit_alphabet=20, special_tokens=tokens)
    made.train_from_iterator(CORPUS, trainer)
    definition = json.loads(made.to_str())
    definition["added_tokens"] = []
    return tokenizers.Tokenizer.from_str(json.dumps(definition))


ODD = [*"theca. \n\t1'", *"é漢🎉ﬁ²٣İß", "e\u0301", "\u200d", "\u00a0", "\x1c", "\x85", "\x00", "▁"]

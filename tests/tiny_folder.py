"""A tiny random model with a tokenizer, saved as Hugging Face does, and texts for it."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import tokenizers
from tiny_models import build
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers.trainers import BpeTrainer

WORDS = ("the", "cat", "sat", "ran", "under", "a", "red", "house", "and", "what", "did", "it", "do")


def text_of(words: int, seed: int = 0) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=words)) + "."


def make_folder(folder: Path, context: int = 4096, family: str = "llama", **changes: Any) -> Any:
    """Write model and tokenizer to ``folder``; the transformers model is returned."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        [text_of(500)], BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    )
    made.add_special_tokens([AddedToken("<|end|>", normalized=False)])
    sizes = {
        "vocab_size": made.get_vocab_size(),
        "max_position_embeddings": context,
        "eos_token_id": made.token_to_id("<|end|>"),
        "bos_token_id": None,
    }
    model = build(family, folder, **{**sizes, "num_key_value_heads": 2, **changes})
    (folder / "tokenizer.json").write_text(made.to_str())
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}))
    return model


def make_stop(folder: Path, token: int) -> None:
    """Make ``token`` a stop token of the model in ``folder``."""
    for name in ("config.json", "generation_config.json"):
        path = folder / name
        if path.exists():
            path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": token}))

"""Sizes of well-known models, for speed with random weights: no file is needed.

Each is the part of the model's own `config.json` that decides sizes. Contexts are as published.
"""

from __future__ import annotations

from typing import Any

from nearfar.errors import UnknownNameError
from nearfar.runtime.checkpoints.model_config import parse_config
from nearfar.runtime.models.plan import ModelPlan


def _config(family: str, sizes: tuple[int, ...], context: int, **more: Any) -> dict[str, Any]:
    hidden, intermediate, layers, query_heads, kv_heads, head_dim, vocabulary = sizes
    return {
        "model_type": family,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": query_heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": vocabulary,
        "max_position_embeddings": context,
        "rms_norm_eps": 1e-5,
    } | more


# hidden, intermediate, layers, query heads, KV heads, head_dim, vocabulary
SHAPES = {
    "smollm2-135m": _config(
        "llama", (576, 1536, 30, 9, 3, 64, 49152), 8192, tie_word_embeddings=True
    ),
    "smollm2-1.7b": _config(
        "llama", (2048, 8192, 24, 32, 32, 64, 49152), 8192, tie_word_embeddings=True
    ),
    "qwen2.5-0.5b": _config(
        "qwen2", (896, 4864, 24, 14, 2, 64, 151936), 32768, tie_word_embeddings=True
    ),
    "qwen2.5-7b": _config("qwen2", (3584, 18944, 28, 28, 4, 128, 152064), 131072),
    "qwen3-0.6b": _config(
        "qwen3", (1024, 3072, 28, 16, 8, 128, 151936), 40960, tie_word_embeddings=True
    ),
    "qwen3-8b": _config("qwen3", (4096, 12288, 36, 32, 8, 128, 151936), 40960),
    "llama-3.2-1b": _config(
        "llama", (2048, 8192, 16, 32, 8, 64, 128256), 131072, tie_word_embeddings=True
    ),
    "llama-3.1-8b": _config("llama", (4096, 14336, 32, 32, 8, 128, 128256), 131072),
}


def shape_config(name: str, context_tokens: int) -> ModelPlan:
    """The model called ``name``; with random weights it may read ``context_tokens``, however many.

    Raises UnknownNameError with the nearest name.
    """
    if name not in SHAPES:
        raise UnknownNameError("shape", name, SHAPES)
    config = dict(SHAPES[name])
    config["max_position_embeddings"] = max(config["max_position_embeddings"], context_tokens)
    return parse_config(config, f"shape {name}")

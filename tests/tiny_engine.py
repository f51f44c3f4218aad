"""A small random model in memory, an engine around it, and the steps tests take with it."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import torch

from nearfar.config import EngineConfig
from nearfar.runtime.engine import Engine
from nearfar.runtime.model_config import ModelConfig, parse_config
from nearfar.runtime.prefill import prefill
from nearfar.runtime.sequence import Sequence

VOCABULARY = 97
DEVICE = os.environ.get("NEARFAR_TEST_DEVICE", "cpu")  # cuda runs the same tests on a GPU
# small tables keep tests quick; what the package's weights were trained for is a larger model
TINY_SPECS = {
    "lsh-tables": "lsh-tables:num_tables=20",
    "less": "less:maps=random",
    "lococo": "lococo:maps=random",
}


def tiny_specs(names: Iterable[str]) -> list[str]:
    """Policies of these names that tiny models can have."""
    return [TINY_SPECS.get(name, name) for name in names]


def tiny_config(
    heads: int = 6, kv_heads: int = 2, head_dim: int = 16, layers: int = 2, context: int = 4096
) -> ModelConfig:
    return parse_config(
        {
            "model_type": "llama",
            "vocab_size": VOCABULARY,
            "hidden_size": 48,
            "intermediate_size": 80,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": head_dim,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": context,
            "rope_theta": 10000.0,
            "hidden_act": "silu",
            "tie_word_embeddings": True,
            "eos_token_id": 2,
        },
        "test",
    )


def tiny_engine(model: ModelConfig | None = None, **settings: Any) -> Engine:
    defaults: dict[str, Any] = {
        "dtype": "float32",
        "far_dtype": "float32",
        "sinks": 3,
        "window": 5,
        "device": DEVICE,
        "threads": 1,  # tiny products gain nothing from more, and wait for busy neighbours
    }
    return Engine.random(model or tiny_config(), EngineConfig(**(defaults | settings)))


def tokens(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCABULARY, (count,), generator=generator).to(DEVICE)


def read(engine: Engine, ids: torch.Tensor, sequence: Sequence | None = None) -> Sequence:
    sequence = sequence or engine.new_sequence()
    prefill(engine.decoder, sequence, ids, engine.chunk_tokens)
    return sequence


def decode(engine: Engine, sequence: Sequence, ids: torch.Tensor) -> torch.Tensor:
    """Logits [n, V] after each of ``ids`` [n], one step each."""
    return torch.cat([engine.step([sequence], [one]) for one in ids.tolist()])

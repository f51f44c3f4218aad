"""A small random model in memory, an engine around it, and the steps tests take with it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable
from itertools import repeat
from typing import Any

import torch

from nearfar.config import EngineConfig
from nearfar.runtime.checkpoints.model_config import parse_config
from nearfar.runtime.engine.engine import Engine
from nearfar.runtime.memory.sequence import Sequence
from nearfar.runtime.models.layers import Attention
from nearfar.runtime.models.plan import LayerPlan, ModelPlan
from nearfar.runtime.steps.prefill import prefill

VOCABULARY = 97
DEVICE = os.environ.get("NEARFAR_TEST_DEVICE", "cpu")  # cuda runs the same tests on a GPU


def tiny_config(
    heads: int = 6, kv_heads: int = 2, head_dim: int = 16, layers: int = 2, context: int = 4096
) -> ModelPlan:
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


def changed(
    plan: ModelPlan,
    *,
    mixer: dict[str, Any] | None = None,
    rope_layers: Iterable[bool] | None = None,
    mlp_bias: bool = False,
    **changes: Any,
) -> ModelPlan:
    """``plan`` with changes to all its mixers, feed-forwards and to itself."""
    layers = []
    for layer, rotates in zip(plan.layers, rope_layers or repeat(True), strict=False):
        assert layer.mixer is not None
        assert layer.feed_forward is not None
        own = dict(mixer or {}) | ({} if rotates else {"rope": None})
        attention = dataclasses.replace(layer.mixer, **own)
        layers.append(LayerPlan(attention, dataclasses.replace(layer.feed_forward, bias=mlp_bias)))
    return dataclasses.replace(plan, layers=tuple(layers), **changes)


def tiny_engine(model: ModelPlan | None = None, **settings: Any) -> Engine:
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


def dense_logits(engine: Engine, ids: torch.Tensor) -> torch.Tensor:
    """Logits [T, V] with the attention of all tokens written out."""
    decoder = engine.decoder
    angles = decoder.angles(torch.arange(len(ids)))
    later = torch.ones(len(ids), len(ids), dtype=torch.bool).triu(1)

    def attend(mixer: Attention, qkv: torch.Tensor) -> torch.Tensor:
        q, k, v = mixer.heads(qkv, angles[mixer.far_layer])
        k, v = (part.repeat_interleave(decoder.plan.geometry.group, 1) for part in (k, v))
        logits = torch.einsum("thd,nhd->htn", q, k) * mixer.plan.scale
        attention = logits.masked_fill(later, -torch.inf).softmax(-1)
        return torch.einsum("htn,nhd->thd", attention, v).flatten(1)

    return decoder.logits(decoder.run(decoder.embed(ids), attend))

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_engine import changed, read, tiny_config, tiny_engine, tokens

from nearfar.evaluation.rivals import TransformersRun, twin_of

CHANGES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama, untied": {"tied_embeddings": False},
    "llama, biased": {"mixer": {"qkv_bias": True, "output_bias": True}, "mlp_bias": True},
    "qwen2": {"family": "qwen2", "mixer": {"qkv_bias": True}},
    "qwen3": {"family": "qwen3", "mixer": {"qk_norm": True}},
    "mistral": {"family": "mistral"},
    "smollm3": {"family": "smollm3", "rope_layers": (True, False)},
}


@pytest.mark.parametrize("name", CHANGES)
def test_the_twin_computes_the_same(name: str) -> None:
    model = changed(tiny_config(), **CHANGES[name])
    engine = tiny_engine(model, policy="full", device="cpu")
    prompt, answer = tokens(30).cpu(), tokens(3, seed=1).cpu()
    sequence = read(engine, prompt)
    run = TransformersRun(engine.decoder, offloaded=False)
    run.read(prompt)
    for token in answer:
        want = engine.step([sequence], [int(token)])[0]
        torch.testing.assert_close(run.decode(token[None])[0], want, rtol=1e-4, atol=1e-4)


def test_the_twin_shares_the_weights() -> None:
    engine = tiny_engine(policy="full", device="cpu")
    shared = twin_of(engine.decoder).model.layers[0].mlp.down_proj.weight
    assert shared.data_ptr() == engine.decoder.weights["layers.0.down"].data_ptr()


def test_a_filled_cache_is_as_long_as_asked() -> None:
    engine = tiny_engine(policy="full", device="cpu")
    run = TransformersRun(engine.decoder, offloaded=False)
    run.fill(40, batch=2)
    logits = run.decode(torch.tensor([1, 2]))
    assert logits.shape == (2, 97)
    assert logits.isfinite().all()
    assert run._cache.get_seq_length() == 41
    run.forget()

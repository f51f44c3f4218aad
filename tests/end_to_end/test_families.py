"""The exact policies give transformers' logits: a prompt and 32 decoded tokens, every family."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_engine import decode
from tiny_models import MODELS, build, reference_logits

from nearfar.config import EngineConfig
from nearfar.runtime.checkpoints.checkpoint import load_directory
from nearfar.runtime.engine.engine import Engine
from nearfar.runtime.models.decoder import Decoder
from nearfar.runtime.steps.prefill import prefill

PROMPT, DECODED = 37, 32


@pytest.mark.parametrize("policy", ["full", "full-far"])
@pytest.mark.parametrize("name", MODELS)
def test_prompt_and_decoded_tokens_equal_transformers(
    name: str, policy: str, tmp_path: Path
) -> None:
    model = build(name, tmp_path, max_position_embeddings=128)
    decoder = Decoder(*load_directory(tmp_path, torch.float32, torch.device("cpu")))
    config = EngineConfig(
        policy=policy, sinks=2, window=6, dtype="float32", far_dtype="float32", chunk_tokens=16
    )
    engine = Engine(name, decoder, None, config)
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(decoder.plan.vocab_size, (PROMPT + DECODED,), generator=generator)
    expected = reference_logits(model, tokens)
    sequence = engine.new_sequence()
    last = prefill(decoder, sequence, tokens[:PROMPT], config.chunk_tokens or 16)
    torch.testing.assert_close(last, expected[PROMPT - 1], rtol=0, atol=1e-3)
    logits = decode(engine, sequence, tokens[PROMPT:])
    torch.testing.assert_close(logits, expected[PROMPT:], rtol=0, atol=1e-3)

from __future__ import annotations

import pytest
import torch
from tiny_engine import tiny_engine

from nearfar.evaluation import synthetic
from nearfar.evaluation.synthetic import OFFSET, SPREAD, PowerLawKeys, random_context

SHAPE = (3, 4000, 64)


def power_law_keys(
    shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device, seed: int
) -> torch.Tensor:
    return PowerLawKeys(shape[0], shape[2], dtype, device, seed).draw(shape[1])


def test_logits_are_as_spread_as_said() -> None:
    keys = power_law_keys(SHAPE, torch.float32, torch.device("cpu"), 0)
    queries = torch.randn(200, 64)
    logits = queries @ keys.transpose(1, 2) * 64**-0.5
    spread = logits.std(-1).square().mean().sqrt()
    assert abs(float(spread) - SPREAD) < 0.3


def test_keys_share_an_offset_and_their_variance_falls_like_a_power() -> None:
    keys = power_law_keys(SHAPE, torch.float32, torch.device("cpu"), 1)
    mean = keys.mean(1)
    assert 0.6 < float(mean.std()) / (SPREAD * OFFSET) < 1.4
    for head in keys - mean[:, None]:
        values = torch.linalg.eigvalsh(head.T @ head / len(head)).flip(0)
        ranks = torch.arange(1, 65).float()
        slope = torch.linalg.lstsq(
            torch.stack([ranks.log(), torch.ones(64)], 1), values.log()[:, None]
        ).solution[0]
        assert -1.25 < float(slope) < -0.8


def test_heads_and_seeds_differ_and_types_are_kept() -> None:
    first = power_law_keys((2, 5, 8), torch.bfloat16, torch.device("cpu"), 0)
    assert first.dtype == torch.bfloat16
    assert not torch.equal(first[0], first[1])
    assert torch.equal(first, power_law_keys((2, 5, 8), torch.bfloat16, torch.device("cpu"), 0))
    assert not torch.equal(first, power_law_keys((2, 5, 8), torch.bfloat16, torch.device("cpu"), 1))


def test_a_context_is_as_long_as_asked_under_any_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic, "PIECE_TOKENS", 16)
    for policy in ("full", "full-far", "sketch", "streaming-llm", "h2o"):
        for length in (3, 8, 61):
            engine = tiny_engine(policy=policy, budget=20, device="cpu")
            sequence = random_context(engine, length)
            assert sequence.tokens == length
            held = sequence.layers[1].held_tokens
            kind = sequence.policy.traits.kind
            assert held == (min(length, 28) if kind == "evicts" else length)
            assert engine.step([sequence], [1]).isfinite().all()

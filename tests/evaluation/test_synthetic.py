from __future__ import annotations

import torch

from nearfar.evaluation.synthetic import OFFSET, SPREAD, power_law_keys

SHAPE = (3, 4000, 64)


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

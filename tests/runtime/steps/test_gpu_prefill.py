"""Which kernel reads a prompt; the kernels themselves have tests of their own."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from tiny_engine import DEVICE

from nearfar.gpu_kernels.prefill_attention import attend_prompt_reference
from nearfar.runtime.steps import gpu_prefill as near_kernels
from nearfar.runtime.steps.gpu_prefill import FEW_PAIRS, SHORT_TOKENS, attend_with_lse
from nearfar.runtime.steps.prompt_attention import GPU_PIECE_TOKENS

close = partial(torch.testing.assert_close, rtol=2e-3, atol=2e-3)


class PlannedError(Exception):
    """cuDNN was asked."""


@pytest.fixture(autouse=True)
def no_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PlannedError

    monkeypatch.setattr(near_kernels, "_attend_by_plan", refuse)


def draw(
    T: int, N: int, D: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(T + N)
    q, k, v = (torch.randn(*size, D, generator=generator) for size in ((6, T), (2, N), (2, N)))
    return q.to(DEVICE, dtype), k.to(DEVICE, dtype), v.to(DEVICE, dtype)


@pytest.mark.parametrize(("T", "N", "causal"), [(1, 1, True), (37, 37, True), (19, 130, False)])
def test_a_question_needs_no_plan(T: int, N: int, causal: bool) -> None:
    arrays = draw(T, N, 64, torch.float16)
    out, lse = attend_with_lse(*arrays, 0.1, causal=causal)
    want, want_lse = torch.empty_like(out), torch.empty_like(lse)
    attend_prompt_reference(*arrays, 0.1, want, want_lse, causal=causal)
    close(out, want)
    close(lse, want_lse)


def test_what_is_longer_is_worth_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert SHORT_TOKENS**2 < FEW_PAIRS <= GPU_PIECE_TOKENS**2  # a whole piece of a prompt has one
    monkeypatch.setattr(near_kernels, "SHORT_TOKENS", 4)
    monkeypatch.setattr(near_kernels, "FEW_PAIRS", 25)
    with pytest.raises(PlannedError):
        attend_with_lse(*draw(5, 5, 64, torch.float16), 0.1, causal=True)
    attend_with_lse(*draw(4, 30, 64, torch.float16), 0.1, causal=False)  # few queries
    attend_with_lse(*draw(6, 4, 64, torch.float16), 0.1, causal=False)  # few pairs
    for D, dtype in ((64, torch.float32), (60, torch.float16), (136, torch.float16)):
        attend_with_lse(*draw(5, 5, D, dtype), 0.1, causal=True)  # what cuDNN does not take

"""Models of one process share a GPU: a later one does not shrink what an earlier one has."""

from __future__ import annotations

import gc

import pytest
import torch
from tiny_engine import tiny_engine

from nearfar.config import GIB
from nearfar.runtime.engine import gpu_share
from nearfar.runtime.engine.gpu_share import allowed_bytes, take_share
from nearfar.runtime.engine.planning.memory_plan import CONTEXT_BYTES

TOTAL = 80 * GIB


@pytest.mark.parametrize(
    ("caps", "allowed"),
    [
        ([], TOTAL),
        ([None], TOTAL),
        ([24 * GIB], 24 * GIB - CONTEXT_BYTES),
        ([24 * GIB, 8 * GIB], 32 * GIB - CONTEXT_BYTES),
        ([24 * GIB, None], TOTAL),
        ([60 * GIB, 60 * GIB], TOTAL),
        ([CONTEXT_BYTES // 2], 0),
    ],
)
def test_the_limit_is_the_sum_of_the_shares(caps: list[int | None], allowed: int) -> None:
    assert allowed_bytes(caps, TOTAL) == allowed


def test_a_share_comes_and_goes_without_touching_others(monkeypatch: pytest.MonkeyPatch) -> None:
    device, limits = torch.device("cuda", 0), []

    class Properties:
        total_memory = TOTAL

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties)
    monkeypatch.setattr(
        torch.cuda,
        "set_per_process_memory_fraction",
        lambda share, _: limits.append(round(share * 80, 3)),
    )
    monkeypatch.setattr(gpu_share, "_shares", {})
    first, second = take_share(device, 24 * GIB), take_share(device, 12 * GIB)
    second.release()
    second.release()
    first.release()
    assert limits == [23.0, 35.0, 23.0, 80.0]


def test_a_share_goes_with_its_model() -> None:
    before = len(gpu_share._shares.get(torch.device("cpu"), {}))
    engine = tiny_engine(policy="full", device="cpu", near_memory_bytes=GIB)
    other = engine.with_policy("sketch")
    del engine
    gc.collect()
    assert len(gpu_share._shares[torch.device("cpu")]) == before + 1
    del other
    gc.collect()
    assert len(gpu_share._shares[torch.device("cpu")]) == before

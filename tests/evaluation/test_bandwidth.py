from __future__ import annotations

import time

import pytest
import torch

from nearfar.evaluation import bandwidth

CPU = torch.device("cpu")


def test_rates_are_amounts_over_the_best_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bandwidth, "_best_seconds", lambda work, _: work().numel() and 0.5)
    assert bandwidth.sequential_bytes_per_second(CPU, 4000) == 8000
    assert bandwidth.gather_bytes_per_second(24, 2400) == 100 * 24 / 0.5
    assert bandwidth.gather_bytes_per_second(24, 1) == 24 / 0.5
    assert bandwidth.matmul_flops_per_second((3, 4, 5), torch.float32, CPU) == 2 * 60 / 0.5


def test_the_best_of_several_runs_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 3.0, 10.0, 11.0, 20.0, 22.0, 30.0, 35.0, 40.0, 44.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    assert bandwidth._best_seconds(lambda: torch.zeros(1), CPU) == 1.0


def test_real_rates_are_positive() -> None:
    assert bandwidth.sequential_bytes_per_second(CPU, 2**20) > 0
    assert bandwidth.gather_bytes_per_second(256, 2**20) > 0
    assert bandwidth.matmul_flops_per_second((7, 16, 9), torch.bfloat16, CPU) > 0

"""Speed of the host kernels for one layer, each beside a ceiling measured in the same rounds.

Kernel, ceiling and rivals take turns within a round, none finds its data in cache, and a ratio is
the median over rounds of the kernel's time by the ceiling's. Seconds and bytes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numba
import numpy as np
import torch

from nearfar.cpu_kernels.compile import set_threads
from nearfar.evaluation.host_cases import (
    Case,
    HostSetting,
    Work,
    host_cases,
    huge_page_share,
    index_seconds,
    random_far,
)
from nearfar.evaluation.speed import Timing, summarise

FLUSH_BYTES = 2**28  # written between measurements: more than last-level caches hold


@dataclass(frozen=True)
class HostResult:
    """What a kernel took beside its ceiling and its rivals."""

    kernel: str
    storage: str
    threads: int
    bytes_read: int
    ceiling_name: str
    ceiling: Timing
    nearfar: Timing
    ratio: float  # nearfar by ceiling, median over rounds
    rivals: dict[str, Timing]


@dataclass(frozen=True)
class HostSpeed:
    """All kernels of one layer, and what indexing it took."""

    huge_page_share: float | None  # of the rows; None where the system does not say
    indexing: dict[str, float]
    results: tuple[HostResult, ...]


def bench_host(
    setting: HostSetting, on_result: Callable[[HostResult], None] | None = None
) -> HostSpeed:
    """Measure every kernel; each result is also handed to ``on_result`` as it is made."""
    with using_threads(setting.threads):
        far = random_far(setting, torch.bfloat16)
        indexing = index_seconds(setting, far)
        results = []
        for case, threads in host_cases(setting, far):
            with using_threads(threads):
                results.append(measure(case, threads, setting.rounds))
            if on_result is not None:
                on_result(results[-1])
    return HostSpeed(huge_page_share(far), indexing, tuple(results))


def measure(case: Case, threads: int, rounds: int) -> HostResult:
    """Rounds of ``case``; the first, which compiles, is not counted."""
    rng = np.random.default_rng(0)
    flush = torch.ones(FLUSH_BYTES // 4)
    samples: list[dict[str, float]] = []
    for _ in range(rounds + 1):
        works = case.draw(rng)
        samples.append({name: _seconds(work, flush) for name, work in works.items()})
    kept = samples[1:]
    times = {name: summarise([sample[name] for sample in kept]) for name in kept[0]}
    ratio = float(np.median([sample["nearfar"] / sample["ceiling"] for sample in kept]))
    ceiling, ours = times.pop("ceiling"), times.pop("nearfar")
    facts = (case.kernel, case.storage, threads, case.bytes_read, case.ceiling_name)
    return HostResult(*facts, ceiling, ours, ratio, times)


def _seconds(work: Work, flush: torch.Tensor) -> float:
    flush.mul_(-1)
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


@contextmanager
def using_threads(count: int) -> Iterator[None]:
    """Run with ``count`` threads of torch and of the kernels, and then with as many as before."""
    before = torch.get_num_threads(), numba.get_num_threads()
    torch.set_num_threads(count)
    set_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        set_threads(before[1])

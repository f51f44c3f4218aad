"""Speed of the host kernels for one layer, each beside a ceiling measured in the same rounds.

Kernel, ceiling and rivals take turns within a round, none finds its data in cache, and a ratio is
the median over rounds of the kernel's time by the ceiling's. Seconds and bytes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import torch

from nearfar.cpu_kernels.compile import kernel, set_threads
from nearfar.evaluation.host_cases import (
    SKETCH_BITS,
    Case,
    HostSetting,
    Work,
    attend_everything,
    attend_group,
    attend_heads,
    beside,
    beside_all,
    huge_page_share,
    index_seconds,
    probe_tables,
    random_far,
    thread_counts,
)
from nearfar.evaluation.host_select import KeySearch, check_faiss
from nearfar.evaluation.speed import Timing, summarise
from nearfar.records import FarView
from nearfar.storage import FORMATS, fits

_AWAKE = np.empty(numba.config.NUMBA_NUM_THREADS, np.uint8)  # an item for each thread
FLUSH_BYTES = 2**28  # written between measurements: more than last-level caches hold


@dataclass(frozen=True)
class HostResult:
    """The time of a kernel beside its ceiling and its rivals."""

    kernel: str
    storage: str
    threads: int
    bytes_read: int
    ceiling_name: str
    ceiling: Timing
    nearfar: Timing
    ratio: float  # nearfar by ceiling, median over rounds
    rivals: dict[str, Timing]
    times_as_fast: dict[str, float]  # as each rival: median over rounds
    recall: dict[str, float]  # by contender, where keys are chosen


@dataclass(frozen=True)
class HostSpeed:
    """All kernels of one layer, and the cost of indexing it."""

    huge_page_share: float | None  # of the rows; None where the system does not say
    indexing: dict[str, float]
    results: tuple[HostResult, ...]


def bench_host(
    setting: HostSetting,
    on_result: Callable[[HostResult], None] | None = None,
    *,
    against_faiss: bool = False,
) -> HostSpeed:
    """Measure every kernel; each result is also handed to ``on_result`` as it is made."""
    if against_faiss:
        check_faiss(setting.num_keys)
    with using_threads(setting.threads):
        far = random_far(setting, torch.bfloat16)
        indexing = index_seconds(setting, far)
        results = []
        for case, threads in host_cases(setting, far, against_faiss=against_faiss):
            with using_threads(threads):
                results.append(measure(case, threads, setting.rounds))
            if on_result is not None:
                on_result(results[-1])
    return HostSpeed(huge_page_share(far), indexing, tuple(results))


def attention_by_threads(speed: HostSpeed) -> list[HostResult]:
    """Attention over the keys of a group with 1 thread, 2 and so on to all."""
    first = speed.results[0]
    return [r for r in speed.results if (r.kernel, r.storage) == (first.kernel, first.storage)]


def host_cases(
    setting: HostSetting, far: FarView, *, against_faiss: bool
) -> Iterator[tuple[Case, int]]:
    """Cases and threads; ``far`` is bfloat16, and other types are made when their turn comes."""
    every, group = setting.threads, attend_group(setting, far, "bfloat16")
    for threads in thread_counts(every)[:-1]:
        yield group, threads
    yield beside_all(setting, far, group), every
    yield beside_all(setting, far, attend_heads(setting, far, "bfloat16")), every
    yield attend_everything(setting, far, "bfloat16"), every
    search = KeySearch(setting, far, against_faiss=against_faiss)
    for bits in SKETCH_BITS:
        yield search.case(bits), every
    yield probe_tables(setting, far), every
    for storage, dtype in FORMATS.items():
        if storage == "bfloat16" or not fits(dtype, setting.geometry.head_dim):
            continue
        other = random_far(setting, dtype)
        own = attend_group(setting, other, storage)
        yield beside(own, group), every
        yield attend_everything(setting, other, storage), every


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
    faster = {
        name: float(np.median([sample[name] / sample["nearfar"] for sample in kept]))
        for name in times
    }
    ceiling, ours = times.pop("ceiling"), times.pop("nearfar")
    ratio = 1 / faster.pop("ceiling")
    del faster["nearfar"]
    facts = (case.kernel, case.storage, threads, case.bytes_read, case.ceiling_name)
    return HostResult(*facts, ceiling, ours, ratio, times, faster, dict(case.recall))


def _seconds(work: Work, flush: torch.Tensor) -> float:
    flush.mul_(-1)
    # the flush keeps torch's threads awake, and ours sleep meanwhile: waking them takes longer than
    # some kernels, and a model at work does not let them fall asleep
    _wake_threads(_AWAKE)
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


@kernel
def _wake_threads(items: Any) -> None:
    for i in numba.prange(items.shape[0]):
        items[i] = 0


@contextmanager
def using_threads(count: int) -> Iterator[None]:
    """Run with ``count`` threads of torch and of the kernels; then restore the old numbers."""
    before = torch.get_num_threads(), numba.get_num_threads()
    torch.set_num_threads(count)
    set_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        set_threads(before[1])

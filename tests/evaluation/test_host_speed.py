"""What `bench host` measures is what it says: the same rows, the same bytes, turn by turn."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import numba
import numpy as np
import pytest
import torch

from nearfar.evaluation import host_cases, host_speed
from nearfar.evaluation.host_cases import HostSetting, thread_counts
from nearfar.evaluation.host_speed import HostResult, bench_host, measure, using_threads
from nearfar.records import Geometry

SETTING = HostSetting(Geometry(1, 6, 2, 16), num_keys=300, budget=30, threads=1, rounds=2)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_speed, "FLUSH_BYTES", 2**12)
    monkeypatch.setattr(host_cases, "TABLES", 4)
    monkeypatch.setattr(host_cases, "TABLE_BITS", 3)


def test_every_kernel_is_measured_beside_its_ceiling() -> None:
    seen: list[HostResult] = []
    speed = bench_host(SETTING, seen.append)
    assert list(speed.results) == seen
    names = [(result.kernel, result.storage) for result in seen]
    for storage in ("bfloat16", "float16", "float32", "int8", "int4"):
        assert ("attend, keys of a group", storage) in names
        assert ("attend, all keys", storage) in names
    assert {("choose 1 % by sketch", f"{bits} bits") for bits in (1, 2, 4)} <= set(names)
    assert ("probe tables", "4 x 3 bits") in names
    for result in seen:
        assert result.nearfar.p20_seconds <= result.nearfar.median_seconds
        assert result.ceiling.median_seconds > 0
        assert result.ratio > 0
        assert list(result.rivals) == list(result.times_as_fast)
    assert [list(result.rivals) for result in seen if result.rivals] == [
        ["torch SDPA over all keys"],
        ["torch SDPA over all keys"],
        *[["nearfar bfloat16"]] * 4,
    ]
    recalls = [result.recall["nearfar"] for result in seen if result.recall]
    assert 1 >= recalls[0] >= recalls[1] >= recalls[2] > 0
    assert speed.indexing["tables_seconds"] > 0
    assert 0 < speed.indexing["sketch_bytes_by_far_bytes"] < 1


def test_bytes_are_those_of_the_rows_read() -> None:
    far = host_cases.random_far(SETTING, torch.int8)
    assert host_cases.attend_group(SETTING, far, "int8").bytes_read == 2 * 30 * 32
    assert host_cases.attend_heads(SETTING, far, "int8").bytes_read == 6 * 30 * 32
    assert host_cases.attend_everything(SETTING, far, "int8").bytes_read == 2 * 300 * 32


def test_ceiling_copies_other_rows_of_the_same_heads() -> None:
    far = host_cases.random_far(SETTING, torch.float32)
    works = host_cases.attend_heads(SETTING, far, "float32").draw(np.random.default_rng(0))
    copied = works["ceiling"]()
    assert isinstance(copied, torch.Tensor)
    for head in range(6):
        rows = far.rows[head // 3].tolist()
        assert all(row in rows for row in copied.view(6, 30, 32)[head].tolist())


def test_works_take_turns_and_the_first_round_is_not_counted() -> None:
    calls: list[str] = []

    def draw(_: np.random.Generator) -> dict[str, host_cases.Work]:
        return {name: partial(calls.append, name) for name in ("ceiling", "nearfar", "x")}

    case = host_cases.Case("kernel", "storage", 8, "copy", draw)
    other = replace(case, storage="other", draw=lambda _: {"nearfar": partial(calls.append, "y")})
    result = measure(host_cases.beside(case, other), 1, rounds=3)
    assert calls == ["ceiling", "nearfar", "x", "y"] * 4
    assert list(result.rivals) == ["x", "nearfar other"]
    assert result.threads == 1


def test_ratios_are_medians_over_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernel, ceiling and rival take 2, 1 and 6 s, and 20 times as long in every third round."""
    takes = iter([1, 2, 6, *[20, 40, 120, 1, 2, 6, 1, 2, 6] * 2])
    monkeypatch.setattr(host_speed, "_seconds", lambda *_: float(next(takes)))
    works: dict[str, host_cases.Work] = dict.fromkeys(("ceiling", "nearfar", "x"), list)
    case = host_cases.Case("kernel", "storage", 8, "copy", lambda _: works)
    result = measure(case, 1, rounds=6)
    assert result.ratio == 2
    assert result.times_as_fast == {"x": 3}
    assert result.nearfar.median_seconds == 2


def test_attention_by_threads_is_one_kernel_with_more_and_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(host_speed, "using_threads", lambda _: nullcontext())
    setting = replace(SETTING, threads=3, rounds=1)
    found = host_speed.attention_by_threads(bench_host(setting))
    assert [result.threads for result in found] == [1, 2, 3]
    assert {result.kernel for result in found} == {"attend, keys of a group"}


def test_thread_counts_end_at_all() -> None:
    assert [thread_counts(n) for n in (1, 2, 3, 8, 12)] == [
        [1],
        [1, 2],
        [1, 2, 3],
        [1, 2, 4, 8],
        [1, 2, 4, 8, 12],
    ]


def test_threads_are_given_back() -> None:
    before = torch.get_num_threads(), numba.get_num_threads()
    with using_threads(1):
        assert torch.get_num_threads() == numba.get_num_threads() == 1
    assert (torch.get_num_threads(), numba.get_num_threads()) == before

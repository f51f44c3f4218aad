"""What `bench host` measures is what it says: the same rows, the same bytes, turn by turn."""

from __future__ import annotations

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
    for storage in ("bfloat16", "float16", "float32", "int8"):
        assert ("attend, keys of a group", storage) in names
        assert ("attend, all keys", storage) in names
    assert {("select by sketch", f"{bits} bits") for bits in (1, 2, 4)} <= set(names)
    assert ("probe tables", "4 x 3 bits") in names
    for result in seen:
        assert result.nearfar.p20_seconds <= result.nearfar.median_seconds
        assert result.ceiling.median_seconds > 0
        assert result.ratio > 0
    assert [list(result.rivals) for result in seen if result.rivals] == [
        ["torch SDPA over all keys"]
    ]
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

    result = measure(host_cases.Case("kernel", "storage", 8, "copy", draw), 1, rounds=3)
    assert calls == ["ceiling", "nearfar", "x"] * 4
    assert list(result.rivals) == ["x"]
    assert result.threads == 1


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

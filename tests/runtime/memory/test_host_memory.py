"""Reserved memory costs nothing until it is touched, and lies on huge pages where it may."""

from __future__ import annotations

import platform
from pathlib import Path

import numpy as np
import psutil
import pytest

from nearfar.errors import OutOfMemoryError
from nearfar.runtime.memory import host_memory
from nearfar.runtime.memory.hardware import huge_page_mode
from nearfar.runtime.memory.host_memory import (
    give_back_freed,
    huge_page_bytes,
    memory_nodes,
    reserve,
)

MIB = 2**20


def test_untouched_memory_costs_nothing_and_reads_as_zeros() -> None:
    before = psutil.Process().memory_info().rss
    memory = reserve(2**36)
    assert memory[2**35 : 2**35 + 100].max() == 0
    assert psutil.Process().memory_info().rss - before < 16 * MIB


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be asked")
def test_what_was_freed_is_given_back() -> None:
    held = [np.full(2**16, 1, np.uint8) for _ in range(1600)]  # 100 MiB, each too small to map
    last = held.pop()  # the heap cannot shrink below it by itself
    del held
    before = psutil.Process().memory_info().rss
    give_back_freed()
    assert before - psutil.Process().memory_info().rss > 80 * MIB
    assert last.sum() == 2**16


def test_refusal_says_what_to_do() -> None:
    with pytest.raises(OutOfMemoryError, match=r"refused to reserve \d+ bytes .*ulimit -v"):
        reserve(2**62)


@pytest.mark.skipif(huge_page_mode() not in ("always", "madvise"), reason="no huge pages here")
def test_huge_pages_are_granted_and_counted() -> None:
    memory = reserve(64 * MIB)
    assert huge_page_bytes(memory) == 0
    memory[:] = 1
    granted = huge_page_bytes(memory)
    assert granted is not None
    assert granted >= 16 * MIB  # all but the ends, unless memory is fragmented
    assert huge_page_bytes(np.ones(3)) is not None


def test_nodes_of_a_machine(tmp_path: Path) -> None:
    assert memory_nodes(tmp_path) == [0]
    (tmp_path / "has_memory").write_text("0-2,5\n")
    assert memory_nodes(tmp_path) == [0, 1, 2, 5]


def test_memory_is_usable_whether_or_not_the_system_spreads_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for nodes in ([0, 0], [0, 77]):  # the second names a node that is not there
        monkeypatch.setattr(host_memory, "memory_nodes", lambda nodes=nodes: nodes)
        memory = reserve(MIB)
        memory[:] = 3
        assert memory.min() == 3

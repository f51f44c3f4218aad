from __future__ import annotations

import mmap
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import psutil
import pytest

from nearfar.cpu_kernels.pages import STEP_BYTES, provide_pages, touch_pages

MIB = 2**20


@pytest.mark.parametrize("parts", [1, 3])
def test_pages_are_provided_once_touched(parts: int) -> None:
    memory = mmap.mmap(-1, 64 * MIB)
    address = np.frombuffer(memory, np.uint8).ctypes.data
    before = psutil.Process().memory_info().rss
    with ThreadPoolExecutor(2) as workers:
        provide_pages(address, 64 * MIB, workers, parts)
    assert psutil.Process().memory_info().rss - before > 60 * MIB


@pytest.mark.parametrize("parts", [1, 2, 3, 7])
def test_only_first_bytes_of_pages_are_written(parts: int) -> None:
    memory = np.full(3 * STEP_BYTES + 5, 7, np.uint8)
    with ThreadPoolExecutor(2) as workers:
        provide_pages(memory.ctypes.data, 0, workers, parts)
        assert (memory == 7).all()
        provide_pages(memory.ctypes.data, memory.nbytes, workers, parts)
    assert memory[::STEP_BYTES].tolist() == [0, 0, 0, 0]
    assert (np.delete(memory, slice(None, None, STEP_BYTES)) == 7).all()
    touch_pages.py_func(memory[1:])
    assert memory[1::STEP_BYTES].tolist() == [0, 0, 0, 0]


def test_they_are_touched_without_a_team_of_threads() -> None:
    """A second team of OpenMP threads would make all of them sleep between kernels."""
    assert not touch_pages.targetoptions.get("parallel", False)

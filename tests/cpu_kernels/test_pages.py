from __future__ import annotations

import mmap

import numpy as np
import psutil

from nearfar.cpu_kernels.pages import STEP_BYTES, provide_pages, touch_pages

MIB = 2**20


def test_pages_are_provided_once_touched() -> None:
    memory = mmap.mmap(-1, 64 * MIB)
    address = np.frombuffer(memory, np.uint8).ctypes.data
    before = psutil.Process().memory_info().rss
    provide_pages(address, 64 * MIB)
    assert psutil.Process().memory_info().rss - before > 60 * MIB


def test_only_first_bytes_of_pages_are_written() -> None:
    memory = np.full(3 * STEP_BYTES + 5, 7, np.uint8)
    touch_pages.py_func(memory)
    assert memory[::STEP_BYTES].tolist() == [0, 0, 0, 0]
    assert (np.delete(memory, slice(None, None, STEP_BYTES)) == 7).all()
    provide_pages(memory.ctypes.data, 0)

"""Pages of memory that the system has promised and not provided yet."""

from __future__ import annotations

import ctypes
from concurrent.futures import Executor

import numpy as np

from nearfar.cpu_kernels.compile import serial

STEP_BYTES = 4096  # no system has smaller pages


@serial
def touch_pages(
    memory,  # [bytes] uint8, the first byte of every page written
):
    """Make the system provide every page of ``memory``."""
    for start in range(0, memory.shape[0], STEP_BYTES):
        memory[start] = 0


def provide_pages(address: int, num_bytes: int, workers: Executor, parts: int) -> None:
    """Have ``num_bytes`` of writable memory from ``address`` on provided; loses what it holds.

    The ``workers`` do it in so many ``parts``. They are not the threads of the other kernels: these
    are OpenMP's, which gives a thread that calls them a team of its own; with more in all teams
    than CPUs every team sleeps between kernels, and is woken for each, for as long as it lives.
    """
    memory = np.ctypeslib.as_array((ctypes.c_uint8 * num_bytes).from_address(address))
    step = -(-num_bytes // (parts * STEP_BYTES)) * STEP_BYTES
    pieces = [memory[start : start + step] for start in range(0, num_bytes, step or 1)]
    for _ in workers.map(touch_pages, pieces):
        pass

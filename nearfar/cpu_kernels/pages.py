"""Makes the system provide pages of memory that it has only promised."""

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
    """Provide ``num_bytes`` of writable memory from ``address`` on; its content is lost.

    The ``workers`` do it in ``parts`` parts. They are not the threads of the other kernels: OpenMP
    would give the calling thread a team of its own. With more threads in all teams than CPUs, every
    team sleeps between kernels and must be woken for each.
    """
    memory = np.ctypeslib.as_array((ctypes.c_uint8 * num_bytes).from_address(address))
    step = -(-num_bytes // (parts * STEP_BYTES)) * STEP_BYTES
    pieces = [memory[start : start + step] for start in range(0, num_bytes, step or 1)]
    for _ in workers.map(touch_pages, pieces):
        pass

"""Pages of memory that the system has promised and not provided yet."""

from __future__ import annotations

import ctypes

import numba
import numpy as np

from nearfar.cpu_kernels.compile import kernel

STEP_BYTES = 4096  # no system has smaller pages


@kernel
def touch_pages(
    memory,  # [bytes] uint8, the first byte of every page written
):
    """Make the system provide every page of ``memory``, on all threads."""
    for page in numba.prange((memory.shape[0] + STEP_BYTES - 1) // STEP_BYTES):
        memory[page * STEP_BYTES] = 0


def provide_pages(address: int, num_bytes: int) -> None:
    """Have ``num_bytes`` of writable memory from ``address`` on provided; loses what it holds."""
    memory = (ctypes.c_uint8 * num_bytes).from_address(address)
    touch_pages(np.ctypeslib.as_array(memory))

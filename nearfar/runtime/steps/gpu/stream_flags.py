"""Flags in pinned memory that a stream writes and waits for: stream memory operations of CUDA.

The GPU's front end writes and waits, no kernel runs meanwhile, and a CUDA graph captures both. On
an H200 a round trip to a host thread that answers at once takes 6 us. A wait inside a kernel took
7.5 us, and hundreds if many programs waited at once.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache

import torch

from nearfar.errors import DeviceError

_GREATER_OR_EQUAL = 0  # CU_STREAM_WAIT_VALUE_GEQ, of the signed difference
RELEASE = 2**30  # a value that ends every wait


@lru_cache(maxsize=1)
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _call(name: str, stream: torch.cuda.Stream, address: int, value: int, flags: int) -> None:
    function = getattr(_driver(), name)
    function.argtypes = [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint]
    code = function(stream.cuda_stream, address, value, flags)
    if code != 0:
        raise DeviceError(
            f"The CUDA driver refused {name} (error {code}). Update the driver to one for CUDA 12 "
            "or newer, or use --device cpu."
        )


def write_flag(stream: torch.cuda.Stream, address: int, value: int) -> None:
    """Write ``value`` to the int32 at ``address``, after all earlier work of ``stream``."""
    _call("cuStreamWriteValue32_v2", stream, address, value, 0)


def wait_for_flag(stream: torch.cuda.Stream, address: int, value: int) -> None:
    """Hold ``stream`` until the int32 at ``address`` is ``value`` or more."""
    _call("cuStreamWaitValue32_v2", stream, address, value, _GREATER_OR_EQUAL)

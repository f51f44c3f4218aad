"""The one place that decides how CPU kernels are compiled.

`kernel` is for functions that split their work over threads with `numba.prange`, `serial` for the
helpers inside them. Both release the GIL. Fast-math is on but for the two flags that would break
the code: `nnan` and `ninf`, because an empty set has a log-sum-exp of -inf.

Compiled code is cached on disk, keyed by Numba with the CPU, its own version and the source file. A
folder that cannot be written costs a compilation per process and nothing else.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Numba's OpenMP layer needs libgomp; torch brings one, and sharing it means one thread pool
import torch  # noqa: F401

from nearfar.config import cache_root

FAST_MATH = {"reassoc", "contract", "arcp", "nsz", "afn"}


def _cache_directory() -> Path | None:
    """Where compiled kernels are kept, or None where nothing can be written."""
    folder = cache_root() / "kernels"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return folder if os.access(folder, os.W_OK) else None


_cache = _cache_directory()
if _cache is not None:
    os.environ.setdefault("NUMBA_CACHE_DIR", str(_cache))

import numba  # noqa: E402  reads NUMBA_CACHE_DIR when it is imported


def kernel(function: Callable[..., Any]) -> Any:
    """Compile a kernel whose `prange` loops run on the host threads."""
    return numba.njit(
        parallel=True, nogil=True, cache=_cache is not None, fastmath=FAST_MATH, error_model="numpy"
    )(function)


def serial(function: Callable[..., Any]) -> Any:
    """Compile a helper or a kernel that runs on the calling thread."""
    return numba.njit(
        nogil=True, cache=_cache is not None, fastmath=FAST_MATH, error_model="numpy"
    )(function)


def set_threads(count: int) -> None:
    """Host threads that `kernel` functions use, at most those Numba started with."""
    numba.set_num_threads(min(count, numba.config.NUMBA_NUM_THREADS))


def inlined(function: Callable[..., Any]) -> Any:
    """Compile a helper into each of its callers, so that slices passed to it cost nothing."""
    return numba.njit(nogil=True, fastmath=FAST_MATH, error_model="numpy", inline="always")(
        function
    )

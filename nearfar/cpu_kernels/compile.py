"""Decides how CPU kernels are compiled, and where the result is kept.

`kernel` is for functions that split their work over threads with `numba.prange`, `serial` for the
helpers inside them. Both release the GIL. Fast-math is on but for the two flags that would break
the code: `nnan` and `ninf`, because an empty set has a log-sum-exp of -inf.

Compiled code is kept on disk in a folder named by the sources of this room, in files keyed by Numba
with the CPU and its own version. So a machine compiles once, and a change anywhere in this room
compiles again: Numba alone would check only the file of each function, not those of its callees. If
the folder cannot be written or the disk is full, each process compiles for itself.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import pickle
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import torch  # noqa: F401  Numba's OpenMP layer needs libgomp: sharing torch's means one thread pool
from llvmlite.binding import get_host_cpu_features
from numba.core.caching import FunctionCache

from nearfar.config import cache_root

FAST_MATH = {"reassoc", "contract", "arcp", "nsz", "afn"}
KEEP_SECONDS = 30 * 24 * 3600  # code of other versions is removed once it is so old

_log = logging.getLogger(__name__)


def cache_directory() -> Path | None:
    """Where this version's compiled kernels are kept, or None where nothing can be written."""
    sources = sorted(Path(__file__).parent.glob("*.py"))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]
    folder = cache_root() / "kernels" / digest
    try:
        if not folder.exists():
            _remove_old(folder.parent)
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return folder if os.access(folder, os.W_OK) else None


def _remove_old(parent: Path) -> None:
    for folder in parent.iterdir() if parent.exists() else ():
        old = folder.stat().st_mtime < time.time() - KEEP_SECONDS
        if old and re.fullmatch("[0-9a-f]{16}", folder.name) and _holds_code_alone(folder):
            shutil.rmtree(folder, ignore_errors=True)


def _holds_code_alone(folder: Path) -> bool:
    """Whether it contains only files that Numba writes."""
    files = [path for path in folder.rglob("*") if not path.is_dir()]
    return all(".nbi" in path.name or ".nbc" in path.name for path in files)


_cache = cache_directory()
if _cache is not None:
    numba.config.CACHE_DIR = str(_cache)


class _Cache(FunctionCache):  # type: ignore[misc]  # Numba has no types
    """Numba's cache, but no failure to read or write it reaches the caller."""

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            found = super().load_overload(sig, target_context)
        except (OSError, EOFError, pickle.UnpicklingError):
            found = None
        if found is None:
            _announce()
        return found

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            super().save_overload(sig, data)
        except OSError as error:
            _log.warning("Compiled kernels cannot be kept in %s: %s.", _cache, error.strerror)


@functools.cache
def _announce() -> None:
    """Log once that kernels are being compiled, while a new process computes nothing."""
    _log.warning("Compiling kernels for this CPU, once on this machine; it takes some seconds.")


def cpu_features() -> frozenset[str]:
    """LLVM's names of what the CPU that kernels are compiled for can do."""
    named, features = numba.config.CPU_NAME, numba.config.CPU_FEATURES
    if features is None and named is None:
        return frozenset(name for name, there in get_host_cpu_features().items() if there)
    return frozenset(name[1:] for name in (features or "").split(",") if name.startswith("+"))


def kernel(function: Callable[..., Any]) -> Any:
    """Compile a kernel whose `prange` loops run on the host threads."""
    return _compiled(function, parallel=True)


def serial(function: Callable[..., Any]) -> Any:
    """Compile a helper or a kernel that runs on the calling thread."""
    return _compiled(function)


def emitted(function: Callable[..., Any]) -> Any:
    """Compile a helper whose body is our own LLVM code, whose rounding must not change."""
    return _compiled(function, fastmath=False)


def _compiled(function: Callable[..., Any], **options: Any) -> Any:
    options = {"nogil": True, "fastmath": FAST_MATH, "error_model": "numpy"} | options
    made = numba.njit(**options)(function)
    if _cache is not None:
        made._cache = _Cache(function)
    return made


def set_threads(count: int) -> None:
    """Host threads that `kernel` functions use, at most those Numba started with."""
    numba.set_num_threads(min(count, numba.config.NUMBA_NUM_THREADS))


def inlined(function: Callable[..., Any]) -> Any:
    """Compile a helper into each of its callers, so that slices passed to it cost nothing."""
    return numba.njit(nogil=True, fastmath=FAST_MATH, error_model="numpy", inline="always")(
        function
    )

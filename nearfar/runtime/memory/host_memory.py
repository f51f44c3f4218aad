"""Large ranges of host memory: reserved at once, allocated when touched, on huge pages.

Rows of keys and values are read at random. On pages of 4 KiB nearly every read would also miss the
TLB, so huge pages are advised; `huge_page_bytes` returns how much the system granted. On a machine
with several memory nodes, pages are spread over the nodes in turn. So all memory channels serve
every thread, and no thread has to be bound to a node. This module uses no model.
"""

from __future__ import annotations

import ctypes
import mmap
import platform
import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nearfar.errors import OutOfMemoryError

NODES = Path("/sys/devices/system/node")
_MAPS = Path("/proc/self/smaps")
# Linux; the mmap module has the name since Python 3.13. With 0 the reservation is a plain one
_NO_RESERVE = 0x4000 if hasattr(mmap, "MADV_HUGEPAGE") else 0
_MBIND = {"x86_64": 237, "aarch64": 235}  # system calls
_INTERLEAVE = 3  # MPOL_INTERLEAVE


def reserve(num_bytes: int) -> NDArray[np.uint8]:
    """``num_bytes`` > 0 of zeroed address space; untouched pages take no memory."""
    try:
        if hasattr(mmap, "MAP_PRIVATE"):
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE
            memory = mmap.mmap(-1, num_bytes, flags=flags)
        else:
            memory = mmap.mmap(-1, num_bytes)
    except (OSError, ValueError) as error:
        raise OutOfMemoryError(
            f"The system refused to reserve {num_bytes} bytes of address space for far memory "
            f"({error}). Raise the limit (ulimit -v) or give a shorter text."
        ) from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    taken: NDArray[np.uint8] = np.frombuffer(memory, np.uint8)
    nodes = memory_nodes()
    if len(nodes) > 1:
        _interleave(taken, nodes)
    return taken


def memory_nodes(folder: Path = NODES) -> list[int]:
    """Numbers of the nodes that have memory; [0] if the system does not list them."""
    try:
        words = (folder / "has_memory").read_text().strip().split(",")
    except OSError:
        return [0]
    ranges = [word.split("-") for word in words if word]
    return [node for ends in ranges for node in range(int(ends[0]), int(ends[-1]) + 1)]


def _interleave(memory: NDArray[np.uint8], nodes: list[int]) -> None:
    """Spread pages over ``nodes``; if the system refuses, each is on the node that touches it."""
    number = _MBIND.get(platform.machine())
    if number is None or platform.system() != "Linux":
        return
    mask = (ctypes.c_ulong * 16)()
    for node in nodes:
        mask[node // 64] |= 1 << node % 64
    start, size = ctypes.c_void_p(memory.ctypes.data), ctypes.c_ulong(memory.nbytes)
    libc = ctypes.CDLL(None)
    libc.syscall(number, start, size, _INTERLEAVE, mask, ctypes.c_ulong(16 * 64), 0)


def huge_page_bytes(memory: NDArray[Any]) -> int | None:
    """Bytes on huge pages in the mappings that contain ``memory``; None if unknown."""
    try:
        text = _MAPS.read_text()
    except OSError:
        return None
    first, last = memory.ctypes.data, memory.ctypes.data + memory.nbytes
    total = 0
    for entry in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", text):
        low, high = (int(end, 16) for end in entry.split(" ", 1)[0].split("-"))
        granted = re.search(r"AnonHugePages:\s+(\d+) kB", entry)
        if low < last and first < high and granted:
            total += int(granted[1]) * 1024
    return min(total, memory.nbytes)


def give_back_freed() -> None:
    """Return freed memory from the C allocator to the system, if the allocator supports it.

    Loading a model and reading a question take tens of MiB for a moment. A process that waits for
    the next question would hold them.
    """
    if platform.system() == "Linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
        if trim is not None:
            trim(0)

"""From the GPU into host memory where it shall stay, without a copy in between.

A large destination is provided (its pages come from the system then) and registered with CUDA, so
that the copy engine writes to it while kernels run; it stays registered until `close`. Both take
time and are done ahead, by a thread of their own, for destinations that are announced. Where
registering fails, and for small pieces, a copy waits.
"""

from __future__ import annotations

import mmap
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from nearfar.cpu_kernels.pages import provide_pages

LEAST_BYTES = 2**20  # registering less costs more than it saves


class HostCopies:
    """Copies from one GPU to host memory that is not freed before `close`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._registered: dict[int, int] = {}  # start: end, whole pages
        self._ahead = ThreadPoolExecutor(1, thread_name_prefix="nearfar-register")
        self._announced: dict[int, Future[None]] = {}  # by address of the destination
        self._pending: list[tuple[torch.cuda.Event, Tensor]] = []  # sources must outlive copies

    def announce(self, target: Tensor) -> None:
        """Provide and register ``target`` [heads, n, ...] soon; a copy there waits for that."""
        if target[0].nbytes >= LEAST_BYTES:
            work = self._ahead.submit(self._register_heads, target)
            self._announced[target.data_ptr()] = work

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Copy ``source`` [heads, n, ...] to ``target``, whose heads are contiguous, soon."""
        asynchronous = target[0].nbytes >= LEAST_BYTES
        if asynchronous:
            if target.data_ptr() not in self._announced:
                self.announce(target)
            self._announced.pop(target.data_ptr()).result()
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for here, there in zip(target, source, strict=True):
                here.copy_(there, non_blocking=asynchronous)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(self._stream)
        self._pending.append((event, source))

    def settle(self) -> None:
        """Wait for all copies."""
        for event, _ in self._pending:
            event.synchronize()
        self._pending.clear()

    def close(self) -> None:
        """Wait, and let the system have its memory back."""
        self._ahead.shutdown(wait=True, cancel_futures=True)
        self.settle()
        runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        for start in self._registered:
            runtime.cudaHostUnregister(start)
        self._registered.clear()

    def _register_heads(self, target: Tensor) -> None:
        with torch.cuda.device(self._device):
            for head in target:
                self._register(head)

    def _register(self, memory: Tensor) -> None:
        """Register the whole pages around ``memory`` that are not registered yet."""
        page = mmap.PAGESIZE
        first, end = memory.data_ptr(), memory.data_ptr() + memory.nbytes
        start, stop = first // page * page, -(-end // page) * page
        for old_start, old_stop in self._registered.items():
            if old_start <= start < old_stop:
                start = old_stop
        if stop - start < LEAST_BYTES:
            return
        # whole pages of `memory` alone: its first and last may have rows of others
        whole = -(-max(first, start) // page) * page
        provide_pages(whole, max(0, end // page * page - whole))
        # refused (too much is locked already, say), the copy just waits
        runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        if int(runtime.cudaHostRegister(start, stop - start, 0)) == 0:
            self._registered[start] = stop

"""From the GPU into host memory where it shall stay, without a copy in between.

A large destination is touched (its pages come from the system then) and registered with CUDA, so
that the copy engine writes to it while kernels run; it stays registered until `close`. Where
registering fails, and for small pieces, a copy waits. Copies of one kind of destination are made in
a stream of their own, and are over when `settle` returns.
"""

from __future__ import annotations

import mmap
from typing import Any

import torch
from torch import Tensor

from nearfar.cpu_kernels.pages import provide_pages

LEAST_BYTES = 2**20  # registering less costs more than it saves


class HostCopies:
    """Copies from one GPU to host memory that is not freed before `close`."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._registered: dict[int, int] = {}  # start: end, whole pages
        self._pending: list[tuple[torch.cuda.Event, Tensor]] = []  # sources must outlive copies

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Copy ``source`` [heads, n, ...] to ``target``, whose heads are contiguous, soon."""
        self._stream.wait_stream(torch.cuda.current_stream(source.device))
        asynchronous = target[0].nbytes >= LEAST_BYTES
        with torch.cuda.stream(self._stream):
            for here, there in zip(target, source, strict=True):
                if asynchronous:
                    self._register(here)
                here.copy_(there, non_blocking=asynchronous)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(self._stream)
        self._pending.append((event, source))

    def wait_for(self, copies: int) -> None:
        """Wait until at most ``copies`` are under way."""
        while len(self._pending) > copies:
            event, _ = self._pending.pop(0)
            event.synchronize()

    def settle(self) -> None:
        """Wait for all copies."""
        self.wait_for(0)

    def close(self) -> None:
        """Wait, and let the system have its memory back."""
        self.settle()
        runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        for start in self._registered:
            runtime.cudaHostUnregister(start)
        self._registered.clear()

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
        whole = -(-first // page) * page
        provide_pages(whole, max(0, end // page * page - whole))
        # refused (too much is locked already, say), the copy just waits
        runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        if int(runtime.cudaHostRegister(start, stop - start, 0)) == 0:
            self._registered[start] = stop

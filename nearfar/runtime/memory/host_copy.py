"""Copies between the GPU and the final place of rows in host memory, without staging.

The pages of a large destination are allocated and registered with CUDA, so that the copy engine
reads and writes them while kernels run. They stay registered until `close`. Both operations take
time, so a separate thread does them ahead for announced destinations. Memory that is not
registered, because it is small or because the system refused, is copied through a staging buffer:
CUDA refuses a range of which only a part is registered.
"""

from __future__ import annotations

import mmap
from collections import abc
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from nearfar.cpu_kernels.pages import provide_pages

LEAST_BYTES = 2**20  # registering less costs more than it saves


class Registered:
    """Ranges of host memory that are registered with CUDA."""

    def __init__(self) -> None:
        self.spans: dict[int, int] = {}  # start: end, whole pages, disjoint

    def free_part(self, start: int, stop: int) -> tuple[int, int]:
        """The pages around ``start`` to ``stop`` that are not registered: one range, or empty.

        Memory is filled from its start, so registered pages come before the others.
        """
        page = mmap.PAGESIZE
        first, end = start // page * page, -(-stop // page) * page
        return min(self.reach(first), end), end

    def pieces(self, start: int, stop: int) -> list[tuple[int, int, bool]]:
        """``start`` to ``stop`` in pieces, each with whether it is registered."""
        found = []
        while start < stop:
            span = self._span_at(start)
            if span is not None:
                end = min(span[1], stop)
            else:
                later = [first for first in list(self.spans) if start < first < stop]
                end = min(later, default=stop)
            found.append((start, end, span is not None))
            start = end
        return found

    def reach(self, start: int) -> int:
        """The end of the registered range around ``start``; ``start`` if there is none."""
        while (span := self._span_at(start)) is not None:
            start = span[1]
        return start

    def _span_at(self, address: int) -> tuple[int, int] | None:
        spans = list(self.spans.items())  # a copy: another thread may add one
        return next((s for s in spans if s[0] <= address < s[1]), None)


class HostCopies:
    """Copies between one GPU and host memory that is not freed before `close`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._registered = Registered()
        self._ahead = ThreadPoolExecutor(1, thread_name_prefix="nearfar-register")
        self._hands = torch.get_num_threads()
        self._providers = ThreadPoolExecutor(self._hands, thread_name_prefix="nearfar-provide")
        self._announced: dict[int, Future[None]] = {}  # by address of the destination
        self._reach = (0, 0)  # registered ranges, and the rows that they make readable
        self._pending: list[tuple[torch.cuda.Event, Tensor]] = []  # sources must outlive copies

    def announce(self, target: Tensor) -> None:
        """Start to allocate and register ``target`` [heads, n, width]; copies there wait for it."""
        if target[0].nbytes >= LEAST_BYTES:
            work = self._ahead.submit(self._register_heads, target)
            self._announced[target.data_ptr()] = work

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Start to copy ``source`` [heads, n, width] to ``target`` on the host."""
        if target[0].nbytes >= LEAST_BYTES and target.data_ptr() not in self._announced:
            self.announce(target)
        self._wait_for_announced(target)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for here, there in zip(target, source, strict=True):
                self._move(here, there, host=here)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(self._stream)
        self._pending.append((event, source))

    def bring(self, target: Tensor, source: Tensor) -> None:
        """Copy ``source`` [heads, n, width] on the host to ``target``, in the current stream."""
        self.settle()
        for there, here in zip(target, source, strict=True):
            self._move(there, here, host=here)

    def readable_tokens(self, rows: abc.Sequence[Tensor]) -> int:
        """How many of the first rows of every head and layer kernels can read in place."""
        spans = len(self._registered.spans)
        if self._reach[0] != spans:  # cached, since every step reads it
            starts = [head for layer in rows for head in layer]
            reach = [
                (self._registered.reach(head.data_ptr()) - head.data_ptr())
                // (head.stride(0) * head.element_size())
                for head in starts
            ]
            self._reach = (spans, min(reach, default=0))
        return self._reach[1]

    def settle(self) -> None:
        """Wait for all copies to the host."""
        for event, _ in self._pending:
            event.synchronize()
        self._pending.clear()

    def close(self) -> None:
        """Wait for all copies and unregister the memory."""
        self._ahead.shutdown(wait=True, cancel_futures=True)
        self._providers.shutdown()
        self.settle()
        runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        for start in self._registered.spans:
            runtime.cudaHostUnregister(start)
        self._registered.spans.clear()

    def _move(self, target: Tensor, source: Tensor, host: Tensor) -> None:
        """Copy [n, width] in pieces of whole rows; ``host`` is the tensor on the host."""
        row_bytes, base = host.stride(0) * host.element_size(), host.data_ptr()
        done = 0
        for start, stop, registered in self._registered.pieces(base, base + host.nbytes):
            # a row across the border of a registered range is not registered as a whole
            first, last = -(-(start - base) // row_bytes), (stop - base) // row_bytes
            if registered and first < last:
                self._move_slowly(target[done:first], source[done:first], host is target)
                target[first:last].copy_(source[first:last], non_blocking=True)
                done = last
        self._move_slowly(target[done:], source[done:], host is target)

    def _move_slowly(self, target: Tensor, source: Tensor, to_host: bool) -> None:
        """Copy through a staging buffer."""
        if len(target):
            target.copy_(source.cpu() if to_host else source.clone())

    def _wait_for_announced(self, target: Tensor) -> None:
        announced = self._announced.pop(target.data_ptr(), None)
        if announced is not None:
            announced.result()

    def _register_heads(self, target: Tensor) -> None:
        with torch.cuda.device(self._device):
            for head in target:
                self._register(head)

    def _register(self, memory: Tensor) -> None:
        """Register the whole pages around ``memory`` that are not registered yet."""
        first, end = memory.data_ptr(), memory.data_ptr() + memory.nbytes
        start, stop = self._registered.free_part(first, end)
        if stop - start < LEAST_BYTES:
            return
        # only pages that belong to `memory` as a whole: its first and last may contain other rows
        page = mmap.PAGESIZE
        whole = -(-max(first, start) // page) * page
        provided = max(0, end // page * page - whole)
        provide_pages(whole, provided, self._providers, self._hands)
        runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        if int(runtime.cudaHostRegister(start, stop - start, 0)) == 0:
            self._registered.spans[start] = stop

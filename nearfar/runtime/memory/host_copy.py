"""Between the GPU and host memory where rows shall stay, without a copy in between.

A large destination is provided (its pages come from the system then) and registered with CUDA, so
that the copy engine reads and writes it while kernels run; it stays registered until `close`. Both
take time and are done ahead, by a thread of their own, for destinations that are announced. What is
not registered, because it is small or because the system refused, goes through other memory: CUDA
takes no range of which only a part is registered.
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
    """Stretches of host memory that CUDA knows: which bytes of a range lie in them."""

    def __init__(self) -> None:
        self.spans: dict[int, int] = {}  # start: end, whole pages, disjoint

    def free_part(self, start: int, stop: int) -> tuple[int, int]:
        """The pages around ``start`` to ``stop`` that are not registered: one stretch, or empty.

        Memory is filled from its start, so what is registered lies before what is not.
        """
        page = mmap.PAGESIZE
        first, end = start // page * page, -(-stop // page) * page
        return min(self.reach(first), end), end

    def pieces(self, start: int, stop: int) -> list[tuple[int, int, bool]]:
        """``start`` to ``stop`` in pieces that are registered or not, and which."""
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
        """Where what is registered from ``start`` on ends; ``start`` if it is not."""
        while (span := self._span_at(start)) is not None:
            start = span[1]
        return start

    def _span_at(self, address: int) -> tuple[int, int] | None:
        spans = list(self.spans.items())  # at once: another thread may be adding one
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
        self._reach = (0, 0)  # registered stretches, and the rows that they make readable
        self._pending: list[tuple[torch.cuda.Event, Tensor]] = []  # sources must outlive copies

    def announce(self, target: Tensor) -> None:
        """Provide and register ``target`` [heads, n, width] soon; a copy there waits for that."""
        if target[0].nbytes >= LEAST_BYTES:
            work = self._ahead.submit(self._register_heads, target)
            self._announced[target.data_ptr()] = work

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Copy ``source`` [heads, n, width] to ``target`` on the host, soon."""
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
        """Rows, the first of every head of every layer, that kernels can read where they are."""
        spans = len(self._registered.spans)
        if self._reach[0] != spans:  # a step asks, and it takes long to find out
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
        """Wait, and let the system have its memory back."""
        self._ahead.shutdown(wait=True, cancel_futures=True)
        self._providers.shutdown()
        self.settle()
        runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        for start in self._registered.spans:
            runtime.cudaHostUnregister(start)
        self._registered.spans.clear()

    def _move(self, target: Tensor, source: Tensor, host: Tensor) -> None:
        """Copy [n, width], of which ``host`` is the side on the host, in pieces of whole rows."""
        row_bytes, base = host.stride(0) * host.element_size(), host.data_ptr()
        done = 0
        for start, stop, registered in self._registered.pieces(base, base + host.nbytes):
            # a row across the border of a registered stretch does not lie in it
            first, last = -(-(start - base) // row_bytes), (stop - base) // row_bytes
            if registered and first < last:
                self._move_slowly(target[done:first], source[done:first], host is target)
                target[first:last].copy_(source[first:last], non_blocking=True)
                done = last
        self._move_slowly(target[done:], source[done:], host is target)

    def _move_slowly(self, target: Tensor, source: Tensor, to_host: bool) -> None:
        """By way of memory that CUDA knows nothing of."""
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
        # whole pages of `memory` alone: its first and last may have rows of others
        page = mmap.PAGESIZE
        whole = -(-max(first, start) // page) * page
        provided = max(0, end // page * page - whole)
        provide_pages(whole, provided, self._providers, self._hands)
        runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        if int(runtime.cudaHostRegister(start, stop - start, 0)) == 0:
            self._registered.spans[start] = stop

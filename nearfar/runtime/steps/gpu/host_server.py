"""The host's side of a decode step on the GPU: threads, or the policy's index in Python.

A server launches no kernels. It serves one step and returns when it has answered all layers of all
micro-batches. While it waits, it checks the GPU from time to time, since a GPU that failed posts no
requests. If the server stops early, by an error or by Ctrl-C, `release` must end the GPU's waits.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from abc import ABC, abstractmethod
from collections import abc
from collections.abc import Callable

import numpy as np

from nearfar.cpu_kernels import serve
from nearfar.cpu_kernels.atomics import fetch_add, store_release
from nearfar.cpu_kernels.mailbox import FarRowLayout
from nearfar.errors import DeviceError
from nearfar.runtime.memory.hardware import usable_cpus
from nearfar.runtime.memory.sequence import Sequence
from nearfar.runtime.steps.attention import attend_far
from nearfar.runtime.steps.gpu.exchange import PinnedExchange
from nearfar.runtime.steps.gpu.stream_flags import RELEASE

PATIENCE_TURNS = 1_000_000  # some 50 ms, after which the interpreter handles signals
IDLE_NAPS = 20_000  # a second without a step: threads stop polling
SILENCE_SECONDS = 30.0  # a GPU without a request for so long has failed
STEP_TURNS = 4_000_000_000  # minutes; the caller's thread has given up and closed long before
IDLE_SECONDS = 60.0  # an idle thread checks for the end this often
CLOSING_SECONDS = 60.0  # more than any layer takes


class Server(ABC):
    """Answers all micro-batches of a mailbox, step by step."""

    def __init__(self, memory: PinnedExchange, look: Callable[[], object]) -> None:
        """``look`` raises if the GPU has failed."""
        self.memory = memory
        self._look = look
        self._heard = 0.0

    def begin(self) -> None:
        """Prepare for a step; call it before the launch."""
        self.memory.reset()
        self._heard = time.monotonic()

    @abstractmethod
    def serve(self) -> None:
        """Answer all layers of every micro-batch."""

    @abstractmethod
    def answer(self, micro_batch: int, layer: int) -> None:
        """Answer one layer of one micro-batch on the calling thread."""

    def release(self) -> None:
        """End all waits of the GPU for the host."""
        for micro_batch in range(self.memory.shape.micro_batches):
            store_release(self.memory.box.done[micro_batch], 0, RELEASE)

    def close(self) -> None:  # noqa: B027  most have no threads to end
        """Stop serving."""

    def _check(self, progress: bool) -> None:
        """Called during a wait: raise if the GPU has failed or has been silent for too long."""
        self._look()
        now = time.monotonic()
        if progress:
            self._heard = now
        elif now - self._heard > SILENCE_SECONDS:
            raise DeviceError(
                f"The GPU sent the host no request in {SILENCE_SECONDS:.0f} s of a decode step. "
                "Look at nvidia-smi and the kernel's log; restart, or use --device cpu."
            )


class PooledServer(Server):
    """Threads that attend to the keys that a GPU selected, or to all; the caller's is the first."""

    def __init__(
        self, memory: PinnedExchange, row_layout: FarRowLayout, look: Callable[[], object]
    ) -> None:
        super().__init__(memory, look)
        self._reading = row_layout
        self._layers = np.zeros(memory.shape.micro_batches, np.int64)
        self._work = threading.Event()
        self._closed = False
        self._failures: list[BaseException] = []
        # on one thread, before a step waits for the others: compiling may take a minute
        serve.serve_steps(memory.box, row_layout, 0, 0, 0, 1)
        cpus = sorted(usable_cpus())[1:]
        self._threads = [
            threading.Thread(
                target=self._run, args=(number, cpus), name=f"nearfar-{number}", daemon=True
            )
            for number in range(1, memory.shape.threads)
        ]
        for thread in self._threads:
            thread.start()

    def begin(self) -> None:
        """Wake the threads."""
        super().begin()
        self._layers[:] = 0
        fetch_add(self.memory.box.control, serve.STEP, 1)
        self._work.set()

    def serve(self) -> None:
        """Do this thread's share until all layers are answered."""
        box, before = self.memory.box, self._layers.copy()
        while serve.serve_step(box, self._reading, 0, self._layers, PATIENCE_TURNS):
            self._check(progress=bool((self._layers != before).any()))
            before[:] = self._layers
        until = time.monotonic() + CLOSING_SECONDS
        while not serve.await_answers(box, self._reading.layers, PATIENCE_TURNS):
            self._check_threads()
            if time.monotonic() > until:
                raise DeviceError(
                    f"Host threads did not finish a layer in {CLOSING_SECONDS:.0f} s. "
                    "Look for what takes the processor or has memory swapped out."
                )

    def pop_rows_read(self) -> tuple[int, int]:
        """Far rows read since the last call, and groups that they were in."""
        rows, groups = self.memory.box.rows_read.sum(0)[:2].tolist()
        self.memory.box.rows_read[:] = 0
        return rows, groups

    def answer(self, micro_batch: int, layer: int) -> None:
        """Answer one layer alone; only if no other threads serve."""
        serve.serve_layer(self.memory.box, self._reading, micro_batch, layer, 0)

    def close(self) -> None:
        """End the threads and wait for them."""
        self._closed = True
        store_release(self.memory.box.control, serve.STOP, 1)
        self._work.set()
        until = time.monotonic() + CLOSING_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))
        if any(thread.is_alive() for thread in self._threads):
            raise DeviceError(
                f"Host threads were still reading far keys {CLOSING_SECONDS:.0f} s after the last "
                "step. End the program: what they read cannot be given back."
            )

    def _check(self, progress: bool) -> None:
        self._check_threads()
        super()._check(progress)

    def _check_threads(self) -> None:
        """Raise if a thread has ended: it answers no more, so its error is the step's."""
        self._look()
        if self._failures:
            raise DeviceError(
                f"A host thread that reads far keys has ended: {self._failures[0]}. "
                "Load the model again."
            ) from self._failures[0]

    def _run(self, number: int, cpus: list[int]) -> None:
        try:
            self._serve_steps(number, cpus)
        except BaseException as error:
            self._failures.append(error)

    def _serve_steps(self, number: int, cpus: list[int]) -> None:
        if number <= len(cpus) and hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, {cpus[number - 1]})  # of this thread alone
        box, seen = self.memory.box, 0
        while not self._closed:
            if not self._work.wait(IDLE_SECONDS):
                continue
            seen = serve.serve_steps(box, self._reading, number, seen, IDLE_NAPS, STEP_TURNS)
            if seen == serve.ABANDONED:
                raise DeviceError("a step began and no request followed")
            # cleared before the next check, so that a step that begins meanwhile is not missed
            self._work.clear()
            if box.control[serve.STEP] != seen or self._closed:
                self._work.set()


class SelectingServer(Server):
    """The policy's index selects on the host, in Python; the kernels' own threads attend."""

    def __init__(self, memory: PinnedExchange, look: Callable[[], object]) -> None:
        super().__init__(memory, look)
        self._micro_batches: list[list[weakref.ref[Sequence]]] = []

    def bind(self, micro_batches: list[abc.Sequence[Sequence]]) -> None:
        """Select for the sequences of each micro-batch from now on, by weak references."""
        self._micro_batches = [
            [weakref.ref(sequence) for sequence in micro_batch] for micro_batch in micro_batches
        ]

    def serve(self) -> None:
        """Answer micro-batch by micro-batch, layer by layer."""
        for layer in range(self.memory.box.addresses.shape[2]):
            for micro_batch in range(self.memory.shape.micro_batches):
                while not serve.await_layer(self.memory.box, micro_batch, layer, PATIENCE_TURNS):
                    self._check(progress=False)
                self._check(progress=True)
                self.answer(micro_batch, layer)

    def answer(self, micro_batch: int, layer: int) -> None:
        """Select and attend for every sequence of a micro-batch."""
        memory = self.memory
        memory.box.stamps[micro_batch, layer, 0] = serve.nanoseconds()
        for b, bound in enumerate(self._micro_batches[micro_batch]):
            sequence = bound()
            assert sequence is not None
            query, out, lse = (
                memory.host_queries[micro_batch, b],
                memory.out[micro_batch, b, 0],
                memory.lse[micro_batch, b, 0],
            )
            partial = attend_far(layer, query, sequence)
            if partial is None:
                out.zero_()
                lse.fill_(-np.inf)
                continue
            out.copy_(partial.out)
            lse.copy_(partial.lse)
        memory.box.stamps[micro_batch, layer, 1] = serve.nanoseconds()
        serve.answer_layer(memory.box, micro_batch, layer)

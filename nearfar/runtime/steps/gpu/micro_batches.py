"""All micro-batches of a batch, their graphs, and the server that answers them.

A batch of an even number of sequences with far (host) memory is decoded in two micro-batches, each
in a stream of its own: while the host attends for one, the GPU computes the other. Graphs, buffers
and server fit one batch size and one capacity of far keys; when these change, new ones are made.
"""

from __future__ import annotations

import gc
import time
from collections import abc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nearfar.gpu_kernels.stamp import stamp
from nearfar.policies.index import NearIndex, NearSelector
from nearfar.runtime.memory.sequence import Sequence
from nearfar.runtime.models.decoder import Decoder
from nearfar.runtime.steps.gpu.exchange import ExchangeShape, PinnedExchange, row_layout_of
from nearfar.runtime.steps.gpu.host_attention import HostAttentionInTurn, HostAttentionPort
from nearfar.runtime.steps.gpu.host_server import PooledServer, SelectingServer, Server
from nearfar.runtime.steps.gpu.micro_batch import MicroBatch, nothing
from nearfar.runtime.steps.gpu.ragged_tables import RaggedTables
from nearfar.runtime.steps.timeline import STAGES, Timeline, timeline_of

LAST_SECONDS = 1.0  # the time in which the graphs of a failed step must end


@dataclass(frozen=True)
class MicroBatchesKey:
    """The sizes for which micro-batches are made."""

    batch: int
    micro_batches: int
    capacity_tokens: int  # far keys for which a selection on the GPU has room


class MicroBatches:
    """Decodes a batch, step by step; use `step`."""

    def __init__(
        self,
        decoder: Decoder,
        key: MicroBatchesKey,
        sequences: abc.Sequence[Sequence],
        threads: int,
    ) -> None:
        self.key = key
        self._device = decoder.device
        self._on_gpu = self._device.type == "cuda"
        self._per_micro_batch = key.batch // key.micro_batches
        self._layers = decoder.plan.geometry.layers
        self._layout: Any = None
        self._stamps: Tensor | None = None  # the next capture writes its time stamps here
        self._streams = [
            torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            for _ in range(key.micro_batches * self._on_gpu)
        ]
        self._server: Server | None = None
        sides: list[HostAttentionPort | None] = [None] * key.micro_batches
        if sequences[0].policy.traits.keeps_far:
            selectors = self._selectors(sequences[0])
            self._server = self._new_server(sequences[0], selectors[0], threads)
            sides = [
                self._side(sequences[0], micro_batch, s) for micro_batch, s in enumerate(selectors)
            ]
        self._sides = sides
        splits = self._splits(decoder, far=sides[0] is not None)
        self._micro_batches = [
            MicroBatch(decoder, self._per_micro_batch, splits, side, self._ragged(sequences[0]))
            for side in sides
        ]
        self._graphs: list[torch.cuda.CUDAGraph] = []

    def step(self, sequences: abc.Sequence[Sequence], token_ids: abc.Sequence[int]) -> Tensor:
        """Logits [B, V] float32 after ``token_ids``, which are appended to the sequences."""
        self._bind(sequences)
        for number, micro_batch in enumerate(self._micro_batches):
            micro_batch.set_state(self._of(sequences, number), self._of(token_ids, number))
        if not self._on_gpu:
            self._run_in_turn()
        else:
            if not self._graphs:
                self._capture()
            self._replay()
        self._count(sequences)
        return torch.cat([micro_batch.logits for micro_batch in self._micro_batches])

    def traced_step(
        self, sequences: abc.Sequence[Sequence], token_ids: abc.Sequence[int]
    ) -> tuple[Tensor, Timeline]:
        """A step with time stamps between its stages; its logits and its timeline.

        Each stamp makes the step slower by about a microsecond.
        """
        slots = 3 + self._layers * len(STAGES)
        times = torch.zeros(len(self._micro_batches), slots, dtype=torch.int64, device=self._device)
        graphs, self._graphs = self._graphs, []
        self._stamps = times
        try:
            logits = self.step(sequences, token_ids)
        finally:
            self._graphs, self._stamps = graphs, None
        host: list[list[tuple[int, int]]] = []
        if self._server is not None:
            host = [
                [(a, b) for a, b in micro_batch]
                for micro_batch in self._server.memory.box.stamps.tolist()
            ]
        return logits, timeline_of(times.tolist(), host, self._layers)

    def close(self) -> None:
        """End the server's threads."""
        if self._server is not None:
            self._server.close()

    def _of(self, items: abc.Sequence[Any], micro_batch: int) -> abc.Sequence[Any]:
        return items[
            micro_batch * self._per_micro_batch : (micro_batch + 1) * self._per_micro_batch
        ]

    def _selectors(self, sequence: Sequence) -> list[NearSelector | None]:
        if not isinstance(sequence.far.index, NearIndex):
            return [None] * self.key.micro_batches
        settings = sequence.settings
        sizes = (self._per_micro_batch, self.key.capacity_tokens, self._device)
        return [
            settings.policy.new_near_selector(settings.geometry, settings.seed, *sizes)
            for _ in range(self.key.micro_batches)
        ]

    def _new_server(
        self, sequence: Sequence, selector: NearSelector | None, threads: int
    ) -> Server:
        geometry, everything = sequence.settings.geometry, sequence.settings.reads_everything
        pooled = selector is not None or everything
        threads = threads if self._on_gpu and pooled else 1
        rows, size, segments = self._per_micro_batch, 1, 0
        if pooled:
            rows = self._per_micro_batch * geometry.kv_heads
        if selector is not None:
            rows = self._per_micro_batch * selector.rows_per_sequence
            size = selector.segment_keys
            segments = -(-self.key.capacity_tokens // size)
        parts = ExchangeShape.parts_for(rows, threads)
        micro_batches, batch = self.key.micro_batches, self._per_micro_batch
        shape = ExchangeShape(micro_batches, batch, rows, parts, segments, size, threads)
        memory = PinnedExchange(geometry, shape, self._device)
        look = partial(_look, self._streams)  # a method would make a cycle, which is freed late
        if not pooled:
            return SelectingServer(memory, look)
        row_layout = row_layout_of(geometry, sequence.far.store, shape, everything=everything)
        return PooledServer(memory, row_layout, look)

    def _side(
        self, sequence: Sequence, micro_batch: int, selector: NearSelector | None
    ) -> HostAttentionPort:
        assert self._server is not None
        place = (self._server.memory, micro_batch, selector, sequence.far.store.dtype)
        if self._on_gpu:
            return HostAttentionPort(*place)
        return HostAttentionInTurn(*place, partial(self._server.answer, micro_batch))

    def _ragged(self, sequence: Sequence) -> RaggedTables | None:
        if not sequence.policy.traits.ragged:
            return None
        rows = sequence.near[0].rows
        return RaggedTables(
            sequence.settings.geometry, self._per_micro_batch, rows.dtype, rows.device
        )

    def _splits(self, decoder: Decoder, *, far: bool) -> int:
        """Parts of the near keys: one if they are few, else enough to fill the GPU twice."""
        if far or not self._on_gpu:
            return 1
        cores = torch.cuda.get_device_properties(self._device).multi_processor_count
        return max(1, -(-2 * cores // (self._per_micro_batch * decoder.plan.geometry.kv_heads)))

    def _bind(self, sequences: abc.Sequence[Sequence]) -> None:
        layout = tuple(sequence.layout for sequence in sequences)
        if layout != self._layout:
            for number, micro_batch in enumerate(self._micro_batches):
                micro_batch.bind(self._of(sequences, number))
            self._bind_far(sequences)
            self._layout = layout
        if self._server is not None:
            lengths = self._server.memory.box.lengths
            for number, sequence in enumerate(sequences):
                lengths[divmod(number, self._per_micro_batch)] = sequence.far.store.length(0)

    def _bind_far(self, sequences: abc.Sequence[Sequence]) -> None:
        if self._server is None:
            return
        for number, side in enumerate(self._sides):
            mine = self._of(sequences, number)
            self._server.memory.bind(number, [sequence.far.store for sequence in mine])
            if side is not None and side.selector is not None:
                side.selector.bind([sequence.far.index for sequence in mine])
                side.bind([sequence.far.store for sequence in mine])
        if isinstance(self._server, SelectingServer):
            self._server.bind([self._of(sequences, n) for n in range(self.key.micro_batches)])

    def _run_in_turn(self) -> None:
        for number, micro_batch in enumerate(self._micro_batches):
            if self._server is not None:
                self._server.begin()
            micro_batch.launch(self._marker(number))

    def _capture(self) -> None:
        """Run every launch once, so that kernels are compiled, and capture them."""
        if self._server is not None:
            self._server.release()  # the host does not answer: this run's numbers are not used
        for number, (micro_batch, stream) in enumerate(
            zip(self._micro_batches, self._streams, strict=True)
        ):
            stream.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(stream):
                micro_batch.launch(self._marker(number))
            stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            with collection_paused(), torch.cuda.graph(graph, stream=stream):
                micro_batch.launch(self._marker(number))
            self._graphs.append(graph)

    def _marker(self, micro_batch: int) -> Callable[[], None]:
        """The function that takes the time stamps of one micro-batch's next launch."""
        if self._stamps is None:
            return nothing
        slots = iter(range(self._stamps.shape[1]))
        times = self._stamps[micro_batch]
        return lambda: stamp(times, next(slots))

    def _replay(self) -> None:
        if self._server is not None:
            self._server.begin()
        try:
            for graph, stream in zip(self._graphs, self._streams, strict=True):
                stream.wait_stream(torch.cuda.current_stream(self._device))
                with torch.cuda.stream(stream):
                    graph.replay()
            if self._server is not None:
                self._server.serve()
            for stream in self._streams:
                stream.synchronize()
        except BaseException:
            if self._server is not None:
                self._server.release()
            _wait_a_moment(self._streams)  # they may still write memory that is freed next
            raise

    def _count(self, sequences: abc.Sequence[Sequence]) -> None:
        if isinstance(self._server, PooledServer):
            rows, groups = self._server.pop_rows_read()
            for number, side in enumerate(self._sides):
                if side is not None:
                    side.learn(self._server.memory.box.stamps[number])
            for sequence in sequences:
                sequence.far.rows_read += rows // len(sequences)
                sequence.far.groups_read += groups // len(sequences)
        for sequence in sequences:
            for near in sequence.near:
                near.commit_token(sequence.tokens)


def _wait_a_moment(streams: list[torch.cuda.Stream]) -> None:
    """Wait until the streams are done or have failed, at most LAST_SECONDS."""
    until = time.monotonic() + LAST_SECONDS
    with suppress(RuntimeError):
        while time.monotonic() < until and not all(stream.query() for stream in streams):
            time.sleep(0.001)


def _look(streams: list[torch.cuda.Stream]) -> None:
    """Raise if one of the streams has failed."""
    for stream in streams:
        stream.query()


@contextmanager
def collection_paused() -> Iterator[None]:
    """Pause garbage collection: freeing another graph would end a capture."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()

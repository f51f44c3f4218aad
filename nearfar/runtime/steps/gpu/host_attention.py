"""How a micro-batch reaches far (host) memory: selection, fetches by the GPU, flags to the host."""

from __future__ import annotations

from collections import abc
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nearfar.gpu_kernels.fetch_attention import attend_fetched, fetch_parts
from nearfar.gpu_kernels.rows import RowTable
from nearfar.gpu_kernels.stamp import stamp
from nearfar.policies.index import NearSelector
from nearfar.records import DrawnKeys
from nearfar.runtime.memory.far_store import FarStore
from nearfar.runtime.steps.gpu.exchange import PinnedExchange
from nearfar.runtime.steps.gpu.fetch_balance import FetchBalance
from nearfar.runtime.steps.gpu.micro_batch import FAR_LENGTHS, READABLE, SHARE, STEPS, WANTED
from nearfar.runtime.steps.gpu.stream_flags import wait_for_flag, write_flag
from nearfar.storage import PACKINGS

TIMED_LAYERS = 3


class HostAttentionPort:
    """The buffers that a micro-batch's kernels write for the host and read from it."""

    def __init__(
        self,
        memory: PinnedExchange,
        micro_batch: int,
        selector: NearSelector | None,
        far_dtype: torch.dtype,
    ) -> None:
        geometry, device = memory.geometry, memory.device
        B, Hq = memory.shape.batch, geometry.query_heads
        F, Gr = memory.lse.shape[2:]
        self.selector = selector
        # the GPU cannot read packed rows
        fetches = selector is not None and memory.fetched.shape[3] > 0 and far_dtype not in PACKINGS
        self.parts = fetch_parts(memory.shape.rows, device) if fetches else 0
        self._kv_heads = geometry.kv_heads
        self._rows = [RowTable.empty(B, far_dtype, device) for _ in range(geometry.layers)]
        self.host_queries = memory.host_queries[micro_batch]
        self.device_queries: Tensor | None = (
            None if selector is None else torch.zeros_like(self.host_queries).to(device)
        )
        self.out = memory.out[micro_batch].view(B, Hq // Gr, F, Gr, geometry.head_dim)
        self.lse = memory.lse[micro_batch].view(B, Hq // Gr, F, Gr)
        self._memory, self._micro_batch = memory, micro_batch
        self._balance = FetchBalance()
        # a few layers are timed: before near attention, before and after the fetch
        on_gpu = device.type == "cuda" and fetches
        timed = range(0, geometry.layers, -(-geometry.layers // TIMED_LAYERS)) if on_gpu else ()
        self._timed = {layer: 3 * i for i, layer in enumerate(timed)}
        self._times = torch.zeros(3 * len(timed), dtype=torch.int64, device=device)
        self._times_here = torch.zeros(3 * len(timed), dtype=torch.int64, pin_memory=on_gpu)
        self._ready = memory.ready_address(micro_batch)
        self._done = memory.done_address(micro_batch)

    def bind(self, stores: abc.Sequence[FarStore]) -> None:
        """Fetch from these stores from now on."""
        if self.parts:
            for layer, table in enumerate(self._rows):
                # no reference is held: far memory is freed with its sequence
                table.point([store.view(layer).rows for store in stores], hold=False)
            self._balance.restart()

    @property
    def share(self) -> int:
        """The share of the drawn keys that the GPU fetches in the next step."""
        return self._balance.share if self.parts else 0

    def learn(self, host: NDArray[np.int64]) -> None:
        """After a step: ``host`` [layers, 2] are the times of each layer's request and answer."""
        if self._timed and not self._balance.settled:
            here = self._times_here.numpy().reshape(-1, 3)
            near, fetch = np.diff(here, axis=1).mean(0)
            seen, answered = host[list(self._timed)].mean(0)
            self._balance.learn(float(near), float(fetch), float(answered - seen))

    def start_step(self) -> None:
        """Launch the selector's kernels that run once a step."""
        if self.selector is not None:
            self.selector.start_step()

    def select(self, layer: int, state: Tensor) -> None:
        """Launch the selection, if the GPU selects."""
        if self.selector is not None and self.device_queries is not None:
            sizes = (state[FAR_LENGTHS], state[WANTED], state[STEPS])
            self.selector.select(layer, self.device_queries, *sizes, self._drawn(state))

    def post(self, layer: int) -> None:
        """Raise the flag that the host polls."""
        write_flag(torch.cuda.current_stream(), self._ready, layer + 1)
        self._take_time(layer, 0)

    def fetch(
        self, layer: int, state: Tensor, query: Tensor, scale: float, out: Tensor, lse: Tensor
    ) -> None:
        """Launch attention to the far rows that the GPU reads, into the last places of ``out``."""
        if self.parts:
            places = (out.shape[2] - self.parts, out, lse)
            rows, drawn = self._rows[layer], self._drawn(state)
            lengths = state[FAR_LENGTHS]
            self._take_time(layer, 1)
            attend_fetched(query, rows, self._kv_heads, drawn, lengths, scale, *places)
            self._take_time(layer, 2)
            if layer == max(self._timed, default=-1):
                self._times_here.copy_(self._times, non_blocking=True)

    def wait(self, layer: int) -> None:
        """Hold the stream until the host has written its flag."""
        wait_for_flag(torch.cuda.current_stream(), self._done, layer + 1)

    def _take_time(self, layer: int, place: int) -> None:
        if layer in self._timed:
            stamp(self._times, self._timed[layer] + place)

    def _drawn(self, state: Tensor) -> DrawnKeys:
        return self._memory.drawn(self._micro_batch, state[READABLE], state[SHARE])


class HostAttentionInTurn(HostAttentionPort):
    """The same without a GPU: the host answers at the point where the stream would wait."""

    def __init__(
        self,
        memory: PinnedExchange,
        micro_batch: int,
        selector: NearSelector | None,
        far_dtype: torch.dtype,
        answer: Callable[[int], None],
    ) -> None:
        super().__init__(memory, micro_batch, selector, far_dtype)
        self._flag = memory.flags[0, micro_batch]
        self._answer = answer

    def post(self, layer: int) -> None:
        """Raise the flag."""
        self._flag[0] = layer + 1

    def wait(self, layer: int) -> None:
        """Let the host answer now."""
        self._answer(layer)

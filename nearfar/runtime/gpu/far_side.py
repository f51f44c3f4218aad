"""The far side of a lane: selection near, and the two flags between the processors."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nearfar.policies.base import NearSelector
from nearfar.records import Geometry
from nearfar.runtime.gpu.lane import FAR_LENGTHS, STEPS, WANTED
from nearfar.runtime.gpu.mailbox import MailboxMemory
from nearfar.runtime.gpu.stream_flags import wait_for_flag, write_flag


class FarSide:
    """What a lane's kernels write for the host and read from it, in one lane of a mailbox."""

    def __init__(
        self,
        geometry: Geometry,
        memory: MailboxMemory,
        lane: int,
        selector: NearSelector | None,
        device: torch.device,
    ) -> None:
        B, Hq = memory.shape.batch, geometry.query_heads
        F, Gr = memory.lse.shape[2:]
        self.selector = selector
        self.told = memory.told[lane]
        self.asked: Tensor | None = (
            None if selector is None else torch.zeros_like(self.told).to(device)
        )
        self.out = memory.out[lane].view(B, Hq // Gr, F, Gr, geometry.head_dim)
        self.lse = memory.lse[lane].view(B, Hq // Gr, F, Gr)
        self._drawn = memory.drawn(lane)
        self._ready, self._done = memory.ready_address(lane), memory.done_address(lane)

    def start_step(self) -> None:
        """Launch what the selector needs once a step."""
        if self.selector is not None:
            self.selector.start_step()

    def select(self, layer: int, state: Tensor) -> None:
        """Launch the selection, if it is made near."""
        if self.selector is not None and self.asked is not None:
            sizes = (state[FAR_LENGTHS], state[WANTED], state[STEPS])
            self.selector.select(layer, self.asked, *sizes, self._drawn)

    def post(self, layer: int) -> None:
        """Raise the flag that the host looks at."""
        write_flag(torch.cuda.current_stream(), self._ready, layer + 1)

    def wait(self, layer: int) -> None:
        """Hold the stream until the host has written its flag."""
        wait_for_flag(torch.cuda.current_stream(), self._done, layer + 1)


class FarSideInTurn(FarSide):
    """The same without a GPU: the host answers where the stream would wait."""

    def __init__(
        self,
        geometry: Geometry,
        memory: MailboxMemory,
        lane: int,
        selector: NearSelector | None,
        device: torch.device,
        answer: Callable[[int], None],
    ) -> None:
        super().__init__(geometry, memory, lane, selector, device)
        self._flag = memory.flags[0, lane]
        self._answer = answer

    def post(self, layer: int) -> None:
        """Raise the flag."""
        self._flag[0] = layer + 1

    def wait(self, layer: int) -> None:
        """Let the host answer now."""
        self._answer(layer)

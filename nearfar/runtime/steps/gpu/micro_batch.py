"""One decode step of B sequences as kernels in a stream, which a CUDA graph captures.

    project      RMSNorm, fused product; rotation, k and v into the window     Linear, place_tokens
    select       sketch or another index on the GPU -> keys for the host       policy's kernels
    (post)       the host may begin
    attend_near  sinks + window, or everything near; ragged rows beside them   attend_rows
    fetch        a share of the drawn keys, read from host memory              attend_fetched
    (wait)       the host has answered
    merge        near and far parts                                            merge_splits
    finish_layer output projection, feed-forward                               Linear

A micro-batch owns every tensor that a step writes, so the same launches serve any sequences. Only a
small state, which is copied first, and tables of addresses change from step to step.
"""

from __future__ import annotations

from collections import abc
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from nearfar.gpu_kernels.decode_attention import attend_rows
from nearfar.gpu_kernels.embed import embed
from nearfar.gpu_kernels.merge import merge_splits
from nearfar.gpu_kernels.place_tokens import place_tokens
from nearfar.gpu_kernels.rows import RowTable
from nearfar.runtime.memory.sequence import Sequence
from nearfar.runtime.models.decoder import Decoder
from nearfar.runtime.models.layers import Attention
from nearfar.runtime.models.rope import Angles
from nearfar.runtime.steps.gpu.ragged_tables import RaggedTables
from nearfar.runtime.steps.gpu_prefill import no_rotation

TOKENS, POSITIONS, FAR_LENGTHS, WANTED, STEPS, READABLE, SHARE, NUMBERS = range(8)


def nothing() -> None:
    """Take no time stamp."""


class HostAttention(Protocol):
    """Attention to far (host) memory, as a micro-batch's kernels see it."""

    host_queries: Tensor  # [B, Hq, D] float32: queries in pinned memory, for the host
    device_queries: Tensor | None  # the same on the GPU, if it selects
    out: Tensor  # [B, Hq / Gr, F, Gr, D] float32: the host's results
    lse: Tensor  # [B, Hq / Gr, F, Gr] float32
    parts: int  # partial results of `fetch`

    @property
    def share(self) -> int:
        """The share of the drawn keys that `fetch` reads, in parts of SHARE_UNIT."""

    def start_step(self) -> None:
        """Launch the kernels that run once a step."""

    def select(self, layer: int, state: Tensor) -> None:
        """Launch the selection, if the GPU selects."""

    def post(self, layer: int) -> None:
        """Post the layer's request to the host."""

    def fetch(
        self, layer: int, state: Tensor, query: Tensor, scale: float, out: Tensor, lse: Tensor
    ) -> None:
        """Launch attention to the far rows that the GPU reads, into the last places of ``out``."""

    def wait(self, layer: int) -> None:
        """Hold the stream until the host has answered."""


class MicroBatch:
    """Tensors and launches of one micro-batch."""

    def __init__(
        self,
        decoder: Decoder,
        batch: int,
        splits: int,
        far: HostAttention | None,
        ragged: RaggedTables | None,
    ) -> None:
        geometry = decoder.plan.geometry
        self.batch = batch
        self._decoder, self._far, self._ragged = decoder, far, ragged
        device, dtype = decoder.device, decoder.dtype
        Hq, D, layers = geometry.query_heads, geometry.head_dim, geometry.layers

        def buffer(*sizes: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.zeros(batch, *sizes, dtype=dtype, device=device)

        pinned = device.type == "cuda"
        # numbers of a step, then each layer's count of near rows before it, then after it
        size = (NUMBERS + 2 * layers, batch)
        self._state_here = torch.zeros(size, dtype=torch.int32, pin_memory=pinned)
        self._numbers = self._state_here.numpy()
        self._state = torch.zeros(size, dtype=torch.int32, device=device)
        self._slots, self._near_lengths = self._state[NUMBERS:].chunk(2)
        self.hidden = buffer(decoder.plan.hidden_size)
        self._scratch: dict[tuple[str, int], Tensor] = {}
        self._query = buffer(Hq, D)
        others = 0 if far is None else far.parts
        self._splits, places = splits, splits + (others if ragged is None else splits)
        self._near_out = buffer(Hq, places, D, dtype=torch.float32)
        self._near_lse = buffer(Hq, places, dtype=torch.float32)
        self._mixed = buffer(Hq, D)
        self.logits = buffer(decoder.plan.vocab_size, dtype=torch.float32)
        self._angles: tuple[Angles | None, ...] = ()
        self._unrotated = no_rotation(buffer(D, dtype=torch.float32))
        self._mark: Callable[[], None] = nothing  # called at the end of a stage, to take its time
        self._rows = [RowTable.empty(batch, dtype, device) for _ in range(layers)]

    def bind(self, sequences: abc.Sequence[Sequence]) -> None:
        """Decode for these sequences from now on."""
        for layer, table in enumerate(self._rows):
            # no reference is held: near memory is freed with its sequence
            table.point([sequence.near[layer].rows for sequence in sequences], hold=False)
        if self._ragged is not None:
            self._ragged.bind(sequences)

    def set_state(self, sequences: abc.Sequence[Sequence], token_ids: abc.Sequence[int]) -> None:
        """Set the state of the next launch; the previous launch must be over."""
        for b, (sequence, token) in enumerate(zip(sequences, token_ids, strict=True)):
            near, far = [layer.length for layer in sequence.near], sequence.far.store.length(0)
            wanted = sequence.settings.budget.keys(far)
            position, step = sequence.next_position, sequence.tokens
            readable_tokens = sequence.far.store.readable_tokens(self._state.device)
            share = 0 if self._far is None else self._far.share
            numbers = (token, position, far, wanted, step, readable_tokens, share)
            self._numbers[:, b] = (*numbers, *near, *(length + 1 for length in near))

    def launch(self, mark: Callable[[], None] = nothing) -> None:
        """Launch all kernels of a step into the current stream; ``mark`` is called at stages."""
        decoder, state = self._decoder, self._state
        self._mark = mark
        mark()
        state.copy_(self._state_here, non_blocking=True)
        embed(decoder.embedding, state[TOKENS], self.hidden)
        self._angles = decoder.angles(state[POSITIONS])
        if self._far is not None:
            self._far.start_step()
        mark()
        for layer in decoder.layers:
            layer.add_to(self)
            if layer.mixer is not None:
                mark()
        decoder.write_logits(self.hidden, self.logits)
        mark()

    def scratch(self, name: str, width: int) -> Tensor:
        """The micro-batch's buffer called ``name``, the same in every step."""
        key = (name, width)
        if key not in self._scratch:  # in the first launch, which is never captured
            self._scratch[key] = self.hidden.new_zeros(self.batch, width)
        return self._scratch[key]

    def attend(self, mixer: Attention, qkv: Tensor) -> Tensor:
        """Launch one layer's attention; its output [B, Hq D]."""
        layer, far = mixer.far_layer, self._far
        place_tokens(
            qkv,
            self._angles[layer] or self._unrotated,
            mixer.norms,
            mixer.norm.eps,
            self._rows[layer],
            self._slots[layer],
            self._query,
            mixer.plan.scale,
            None if far is None else far.device_queries,
            None if far is None else far.host_queries,
        )
        self._attend(layer, mixer.plan.scale)
        return self._mixed.view(self.batch, -1)

    def _attend(self, layer: int, scale: float) -> None:
        far, mark = self._far, self._mark
        mark()
        if far is not None:
            far.select(layer, self._state)
        mark()
        if far is not None:
            far.post(layer)
        lengths = self._near_lengths[layer]
        near = (self._near_out, self._near_lse)
        attend_rows(self._query, self._rows[layer], lengths, scale, self._splits, *near)
        if self._ragged is not None:
            self._ragged.attend(layer, self._query, scale, self._splits, *near)
        mark()
        if far is not None:
            far.fetch(layer, self._state, self._query, scale, *near)
        mark()
        if far is not None:
            far.wait(layer)
        mark()
        if far is None:
            merge_splits(self._near_out, self._near_lse, None, None, self._mixed)
        else:
            merge_splits(self._near_out, self._near_lse, far.out, far.lse, self._mixed)
        mark()

"""One decode step of B sequences as kernels in a stream: what a CUDA graph captures.

    project      RMSNorm, fused product, rotation; k and v into the window     matvec, place_tokens
    select       sketch or another near index -> keys for the host             policy's kernels
    (post)       the host may begin
    attend_near  sinks + window, or everything near; ragged rows beside them   attend_rows
    fetch        a share of the drawn keys, read from host memory              attend_fetched
    (wait)       the host has answered
    merge        near and far parts                                            merge_splits
    finish_layer output projection, MLP                                        matvec

A lane owns every tensor that is written in a step, so the same launches serve any sequences: what
changes from step to step is a small state, copied first, and tables of addresses.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Several
from typing import Protocol

import torch
import torch.nn.functional as F  # noqa: N812  its usual name
from torch import Tensor

from nearfar.gpu_kernels.decode_attention import attend_rows
from nearfar.gpu_kernels.embed import embed
from nearfar.gpu_kernels.matvec import matvec, silu_gate
from nearfar.gpu_kernels.merge import merge_splits
from nearfar.gpu_kernels.place_tokens import place_tokens
from nearfar.gpu_kernels.rows import RowTable
from nearfar.runtime.decoder import Decoder
from nearfar.runtime.gpu.ragged_tables import RaggedTables
from nearfar.runtime.sequence import Sequence

TOKENS, POSITIONS, FAR_LENGTHS, WANTED, STEPS, REACH, SHARE, NUMBERS = range(8)


def nothing() -> None:
    """No time is taken."""


class Far(Protocol):
    """The far side of a lane, as its kernels see it."""

    told: Tensor  # [B, Hq, D] float32: queries, where the host reads them
    asked: Tensor | None  # the same near, where keys are selected near
    out: Tensor  # [B, Hq / Gr, F, Gr, D] float32: what the host answers
    lse: Tensor  # [B, Hq / Gr, F, Gr] float32
    parts: int  # partial results of `fetch`

    @property
    def share(self) -> int:
        """What of the drawn keys `fetch` reads, in parts of SHARE_UNIT."""

    def start_step(self) -> None:
        """Launch what a step needs once."""

    def select(self, layer: int, state: Tensor) -> None:
        """Launch the selection, if it is made near."""

    def post(self, layer: int) -> None:
        """Tell the host."""

    def fetch(
        self, layer: int, state: Tensor, query: Tensor, scale: float, out: Tensor, lse: Tensor
    ) -> None:
        """Launch attention to the far rows that the GPU reads itself, into the last places."""

    def wait(self, layer: int) -> None:
        """Hold the stream until the host has answered."""


class Lane:
    """Tensors and launches of one micro-batch."""

    def __init__(
        self,
        decoder: Decoder,
        batch: int,
        splits: int,
        far: Far | None,
        ragged: RaggedTables | None,
    ) -> None:
        config, weights = decoder.config, decoder.weights
        self.batch = batch
        self._decoder, self._far, self._ragged = decoder, far, ragged
        device, dtype = weights.norm.device, weights.norm.dtype
        Hq, Hkv, D = config.query_heads, config.kv_heads, config.head_dim

        def buffer(*sizes: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.zeros(batch, *sizes, dtype=dtype, device=device)

        pinned = device.type == "cuda"
        # numbers of a step, then each layer's near rows before it, then after it
        size = (NUMBERS + 2 * config.layers, batch)
        self._state_here = torch.zeros(size, dtype=torch.int32, pin_memory=pinned)
        self._numbers = self._state_here.numpy()
        self._state = torch.zeros(size, dtype=torch.int32, device=device)
        self._slots, self._near_lengths = self._state[NUMBERS:].chunk(2)
        self._hidden = buffer(config.hidden_size)
        self._qkv = buffer((Hq + 2 * Hkv) * D)
        self._query = buffer(Hq, D)
        others = 0 if far is None else far.parts
        self._splits, places = splits, splits + (others if ragged is None else splits)
        self._near_out = buffer(Hq, places, D, dtype=torch.float32)
        self._near_lse = buffer(Hq, places, dtype=torch.float32)
        self._mixed = buffer(Hq, D)
        self._inner = buffer(config.intermediate_size)
        self.logits = buffer(config.vocab_size, dtype=torch.float32)
        self._unturned = (buffer(D, dtype=torch.float32) + 1.0, buffer(D, dtype=torch.float32))
        self._mark: Callable[[], None] = nothing  # called where a stage ends, to take times
        self._rows = [RowTable.empty(batch, dtype, device) for _ in range(config.layers)]

    def bind(self, sequences: Several[Sequence]) -> None:
        """Decode for these sequences from now on."""
        for layer, table in enumerate(self._rows):
            # not held: near memory goes when its sequence does
            table.point([sequence.near[layer].rows for sequence in sequences], hold=False)
        if self._ragged is not None:
            self._ragged.bind(sequences)

    def set_state(self, sequences: Several[Sequence], token_ids: Several[int]) -> None:
        """What the next launch is about; the one before must be over."""
        for b, (sequence, token) in enumerate(zip(sequences, token_ids, strict=True)):
            near, far = [layer.length for layer in sequence.near], sequence.far.length(0)
            wanted = sequence.settings.budget.keys(far)
            position, step = sequence.next_position, sequence.tokens
            reach = sequence.far.reach_tokens(self._state.device)
            share = 0 if self._far is None else self._far.share
            numbers = (token, position, far, wanted, step, reach, share)
            self._numbers[:, b] = (*numbers, *near, *(length + 1 for length in near))

    def launch(self, mark: Callable[[], None] = nothing) -> None:
        """Launch all kernels of a step into the current stream; ``mark`` is called at stages."""
        decoder, state = self._decoder, self._state
        self._mark = mark
        mark()
        state.copy_(self._state_here, non_blocking=True)
        embed(decoder.weights.embedding, state[TOKENS], self._hidden)
        angles = decoder.rotary.angles(state[POSITIONS])
        if self._far is not None:
            self._far.start_step()
        mark()
        for layer in range(decoder.config.layers):
            self._project(layer, angles if decoder.uses_rope(layer) else self._unturned)
            self._attend(layer)
            self._finish(layer)
            mark()
        weights, eps = decoder.weights, decoder.config.rms_norm_eps
        if self.batch == 1:
            matvec(self._hidden, weights.head, None, self.logits, norm=weights.norm, eps=eps)
        else:
            self.logits.copy_(decoder.logits(self._hidden))
        mark()

    def _project(self, layer: int, angles: tuple[Tensor, Tensor]) -> None:
        weights, config = self._decoder.weights.layers[layer], self._decoder.config
        eps, far = config.rms_norm_eps, self._far
        if self.batch == 1:
            inputs = (self._hidden, weights.qkv, weights.qkv_bias, self._qkv)
            matvec(*inputs, norm=weights.input_norm, eps=eps)
        else:
            normed = F.rms_norm(self._hidden, weights.input_norm.shape, weights.input_norm, eps)
            self._qkv.copy_(F.linear(normed, weights.qkv, weights.qkv_bias))
        norms = None
        if weights.q_norm is not None and weights.k_norm is not None:
            norms = (weights.q_norm, weights.k_norm)
        place_tokens(
            self._qkv,
            angles,
            norms,
            eps,
            self._rows[layer],
            self._slots[layer],
            self._query,
            self._decoder.softmax_scale,
            None if far is None else far.asked,
            None if far is None else far.told,
        )

    def _attend(self, layer: int) -> None:
        far, mark = self._far, self._mark
        mark()
        if far is not None:
            far.select(layer, self._state)
        mark()
        if far is not None:
            far.post(layer)
        lengths, scale = self._near_lengths[layer], self._decoder.softmax_scale
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

    def _finish(self, layer: int) -> None:
        decoder, mixed = self._decoder, self._mixed.view(self.batch, -1)
        weights, eps = decoder.weights.layers[layer], decoder.config.rms_norm_eps
        if self.batch == 1:
            matvec(mixed, weights.output, weights.output_bias, self._hidden, add=True)
            inputs = (self._hidden, weights.gate_up, weights.gate_up_bias, self._inner)
            matvec(*inputs, norm=weights.post_norm, eps=eps, gated=True)
            matvec(self._inner, weights.down, weights.down_bias, self._hidden, add=True)
            return
        self._hidden += F.linear(mixed, weights.output, weights.output_bias)
        normed = F.rms_norm(self._hidden, weights.post_norm.shape, weights.post_norm, eps)
        gate_up = F.linear(normed, weights.gate_up, weights.gate_up_bias)
        self._hidden += F.linear(silu_gate(gate_up), weights.down, weights.down_bias)

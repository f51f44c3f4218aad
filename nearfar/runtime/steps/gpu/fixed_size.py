"""Decode steps of sequences whose near (GPU) sets are full, as one captured graph.

An evicting policy selects the rows to drop in tensor code, after every layer: some forty launches a
layer, each of which takes longer in Python than on the GPU. Once every step drops as many rows as
it adds, the launches are the same in every step and only the tensors' contents change.
"""

from __future__ import annotations

from collections import abc

import torch
from torch import Tensor

from nearfar.runtime.memory.sequence import Sequence
from nearfar.runtime.models.decoder import Decoder
from nearfar.runtime.steps.decode import run_layers
from nearfar.runtime.steps.gpu.micro_batches import collection_paused

TOKENS, TURNED_TO, POSITIONS = range(3)


class FixedSizeStep:
    """A step of sequences of fixed size; new sequences or new addresses of rows need a new one."""

    def __init__(self, decoder: Decoder, batch: int) -> None:
        self._decoder, device = decoder, decoder.device
        self._on_gpu = device.type == "cuda"
        size = (3, batch)
        self._here = torch.zeros(size, dtype=torch.int64, pin_memory=self._on_gpu)
        self._numbers = torch.zeros(size, dtype=torch.int64, device=device)
        # on the decoder's device, which need not be the current one
        self._stream = torch.cuda.Stream(device) if self._on_gpu else None  # type: ignore[no-untyped-call]
        self._logits: Tensor | None = None
        self._graph: torch.cuda.CUDAGraph | None = None

    def step(self, sequences: abc.Sequence[Sequence], token_ids: abc.Sequence[int]) -> Tensor:
        """Logits [B, V] float32 after ``token_ids``, which are appended to the sequences."""
        if self._on_gpu:  # the copy of the previous step must be over
            torch.cuda.current_stream(self._decoder.device).synchronize()
        for b, (sequence, token) in enumerate(zip(sequences, token_ids, strict=True)):
            self._here[:, b] = torch.tensor((token, sequence.next_position, sequence.tokens))
        self._numbers.copy_(self._here, non_blocking=True)
        if not self._on_gpu:
            logits = self._launch(sequences)
        else:
            if self._graph is None:
                self._capture(sequences)
            assert self._graph is not None
            assert self._logits is not None
            self._graph.replay()
            logits = self._logits.clone()
        for sequence in sequences:
            sequence.finish_step()
        return logits

    def _launch(self, sequences: abc.Sequence[Sequence]) -> Tensor:
        hidden = self._decoder.embed(self._numbers[TOKENS])
        where = (self._numbers[TURNED_TO], self._numbers[POSITIONS])
        return run_layers(self._decoder, sequences, hidden, *where)

    def _capture(self, sequences: abc.Sequence[Sequence]) -> None:
        self._decoder.embed(self._numbers[TOKENS])  # all other kernels ran in the previous step
        torch.cuda.current_stream(self._decoder.device).synchronize()
        graph = torch.cuda.CUDAGraph()
        lengths = [[near.length for near in sequence.near] for sequence in sequences]
        try:
            with (
                torch.cuda.device(self._decoder.device),
                collection_paused(),
                torch.cuda.graph(graph, stream=self._stream),
            ):
                self._logits = self._launch(sequences)
        except BaseException:  # nothing ran: the rows were counted and not written
            for sequence, own in zip(sequences, lengths, strict=True):
                for near, length in zip(sequence.near, own, strict=True):
                    near.length = length
            raise
        self._graph = graph

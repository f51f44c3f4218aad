"""Queries, keys and values of every layer of a model that reads texts with exact attention.

All texts pass one layer before the next, so that memory holds the training data of one layer only.
Each layer's input is that of the exact model, so errors of one layer do not enter another.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nearfar import Engine
from nearfar.runtime.models.layers import Attention, TensorContext
from nearfar.runtime.steps.prompt_attention import attend_chunk


@dataclass(frozen=True)
class Record:
    """One layer: S texts of T tokens. Queries are scaled, queries and keys rotated."""

    queries: Tensor  # [S, Hq, T, D]
    keys: Tensor  # [S, Hkv, T, D]
    values: Tensor  # [S, Hkv, T, D]
    output: Tensor  # [hidden, Hq D], float32: the output projection

    def prompt(self, text: int, cut: int) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of the tokens of a text before ``cut``."""
        every = (self.queries, self.keys, self.values)
        queries, keys, values = (x[text][:, :cut] for x in every)
        return queries, keys, values


def tokens_of(engine: Engine, paths: list[Path], length: int) -> Tensor:
    """All texts, one after another, in rows [S, length] of tokens; an incomplete row is dropped."""
    ids: list[int] = []
    for path in paths:
        ids += engine.tokenizer.encode(path.read_text(encoding="utf-8"))
    rows = len(ids) // length
    return torch.tensor(ids[: rows * length]).view(rows, length)


@torch.no_grad()
def records(engine: Engine, tokens: Tensor) -> Iterator[Record]:
    """A record of each layer, in order, of ``tokens`` [S, T]."""
    decoder = engine.decoder
    hidden = [decoder.embed(row) for row in tokens.to(decoder.device)]
    angles = decoder.angles(torch.arange(tokens.shape[1], device=decoder.device))
    found: list[tuple[Tensor, Tensor, Tensor]] = []

    def attend(mixer: Attention, qkv: Tensor) -> Tensor:
        scale = mixer.plan.scale
        q, k, v = (x.transpose(0, 1) for x in mixer.heads(qkv, angles[mixer.far_layer]))
        found.append((q * scale, k.contiguous(), v.contiguous()))
        return attend_chunk(q, k, v, scale).out.transpose(0, 1).reshape(len(qkv), -1)

    for number, layer in enumerate(decoder.layers):
        for states in hidden:
            layer.add_to(TensorContext(states, attend))
        if layer.mixer is not None:
            queries, keys, values = (torch.stack(each) for each in zip(*found, strict=True))
            found.clear()
            yield Record(queries, keys, values, decoder.weights[f"layers.{number}.output"].float())

"""Trains the convolutions of the policy `lococo` for a model, each layer alone.

    python training/train_lococo.py --text book.txt --text tales.txt --output lococo.safetensors

A prompt's rows are merged as the policy does it; the convolution is fitted so that queries behind
the prompt get from the merged rows what exact attention gives them: the mean squared error behind
the output projection. Beside it is the error on texts that were not trained on of the same rows
without the convolution, the best-scoring ones in the place of mixtures.
"""

from __future__ import annotations

import torch
from excerpts import SINKS, WINDOW, Asked, Excerpt, grouped_logits, grouped_values
from recording import Record
from running import Setting, Trainer, command
from torch import Tensor

from nearfar.policies.base import NearState
from nearfar.policies.convolution import LayerConv, random_convolutions
from nearfar.policies.evicting import attention_of
from nearfar.policies.lococo import LoCoCo, merged


class LoCoCoTrainer(Trainer):
    """Fits the convolution of one layer."""

    def __init__(
        self, record: Record, excerpts: list[Excerpt], setting: Setting, tensors: dict[str, Tensor]
    ) -> None:
        super().__init__(record, excerpts, setting)
        self.conv = LayerConv(**tensors)
        self._last = LoCoCo().queries

    def parameters(self) -> list[Tensor]:
        """Its weights and the share of mixtures."""
        return list(vars(self.conv).values())

    def loss(self, step: int) -> Tensor:
        """As of all, with the share of mixtures where the policy takes it: 0 to 1."""
        with torch.no_grad():
            self.conv.blend.clamp_(0, 1)
        return super().loss(step)

    def attend(self, number: int, asked: Asked) -> Tensor:
        """Over merged rows and the tokens from the cut on."""
        return self._attend(number, asked, self.conv)

    def rivals(self, number: int, asked: Asked) -> dict[str, Tensor]:
        """The best rows instead of mixtures."""
        without = LayerConv(self.conv.weight, self.conv.bias, torch.zeros_like(self.conv.blend))
        return {"without convolution": self._attend(number, asked, without)}

    def give_up(self) -> None:
        """Mixtures of one row each, whatever the weights have come to."""
        for parameter in self.parameters():
            parameter.zero_()

    def _attend(self, number: int, asked: Asked, conv: LayerConv) -> Tensor:
        rows = merged(self._near(number), conv).rows
        keys, values = rows.chunk(2, dim=-1)
        every = torch.cat([grouped_logits(asked.queries, keys), asked.own], -1)
        return grouped_values(every.softmax(-1), torch.cat([values, asked.own_values], 1))

    @torch.no_grad()
    def _near(self, number: int) -> NearState:
        """A prompt's rows and their scores, before they are merged."""
        excerpt, record = self.excerpts[number], self.record
        cut = excerpt.cut
        keys, values = (x[excerpt.text][:, :cut].float() for x in (record.keys, record.values))
        positions = torch.arange(cut, device=keys.device).expand(len(keys), -1)
        near = NearState(positions, None, SINKS, WINDOW, excerpt.limit, keys, values)
        last = record.queries[excerpt.text][:, cut - self._last : cut].float()
        scores = attention_of(last, near).mean(1).view(len(keys), -1, cut).mean(1)
        return NearState(positions, scores, SINKS, WINDOW, excerpt.limit, keys, values)


if __name__ == "__main__":
    command("lococo", (LoCoCoTrainer, random_convolutions))()

"""Trains the convolutions of the policy `lococo` for a model, each layer alone.

    python training/train_lococo.py --text book.txt --text tales.txt --output lococo.safetensors

A prompt's rows are merged as in the policy. The convolution is fitted so that, for queries behind
the prompt, attention over merged rows approximates exact attention. The loss is the mean squared
error after the output projection. The held-out error is printed beside that without the
convolution, which keeps the best-scoring rows in the place of mixtures.
"""

from __future__ import annotations

import torch
from excerpts import Excerpt, ExcerptQueries, grouped_logits, grouped_values, prompt_of
from recording import Record
from running import Setting, Trainer, command
from torch import Tensor

from nearfar.policies.convolution import LayerConv, random_convolutions
from nearfar.policies.lococo import LoCoCo, merged, scores_of


@torch.no_grad()
def prompt_scores(record: Record, excerpt: Excerpt) -> Tensor:
    """Scores [Hkv, cut] of a prompt's rows before they are merged."""
    queries, _, _ = record.prompt(excerpt.text, excerpt.cut)
    return scores_of(queries[:, -LoCoCo().queries :].float(), prompt_of(record, excerpt))


class LoCoCoTrainer(Trainer):
    """Fits the convolution of one layer."""

    def __init__(
        self, record: Record, excerpts: list[Excerpt], setting: Setting, tensors: dict[str, Tensor]
    ) -> None:
        super().__init__(record, excerpts, setting)
        self.conv = LayerConv(**tensors)
        self.scores = [prompt_scores(record, each) for each in excerpts]

    def parameters(self) -> list[Tensor]:
        """The weights of the convolution and the share of mixtures."""
        return list(vars(self.conv).values())

    def loss(self, step: int) -> Tensor:
        """The loss of `Trainer`, after the share of mixtures is limited to 0 to 1."""
        with torch.no_grad():
            self.conv.blend.clamp_(0, 1)
        return super().loss(step)

    def attend(self, number: int, asked: ExcerptQueries) -> Tensor:
        """Attention over merged rows and the tokens from the cut on."""
        return self._attend(number, asked, self.conv)

    def rivals(self, number: int, asked: ExcerptQueries) -> dict[str, Tensor]:
        """The best rows in the place of mixtures."""
        without = LayerConv(self.conv.weight, self.conv.bias, torch.zeros_like(self.conv.blend))
        return {"without convolution": self._attend(number, asked, without)}

    def give_up(self) -> None:
        """Make mixtures of one row each, independent of the weights."""
        for parameter in self.parameters():
            parameter.zero_()

    def _attend(self, number: int, asked: ExcerptQueries, conv: LayerConv) -> Tensor:
        near = prompt_of(self.record, self.excerpts[number], self.scores[number])
        rows = merged(near, conv).rows
        keys, values = rows.chunk(2, dim=-1)
        every = torch.cat([grouped_logits(asked.queries, keys), asked.own], -1)
        return grouped_values(every.softmax(-1), torch.cat([values, asked.own_values], 1))


if __name__ == "__main__":
    command("lococo", (LoCoCoTrainer, random_convolutions))()

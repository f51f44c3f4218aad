"""Trains the feature maps of the policy `less` for a model, each layer alone.

    python training/train_less.py --text book.txt --text tales.txt --output less.safetensors

Rows that H2O drops from a prompt are folded into the policy's state. The maps are fitted so that,
for queries behind the prompt, attention over kept rows and state approximates exact attention. The
loss is the mean squared error after the output projection. The held-out error is printed beside
those of H2O alone and of H2O with the bytes of the state spent on more rows.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from excerpts import Excerpt, ExcerptQueries, grouped_logits, grouped_values, prompt_of
from recording import Record
from running import Setting, Trainer, command
from torch import Tensor

from nearfar.gpu_kernels.attend_near import merge_partials
from nearfar.policies.evicting import group_mean
from nearfar.policies.feature_maps import RANK, LayerMaps, random_maps
from nearfar.policies.h2o import H2O
from nearfar.records import Partial
from nearfar.runtime.steps.prompt_attention import attend_chunk, column_sums

SCALED_BY = 8  # excerpts that determine the first scale


@torch.no_grad()
def dropped_rows(record: Record, excerpt: Excerpt) -> Tensor:
    """Rows [Hkv, m] of the prompt that H2O drops."""
    queries, keys, values = record.prompt(excerpt.text, excerpt.cut)
    lse = attend_chunk(queries, keys, values, 1.0).lse
    scores = group_mean(column_sums(queries, keys, lse, 1.0), len(keys))
    return H2O().victims(prompt_of(record, excerpt, scores))


def attend_kept(
    record: Record, excerpt: Excerpt, dropped: Tensor, asked: ExcerptQueries
) -> Partial:
    """Attention [Hq, n, D] over kept rows and the tokens from the cut on."""
    near = prompt_of(record, excerpt)
    keys, values = near.keys, near.values
    gone = torch.zeros(keys.shape[:2], dtype=torch.bool, device=keys.device)
    gone.scatter_(1, dropped, value=True)
    group = len(asked.queries) // len(keys)
    logits = grouped_logits(asked.queries, keys)
    logits = logits.masked_fill(gone.repeat_interleave(group, 0)[:, None], -torch.inf)
    every = torch.cat([logits, asked.own], -1)
    mixed = grouped_values(every.softmax(-1), torch.cat([values, asked.own_values], 1))
    return Partial(mixed, every.logsumexp(-1))


class LessTrainer(Trainer):
    """Fits the maps of one layer."""

    def __init__(
        self, record: Record, excerpts: list[Excerpt], setting: Setting, tensors: dict[str, Tensor]
    ) -> None:
        super().__init__(record, excerpts, setting)
        self.maps = LayerMaps(**tensors)
        self.dropped = [dropped_rows(record, each) for each in excerpts]
        self._set_first_scale()

    def parameters(self) -> list[Tensor]:
        """All maps."""
        return list(vars(self.maps).values())

    def attend(self, number: int, asked: ExcerptQueries) -> Tensor:
        """Attention over kept rows and over the state, merged."""
        kept = attend_kept(self.record, self.excerpts[number], self.dropped[number], asked)
        sums = self.maps.sums(*self._dropped_keys_values(number))
        return merge_partials(kept, self.maps.attend(asked.queries, *sums)).out

    def rivals(self, number: int, asked: ExcerptQueries) -> dict[str, Tensor]:
        """H2O, and H2O with more rows."""
        excerpt, D = self.excerpts[number], self.record.keys.shape[-1]
        itemsize = self.record.keys.element_size()
        more_rows = -(-4 * RANK * (D + 1) // (2 * D * itemsize))  # of the bytes of a state
        larger = replace(excerpt, budget=excerpt.budget + more_rows)
        fewer = dropped_rows(self.record, larger)
        return {
            "h2o": attend_kept(self.record, excerpt, self.dropped[number], asked).out,
            "h2o with as many bytes": attend_kept(self.record, excerpt, fewer, asked).out,
        }

    def give_up(self) -> None:
        """Give the state weight 0."""
        self.maps.k_scale.zero_()

    @torch.no_grad()
    def _set_first_scale(self) -> None:
        """Scale untrained maps so that the state's mean weight equals that of the dropped rows."""
        found = []
        for number in self.trained[:SCALED_BY]:
            asked, (keys, values) = self.ask(number), self._dropped_keys_values(number)
            true = grouped_logits(asked.queries, keys).logsumexp(-1)
            part = self.maps.attend(asked.queries, *self.maps.sums(keys, values))
            found.append((true - part.lse).mean(-1))
        self.maps.log_scale.add_(torch.stack(found).mean(0))

    def _dropped_keys_values(self, number: int) -> tuple[Tensor, Tensor]:
        text, dropped = self.excerpts[number].text, self.dropped[number][..., None]
        both = (self.record.keys[text], self.record.values[text])
        keys, values = (rows.take_along_dim(dropped, 1).float() for rows in both)
        return keys, values


if __name__ == "__main__":
    command("less", (LessTrainer, random_maps))()

"""Trains the feature maps of the policy `less` for a model, each layer alone.

    python training/train_less.py --text book.txt --text tales.txt --output less.safetensors

Rows that H2O drops from a prompt are folded into the policy's state; the maps are fitted so that
queries behind the prompt get, from what is kept and from the state, what exact attention gives
them: the mean squared error behind the output projection. Beside it is the error on texts that were
not trained on of H2O alone, and of H2O with the bytes of the state spent on more rows.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from excerpts import SINKS, WINDOW, Asked, Excerpt, grouped_logits, grouped_values
from recording import Record
from running import Setting, Trainer, command
from torch import Tensor

from nearfar.policies.base import NearState
from nearfar.policies.feature_maps import LEAST_MASS, RANK, LayerMaps, random_maps
from nearfar.policies.h2o import H2O

QUERY_TILE = 512  # of the attention whose columns are summed
SCALED_BY = 8  # excerpts from which the first scale is taken


@torch.no_grad()
def dropped_rows(record: Record, excerpt: Excerpt) -> Tensor:
    """Rows [Hkv, m] of the prompt that H2O drops."""
    cut = excerpt.cut
    keys = record.keys[excerpt.text][:, :cut].float()
    queries = record.queries[excerpt.text][:, :cut]
    sums = torch.zeros(len(queries), cut, device=keys.device)
    for start in range(0, cut, QUERY_TILE):
        logits = grouped_logits(queries[:, start : start + QUERY_TILE].float(), keys)
        own = torch.arange(start, start + logits.shape[1], device=keys.device)
        later = torch.arange(cut, device=keys.device) > own[:, None]
        sums += logits.masked_fill_(later, -torch.inf).softmax(-1).sum(1)
    scores = sums.view(len(keys), -1, cut).mean(1)
    positions = torch.arange(cut, device=keys.device).expand(len(keys), -1)
    near = NearState(positions, scores, SINKS, WINDOW, excerpt.limit, keys, keys)
    return H2O().victims(near)


def attend_kept(
    record: Record, excerpt: Excerpt, dropped: Tensor, asked: Asked
) -> tuple[Tensor, Tensor]:
    """Output [Hq, n, D] and log-sum-exp [Hq, n] over what is not dropped, and from the cut on."""
    keys, values = (x[excerpt.text][:, : excerpt.cut].float() for x in (record.keys, record.values))
    gone = torch.zeros(keys.shape[:2], dtype=torch.bool, device=keys.device)
    gone.scatter_(1, dropped, value=True)
    group = len(asked.queries) // len(keys)
    logits = grouped_logits(asked.queries, keys)
    logits = logits.masked_fill(gone.repeat_interleave(group, 0)[:, None], -torch.inf)
    every = torch.cat([logits, asked.own], -1)
    mixed = grouped_values(every.softmax(-1), torch.cat([values, asked.own_values], 1))
    return mixed, every.logsumexp(-1)


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

    def attend(self, number: int, asked: Asked) -> Tensor:
        """What is kept and the state, merged."""
        out, lse = attend_kept(self.record, self.excerpts[number], self.dropped[number], asked)
        keys, values = self._dropped_keys_values(number)
        group = len(asked.queries) // len(keys)
        features = self.maps.of_keys(keys)
        sums = (features.mT @ values).repeat_interleave(group, 0)
        query = self.maps.of_queries(asked.queries)
        mass = self._mass(features, query)
        state_lse = mass.log() + self.maps.log_scale[:, None]
        state_out = (query @ sums) / mass[..., None]
        return torch.lerp(out, state_out, torch.sigmoid(state_lse - lse)[..., None])

    def rivals(self, number: int, asked: Asked) -> dict[str, Tensor]:
        """H2O, and with more rows."""
        excerpt, D = self.excerpts[number], self.record.keys.shape[-1]
        itemsize = self.record.keys.element_size()
        more_rows = -(-4 * RANK * (D + 1) // (2 * D * itemsize))  # of the bytes of a state
        larger = replace(excerpt, budget=excerpt.budget + more_rows)
        fewer = dropped_rows(self.record, larger)
        return {
            "h2o": attend_kept(self.record, excerpt, self.dropped[number], asked)[0],
            "h2o with as many bytes": attend_kept(self.record, excerpt, fewer, asked)[0],
        }

    def give_up(self) -> None:
        """A state that weighs nothing."""
        self.maps.k_scale.zero_()

    @torch.no_grad()
    def _set_first_scale(self) -> None:
        """Let the state of untrained maps weigh, in the mean, what the dropped rows weigh."""
        found = []
        for number in self.trained[:SCALED_BY]:
            asked, (keys, _) = self.ask(number), self._dropped_keys_values(number)
            true = grouped_logits(asked.queries, keys).logsumexp(-1)
            mass = self._mass(self.maps.of_keys(keys), self.maps.of_queries(asked.queries))
            found.append((true - mass.log()).mean(-1))
        self.maps.log_scale.copy_(torch.stack(found).mean(0))

    def _mass(self, features: Tensor, query: Tensor) -> Tensor:
        """Phi . sum(psi), [Hq, n]."""
        masses = features.sum(1).repeat_interleave(len(query) // len(features), 0)
        return (query @ masses[..., None])[..., 0].clamp_min(LEAST_MASS)

    def _dropped_keys_values(self, number: int) -> tuple[Tensor, Tensor]:
        text, record = self.excerpts[number].text, self.record
        rows = self.dropped[number][..., None].expand(-1, -1, record.keys.shape[-1])
        keys, values = (x[text].gather(1, rows).float() for x in (record.keys, record.values))
        return keys, values


if __name__ == "__main__":
    command("less", (LessTrainer, random_maps))()

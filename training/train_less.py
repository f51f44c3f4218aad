"""Trains the feature maps of the policy `less` for a model, each layer alone.

    python training/train_less.py --text book.txt --text tales.txt --output less.safetensors

Rows that H2O drops from a prompt are folded into the policy's state; the maps are fitted so that
queries behind the prompt get, from what is kept and from the state, what exact attention gives
them: the mean squared error behind the output projection. Ends with the error on texts that were
not trained on, beside H2O alone and beside H2O with the bytes of the state spent on more rows.
"""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import click
import torch
from excerpts import SINKS, WINDOW, Asked, Excerpt, ask, draw_excerpts, error_of
from excerpts import grouped_logits, grouped_values
from fitting import fit
from recording import Record, records, tokens_of
from torch import Tensor

from nearfar import Engine
from nearfar.config import EngineConfig
from nearfar.policies.base import NearState
from nearfar.policies.feature_maps import NAMES, RANK, LayerMaps, layer_maps, random_maps
from nearfar.policies.h2o import H2O
from nearfar.policies.trained import save_trained

QUERY_TILE = 512  # of the attention whose columns are summed
LEAST_MASS = 1e-20


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


def kept_mask(dropped: Tensor, cut: int) -> Tensor:
    """Mask [Hkv, cut] of what is not dropped."""
    kept = torch.ones(len(dropped), cut, dtype=torch.bool, device=dropped.device)
    return kept.scatter_(1, dropped, value=False)


def attend_kept(record: Record, excerpt: Excerpt, kept: Tensor, asked: Asked) -> tuple[Tensor, Tensor]:
    """Output [Hq, n, D] and log-sum-exp [Hq, n] over what is kept and the tokens from the cut on."""
    keys, values = (x[excerpt.text][:, : excerpt.cut].float() for x in (record.keys, record.values))
    logits = grouped_logits(asked.queries, keys)
    group = len(asked.queries) // len(keys)
    logits = logits.masked_fill(~kept.repeat_interleave(group, 0)[:, None], -torch.inf)
    every = torch.cat([logits, asked.own], -1)
    mixed = grouped_values(every.softmax(-1), torch.cat([values, asked.own_values], 1))
    return mixed, every.logsumexp(-1)


def with_state(
    maps: LayerMaps, record: Record, excerpt: Excerpt, dropped: Tensor, asked: Asked,
    kept: tuple[Tensor, Tensor],
) -> Tensor:
    """``kept`` and the part of the state made of ``dropped`` rows, merged; [Hq, n, D]."""
    D = record.keys.shape[-1]
    rows = dropped[..., None].expand(-1, -1, D)
    keys, values = (x[excerpt.text].gather(1, rows).float() for x in (record.keys, record.values))
    group = len(asked.queries) // len(keys)
    features = maps.of_keys(keys)
    sums = (features.mT @ values).repeat_interleave(group, 0)
    masses = features.sum(1).repeat_interleave(group, 0)
    query = maps.of_queries(asked.queries)
    mass = (query @ masses[..., None])[..., 0].clamp_min(LEAST_MASS)
    out = (query @ sums) / mass[..., None]
    lse = mass.log() + maps.log_scale[:, None]
    share = torch.sigmoid(lse - kept[1])[..., None]
    return kept[0] + share * (out - kept[0])


class Trainer:
    """One layer."""

    def __init__(
        self, record: Record, excerpts: list[Excerpt], maps: LayerMaps, queries: int, seed: int
    ) -> None:
        self.record, self.maps, self.queries = record, maps, queries
        self.excerpts = excerpts
        self.dropped = [dropped_rows(record, each) for each in excerpts]
        self.kept = [kept_mask(d, e.cut) for d, e in zip(self.dropped, excerpts, strict=True)]
        self.generator = torch.Generator().manual_seed(seed)
        held = max(1, len(excerpts) // 10)
        self.trained, self.held = range(len(excerpts) - held), range(len(excerpts) - held, len(excerpts))

    def of(self, number: int) -> tuple[Excerpt, Asked, tuple[Tensor, Tensor]]:
        """An excerpt, drawn queries of it, and what they get of what is kept."""
        excerpt = self.excerpts[number]
        asked = ask(self.record, excerpt, self.queries, self.generator)
        return excerpt, asked, attend_kept(self.record, excerpt, self.kept[number], asked)

    def first_scale(self) -> None:
        """Let the state of untrained maps weigh, in the mean, what the dropped rows weigh."""
        found = []
        for number in list(self.trained)[:8]:
            excerpt, asked, _ = self.of(number)
            D = asked.queries.shape[-1]
            rows = self.dropped[number][..., None].expand(-1, -1, D)
            keys = self.record.keys[excerpt.text].gather(1, rows).float()
            group = len(asked.queries) // len(keys)
            true = grouped_logits(asked.queries, keys).logsumexp(-1)
            masses = self.maps.of_keys(keys).sum(1).repeat_interleave(group, 0)
            mass = (self.maps.of_queries(asked.queries) @ masses[..., None])[..., 0]
            found.append((true - mass.clamp_min(LEAST_MASS).log()).mean(-1))
        self.maps.log_scale.copy_(torch.stack(found).mean(0))

    def loss(self, step: int, batch: int = 4) -> Tensor:
        """Of a few excerpts, relative to the size of what they should get."""
        total = torch.zeros((), device=self.record.keys.device)
        for i in range(batch):
            number = self.trained[(step * batch + i) % len(self.trained)]
            excerpt, asked, kept = self.of(number)
            out = with_state(self.maps, self.record, excerpt, self.dropped[number], asked, kept)
            wrong, right = error_of(self.record, out, asked.target)
            total = total + wrong / right
        return total / batch

    @torch.no_grad()
    def held_out(self, more_rows: int) -> dict[str, float]:
        """Relative squared errors on texts that were not trained on."""
        sums: dict[str, Tensor] = {}
        for number in self.held:
            excerpt, asked, kept = self.of(number)
            larger = replace(excerpt, budget=excerpt.budget + more_rows)
            mask = kept_mask(dropped_rows(self.record, larger), excerpt.cut)
            outs = {
                "h2o": kept[0],
                "h2o+rows": attend_kept(self.record, excerpt, mask, asked)[0],
                "less": with_state(
                    self.maps, self.record, excerpt, self.dropped[number], asked, kept
                ),
            }
            for name, out in outs.items():
                wrong, right = error_of(self.record, out, asked.target)
                sums[name] = sums.get(name, torch.zeros(2)) + torch.stack([wrong, right]).cpu()
        return {name: float(both[0] / both[1]) for name, both in sums.items()}


@click.command()
@click.option("--text", "texts", multiple=True, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--output", required=True, type=click.Path(dir_okay=False, path_type=Path))
@click.option("--model", default="smollm2-135m-128k", show_default=True)
@click.option("--device", default="auto", show_default=True)
@click.option("--length", default=4096, show_default=True, help="Tokens of a text.")
@click.option("--texts-used", default=160, show_default=True, help="Texts at most.")
@click.option("--budgets", default="64,128,256,512,1024", show_default=True, help="Rows kept, drawn for each text.")
@click.option("--queries", default=192, show_default=True, help="Drawn of a text at each step.")
@click.option("--steps", default=400, show_default=True, help="Of each layer.")
@click.option("--minutes", default=6.0, show_default=True, help="At most, all layers.")
@click.option("--seed", default=0, show_default=True)
def main(
    texts: tuple[Path, ...], output: Path, model: str, device: str, length: int, texts_used: int,
    budgets: str, queries: int, steps: int, minutes: float, seed: int,
) -> None:
    """Fit the feature maps of LESS and write them to --output."""
    engine = Engine.from_pretrained(model, config=EngineConfig(policy="full", device=device))
    tokens = tokens_of(engine, list(texts), length)
    tokens = tokens[torch.randperm(len(tokens), generator=torch.Generator().manual_seed(seed))]
    train(engine, tokens[:texts_used], output, tuple(map(int, budgets.split(","))), queries, steps, minutes, seed)


def train(
    engine: Engine, tokens: Tensor, output: Path, budgets: tuple[int, ...], queries: int, steps: int,
    minutes: float, seed: int,
) -> list[dict[str, float]]:
    """Fit all layers on ``tokens`` [S, T]; the held-out errors of each."""
    torch.backends.cuda.matmul.allow_tf32 = True
    geometry, place = engine.model_config.geometry, engine.decoder.device
    tensors = {name: tensor.to(place) for name, tensor in random_maps(geometry, seed).items()}
    excerpts = draw_excerpts(len(tokens), tokens.shape[1], budgets, seed)
    more_rows = -(-4 * RANK * (geometry.head_dim + 1) // (4 * geometry.head_dim))
    started, found = time.perf_counter(), []
    for layer, record in enumerate(records(engine, tokens)):
        maps = layer_maps(tensors, layer)
        trainer = Trainer(record, excerpts, maps, queries, seed)
        trainer.first_scale()
        left = 60 * minutes - (time.perf_counter() - started)
        parameters = [getattr(maps, name) for name in NAMES]
        taken = fit(parameters, trainer.loss, steps, max(left, 0.1) / (geometry.layers - layer), 2e-3)
        errors = trainer.held_out(more_rows)
        if errors["less"] >= errors["h2o"]:
            maps.k_scale.zero_()  # a state that weighs nothing
        found.append(errors)
        shown = ", ".join(f"{name} {error:.4f}" for name, error in errors.items())
        seconds = time.perf_counter() - started
        click.echo(f"layer {layer}: {taken} steps, error {shown}; {seconds:.0f} s")
    about = {
        "trained_on": f"{len(tokens)} texts of {tokens.shape[1]} tokens, budgets {budgets}",
        "model": engine.model_name,
        "seed": str(seed),
        "held_out": json.dumps(found),
    }
    save_trained(output, "less", geometry, tensors, about)
    means = {name: sum(each[name] for each in found) / len(found) for name in found[0]}
    click.echo(f"{output}: mean error " + ", ".join(f"{n} {e:.4f}" for n, e in means.items()))
    return found


if __name__ == "__main__":
    main()

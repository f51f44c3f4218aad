"""Training of a policy's weights for a model, layer by layer, from a command line."""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import click
import torch
from excerpts import SINKS, WINDOW, Excerpt, ExcerptQueries, ask, draw_excerpts, error_of
from fitting import fit
from recording import Record, records, tokens_of
from torch import Tensor

from nearfar import Engine
from nearfar.cli.outputs import agreed, force_option
from nearfar.config import EngineConfig
from nearfar.errors import OutputError
from nearfar.policies.trained import save_trained, trained_place
from nearfar.records import Geometry

BATCH = 4  # excerpts of a step
RATE = 2e-3
HELD_OUT = 10  # one text in ten decides which weights are written, another one measures them
MARGIN = 64  # the least number of tokens dropped from the shortest prompt


@dataclass(frozen=True)
class Setting:
    """The length and the data of a training."""

    budgets: tuple[int, ...] = (64, 128, 256, 512, 1024)
    queries: int = 192  # drawn from a text at each step
    steps: int = 400  # of each layer
    minutes: float = 6.0  # all layers, at most
    seed: int = 0


class Trainer(ABC):
    """One layer of one policy.

    Two tenths of the texts are held out. If a trained layer is no better than its first rival on
    the first tenth, the rival replaces it.
    """

    def __init__(self, record: Record, excerpts: list[Excerpt], setting: Setting) -> None:
        self.record, self.excerpts, self.setting = record, excerpts, setting
        self.generator = torch.Generator().manual_seed(setting.seed)
        held = max(1, len(excerpts) // HELD_OUT)
        ends = (0, len(excerpts) - 2 * held, len(excerpts) - held, len(excerpts))
        # the deciding texts bias the decision, so reported errors come from the other texts
        self.trained, self.deciding, self.measured = map(range, ends, ends[1:])

    @abstractmethod
    def parameters(self) -> list[Tensor]:
        """The fitted parameters."""

    @abstractmethod
    def attend(self, number: int, asked: ExcerptQueries) -> Tensor:
        """The attention [Hq, n, D] of an excerpt's queries."""

    @abstractmethod
    def rivals(self, number: int, asked: ExcerptQueries) -> dict[str, Tensor]:
        """Their attention without training; the first rival is the fallback."""

    @abstractmethod
    def give_up(self) -> None:
        """Become the first rival."""

    def ask(self, number: int) -> ExcerptQueries:
        """Drawn queries of an excerpt."""
        return ask(self.record, self.excerpts[number], self.setting.queries, self.generator)

    def loss(self, step: int) -> Tensor:
        """The loss on a few excerpts, relative to the size of their targets."""
        total = torch.zeros((), device=self.record.keys.device)
        for i in range(BATCH):
            number = self.trained[(step * BATCH + i) % len(self.trained)]
            asked = self.ask(number)
            wrong, right = error_of(self.record, self.attend(number, asked), asked.target)
            total = total + wrong / right
        return total / BATCH

    @torch.no_grad()
    def held_out(self, name: str, numbers: range) -> dict[str, float]:
        """Relative squared errors on the excerpts ``numbers``, of ``name`` and its rivals."""
        sums: dict[str, Tensor] = {}
        for number in numbers:
            asked = self.ask(number)
            outs = self.rivals(number, asked) | {name: self.attend(number, asked)}
            for each, out in outs.items():
                both = torch.stack(error_of(self.record, out, asked.target)).cpu()
                sums[each] = sums.get(each, torch.zeros(2)) + both
        return {each: float(both[0] / both[1]) for each, both in sums.items()}


MakeTrainer = Callable[[Record, list[Excerpt], Setting, dict[str, Tensor]], Trainer]
MakeTensors = Callable[[Geometry, int], dict[str, Tensor]]


def train(
    policy: str,
    engine: Engine,
    tokens: Tensor,
    output: str | Path,
    setting: Setting,
    make: tuple[MakeTrainer, MakeTensors],
    about: dict[str, str],
    overwrite: bool = False,
) -> list[dict[str, float]]:
    """Fit all layers on ``tokens`` [S, T], write the file, return each layer's held-out errors.

    ``about`` is further metadata for the file; ``overwrite`` as in `save_trained`.
    """
    torch.backends.cuda.matmul.allow_tf32 = True
    make_trainer, make_tensors = make
    geometry, device = engine.model_config.geometry, engine.decoder.device
    tensors = {n: t.to(device) for n, t in make_tensors(geometry, setting.seed).items()}
    excerpts = draw_excerpts(len(tokens), tokens.shape[1], setting.budgets, setting.seed)
    started, found = time.perf_counter(), []
    for layer, record in enumerate(records(engine, tokens)):
        own = {name: tensor[layer] for name, tensor in tensors.items()}
        trainer = make_trainer(record, excerpts, setting, own)
        left = 60 * setting.minutes - (time.perf_counter() - started)
        seconds = max(left, 0.1) / (geometry.layers - layer)
        errors, said = _fit_layer(policy, trainer, seconds)
        found.append(errors)
        passed = time.perf_counter() - started
        left = passed / (layer + 1) * (geometry.layers - layer - 1)
        click.echo(f"layer {layer}: {said}; {passed:.0f} s, about {left:.0f} s left")
    facts = {
        "trained_on": f"{len(tokens)} texts of {tokens.shape[1]} tokens",
        "model": engine.model_name,
        "setting": json.dumps(vars(setting)),
        "held_out": json.dumps(found),
    }
    save_trained(output, policy, geometry, tensors, facts | about, overwrite=overwrite)
    means = {name: sum(each[name] for each in found) / len(found) for name in found[0]}
    click.echo(f"{output}: mean error {_listed(means)}")
    return found


def _fit_layer(policy: str, trainer: Trainer, seconds: float) -> tuple[dict[str, float], str]:
    """Held-out errors of one layer, and a line about it."""
    taken = fit(trainer.parameters(), trainer.loss, trainer.setting.steps, seconds, RATE)
    decided = trainer.held_out(policy, trainer.deciding)
    errors = trainer.held_out(policy, trainer.measured)
    said, rival = f"{taken} steps, error {_listed(errors)}", next(iter(errors))
    if decided[policy] < decided[rival]:
        return errors, said
    trainer.give_up()
    return errors | {policy: errors[rival]}, said + ", given up"


def _listed(errors: dict[str, float]) -> str:
    return ", ".join(f"{name} {error:.4f}" for name, error in errors.items())


def _check_before(budgets: tuple[int, ...], length: int) -> None:
    """Refuse settings that would fail only after minutes of training."""
    most = length // 2 - SINKS - WINDOW - MARGIN
    if not 0 <= min(budgets) <= max(budgets) <= most:
        raise click.UsageError(
            f"A prompt is at least half of a text, {length // 2} tokens, and {MARGIN} or more must "
            f"be dropped from it. Budgets must be between 0 and {most}. Got {list(budgets)}."
        )


def _some(tokens: Tensor, most: int, seed: int) -> Tensor:
    """At most ``most`` rows of ``tokens`` [S, T], in random order."""
    some = tokens[torch.randperm(len(tokens), generator=torch.Generator().manual_seed(seed))][:most]
    if len(some) < 3:
        raise click.UsageError(
            f"Three texts of {tokens.shape[1]} tokens are needed: to train on, to decide what is "
            f"written and to measure it. There are {len(some)}: give more --text, or a smaller "
            "--length."
        )
    return some


def command(policy: str, make: tuple[MakeTrainer, MakeTensors]) -> click.Command:
    """The command line of a policy's training."""
    existing = click.Path(exists=True, path_type=Path)
    option = partial(click.option, show_default=True)

    @click.command(help=f"Train {policy} on texts for a model, and write its weights.")
    @click.option("--text", "texts", multiple=True, required=True, metavar="FILE", type=existing)
    @click.option("--output", required=True, metavar="FILE")
    @force_option
    @option("--model", default="smollm2-135m-128k")
    @option("--device", default="auto")
    @option("--length", default=4096, help="Tokens of a text.")
    @option("--texts-used", default=160, help="Maximum number of texts.")
    @option("--budgets", default="64,128,256,512,1024", help="Rows kept; each text draws one.")
    @option("--queries", default=192, help="Queries drawn from a text at each step.")
    @option("--steps", default=400, help="Steps of each layer.")
    @option("--minutes", default=6.0, help="Time limit for all layers.")
    @option("--seed", default=0)
    @option("--licence", default="Apache-2.0", help="Licence of the weights, written to the file.")
    def run(
        texts: tuple[Path, ...],
        output: str,
        force: bool,
        model: str,
        device: str,
        length: int,
        texts_used: int,
        budgets: str,
        queries: int,
        steps: int,
        minutes: float,
        seed: int,
        licence: str,
    ) -> None:
        sizes = tuple(int(budget) for budget in budgets.split(","))
        _check_before(sizes, length)
        try:
            _, force = agreed(
                lambda yes: trained_place(output, policy, model, overwrite=yes, read=texts), force
            )
        except OutputError as error:
            raise click.UsageError(str(error)) from error
        config = EngineConfig(policy="full", device=device)
        engine = Engine.from_pretrained(model, config=config)
        tokens = _some(tokens_of(engine, list(texts), length), texts_used, seed)
        setting = Setting(sizes, queries, steps, minutes, seed)
        about = {"texts": ", ".join(path.name for path in texts), "licence": licence}
        train(policy, engine, tokens, output, setting, make, about, force)

    return run

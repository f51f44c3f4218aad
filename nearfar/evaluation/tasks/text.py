"""Measures over a text that need no question: perplexity, distances, throughput.

A stretch of the text is read, and the tokens that follow it go through the policy one by one.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from nearfar.errors import NearfarError, OutOfMemoryError
from nearfar.evaluation.distances import ExactRun, distances, follow
from nearfar.evaluation.tasks.base import Case, Material, Metric, Question, Task
from nearfar.runtime.engine.engine import Engine
from nearfar.runtime.memory.sequence import Sequence

PERPLEXITY = Metric("perplexity", "", higher_is_better=False, mean_of_logs=True)
KL = Metric("KL of the next token", "", higher_is_better=False)
THROUGHPUT = Metric("throughput", "", higher_is_better=True)
SENTENCE_TOKENS = 12  # or more, mostly
WARM_UP_STEPS = 2


@dataclass(frozen=True)
class Trial:
    """A policy that has read a text, and the tokens that follow."""

    engine: Engine
    sequence: Sequence
    following: list[int]
    another: Callable[[bool], Sequence]  # one more that has read the same; observed or not


@dataclass(frozen=True)
class Measured:
    """The findings: a score if there is one, and more; speeds are separate."""

    steps: int  # tokens that were decoded
    score: float | None = None
    details: dict[str, Any] = field(default_factory=dict)
    tokens_per_second: dict[int, float] = field(default_factory=dict)  # by batch


class TextTask(Task):
    """A task that needs a text and no question."""

    following_tokens: int
    needs_exact = False  # whether `measure` gets the exact run

    def case(self, number: int, context_tokens: int, material: Material) -> Case:
        """The text as one case without questions; `ids` cuts it."""
        rng = material.draws(self.name, context_tokens, number)
        count = context_tokens // SENTENCE_TOKENS + 1
        text = " ".join(material.haystack.sentences(count, rng))
        while len(material.tokenizer.encode(text)) < context_tokens:
            text += " " + " ".join(material.haystack.sentences(count, rng))
        return Case(text, (Question("", (), self.following_tokens),))

    def ids(
        self, case: Case, context_tokens: int, material: Material
    ) -> tuple[list[int], list[int]]:
        """Tokens that are read at once, and later tokens, one by one."""
        ids = material.tokenizer.encode(case.context, add_special_tokens=True)[:context_tokens]
        cut = max(1, len(ids) - self.following_tokens)
        return ids[:cut], ids[cut:]

    @abstractmethod
    def measure(self, trial: Trial, exact: ExactRun | str | None) -> Measured:
        """The findings of this task for a policy."""


@dataclass(frozen=True)
class Perplexity(TextTask):
    """Of the tokens that follow, each seen through the policy."""

    name: str = "perplexity"
    following_tokens: int = 128

    metric = PERPLEXITY

    def measure(self, trial: Trial, exact: ExactRun | str | None) -> Measured:  # noqa: ARG002
        """Mean negative log-likelihood in nats; its exponential is the perplexity."""
        ids = trial.following
        found = follow(trial.engine, trial.sequence, ids[:-1])
        likelihood = found.gather(1, torch.tensor(ids[1:])[:, None])
        return Measured(len(ids) - 1, -float(likelihood.mean()))


@dataclass(frozen=True)
class DistancesTask(TextTask):
    """KL and top-1 agreement of the next token; error and mass of every layer and head."""

    name: str = "distances"
    following_tokens: int = 32

    metric = KL
    needs_exact = True

    def measure(self, trial: Trial, exact: ExactRun | str | None) -> Measured:
        """Distances to the exact run; the exact policy has distance 0."""
        if not isinstance(exact, ExactRun):
            raise NearfarError(f"There is no exact run to compare with. {exact}")
        observed = trial.sequence
        if observed.settings.near_selection:
            observed = trial.another(True)
        found = distances(trial.engine, (trial.sequence, observed), trial.following, exact)
        steps = len(trial.following) + len(exact.attention)
        return Measured(steps, found.kl, _rounded(asdict(found)))


def _rounded(value: Any) -> Any:
    """Numbers with five digits: rows of many heads stay short."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value


@dataclass(frozen=True)
class Throughput(TextTask):
    """Tokens a second of several sequences that have read the same text, decoded together."""

    name: str = "throughput"
    batches: tuple[int, ...] = (1, 2, 4)
    following_tokens: int = 8

    metric = THROUGHPUT

    def measure(self, trial: Trial, exact: ExactRun | str | None) -> Measured:  # noqa: ARG002
        """Until a batch does not fit memory."""
        found: dict[int, float] = {}
        start = trial.sequence.mark()
        sequences = [trial.sequence]
        try:
            for batch in self.batches:
                while len(sequences) < batch:
                    sequences.append(trial.another(False))
                found[batch] = self._rate(trial, sequences)
        except OutOfMemoryError as error:
            if not found:
                raise
            return Measured(self._steps, None, {"stopped": str(error)}, found)
        finally:
            trial.sequence.rewind(start)
            for each in sequences[1:]:
                each.close()
        return Measured(self._steps, None, {}, found)

    @property
    def _steps(self) -> int:
        return self.following_tokens * len(self.batches)

    def _rate(self, trial: Trial, sequences: list[Sequence]) -> float:
        steps = [[token] * len(sequences) for token in trial.following]
        marks = [each.mark() for each in sequences]
        for token in steps[:WARM_UP_STEPS]:
            trial.engine.step(sequences, token)
        started = time.perf_counter()
        for token in steps[WARM_UP_STEPS:]:
            logits = trial.engine.step(sequences, token)
        int(logits.argmax())  # waits for a GPU
        seconds = time.perf_counter() - started
        for each, mark in zip(sequences, marks, strict=True):
            each.rewind(mark)
        return len(sequences) * (len(steps) - WARM_UP_STEPS) / seconds


TASKS = (Perplexity(), DistancesTask(), Throughput())

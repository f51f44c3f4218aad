"""Contenders: the engine under a policy, or transformers with its cache near or on the host.

All do the same work: the same model with the same random (or real) weights, contexts of the same
random keys and values, the same batch. One `work` is one decode step of the batch, or the reading
of one prompt, and the device is idle when it returns.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Literal

import torch

from nearfar.config import EngineConfig, generator_seed
from nearfar.errors import InvalidOptionError
from nearfar.evaluation import bandwidth
from nearfar.evaluation.rivals import TransformersRun
from nearfar.evaluation.shapes import shape_config
from nearfar.evaluation.synthetic import random_context
from nearfar.runtime.engine.accounting import memory_errors, peak_gpu_bytes, peak_rss_bytes
from nearfar.runtime.engine.engine import Engine
from nearfar.runtime.engine.prepared import prepare
from nearfar.runtime.memory.sequence import Sequence
from nearfar.runtime.steps.prefill import prefill
from nearfar.runtime.steps.timeline import Timeline

RIVALS = ("transformers-gpu", "transformers-offloaded")
WARM_UP_STEPS = 3  # the first steps compile kernels and fill caches
TRACED_STEPS = 4


@dataclass(frozen=True)
class Task:
    """The task of every contender; ``model`` names a shape if ``random``, else a model to load."""

    what: Literal["decode", "prefill"]
    model: str
    random: bool
    context_tokens: int
    batch: int
    steps: int
    config: EngineConfig

    @property
    def total_tokens(self) -> int:
        """Length of the longest sequence."""
        if self.what == "prefill":
            return self.context_tokens
        return self.context_tokens + 2 * WARM_UP_STEPS + self.steps + TRACED_STEPS


class Contender(ABC):
    """One way of doing the task."""

    @abstractmethod
    def work(self) -> None:
        """Do it once; the device is idle afterwards."""

    @abstractmethod
    def memory(self) -> dict[str, int]:
        """Bytes, by kind."""

    def clear(self) -> None:  # noqa: B027  most leave nothing behind
        """Free the memory of the last `work` before the next; not part of its time."""

    def far_bytes_read(self) -> float | None:
        """Of far rows, per sequence, since the contender was made; None where it has none."""
        return None

    def trace(self) -> Timeline | None:
        """Stages of one step, or None if they cannot be separated."""
        return None


def open_engine(task: Task, config: EngineConfig) -> Engine:
    """The engine of a task."""
    if task.random:
        model = shape_config(task.model, task.total_tokens)
        reads = task.what == "prefill"
        sizes = {"context_tokens": task.total_tokens, "sequences": task.batch}
        return Engine.random(model, config, **sizes, reads=reads)
    return Engine.from_prepared(prepare(task.model), config, context_tokens=task.total_tokens)


def open_contender(task: Task, name: str) -> Contender:
    """The contender ``name``, ready to work: one of RIVALS, or a policy.

    Raises InvalidOptionError for a rival that needs a GPU where there is none.
    """
    if name in RIVALS:
        return _TheirDecoding(task, name) if task.what == "decode" else _TheirReading(task, name)
    config = task.config.replace(policy=name)
    engine = open_engine(task, config)
    return OurDecoding(task, engine) if task.what == "decode" else OurReading(task, engine)


class _Ours(Contender):
    def __init__(self, task: Task, engine: Engine) -> None:
        self.task, self.engine = task, engine
        self.sequences: list[Sequence] = []

    def memory(self) -> dict[str, int]:
        """Near, far, index, weights and peaks."""
        report = self.engine.report_of(self.sequences)
        return {name: int(value) for name, value in vars(report).items()}


class OurDecoding(_Ours):
    """Steps of a batch whose contexts are random."""

    def __init__(self, task: Task, engine: Engine) -> None:
        super().__init__(task, engine)
        with memory_errors():
            self.sequences = [
                random_context(engine, task.context_tokens, seed=b) for b in range(task.batch)
            ]
            for _ in range(WARM_UP_STEPS):
                self.work()
        self._read_before = self._read()

    def work(self) -> None:
        """One token of every sequence."""
        self.engine.step(self.sequences, [1 + b for b in range(self.task.batch)])

    def far_bytes_read(self) -> float:
        """Of far rows, all steps since warm-up."""
        return self._read() - self._read_before

    def trace(self) -> Timeline | None:
        """Stages of a step that comes after a few of the same kind."""
        if not self.engine.traces:
            return None
        for _ in range(TRACED_STEPS):
            _, timeline = self.engine.traced_step(self.sequences, [1] * self.task.batch)
        return timeline

    def _read(self) -> float:
        return sum(sequence.far.bytes_read for sequence in self.sequences) / self.task.batch


class OurReading(_Ours):
    """Reads of a random prompt into an empty sequence, near and far memory and index filled."""

    def __init__(self, task: Task, engine: Engine) -> None:
        super().__init__(task, engine)
        self._tokens = _prompt(task, engine)
        with memory_errors():
            self._read(self._tokens[: min(2048, len(self._tokens))])
        self.clear()

    def work(self) -> None:
        """Read the prompt."""
        self._read(self._tokens)

    def clear(self) -> None:
        """Give back the last prompt's far memory."""
        for sequence in self.sequences:
            sequence.close()
        self.sequences = []

    def _read(self, tokens: torch.Tensor) -> None:
        self.sequences = [self.engine.new_sequence()]
        with memory_errors():
            engine = self.engine
            engine.hands.run(
                prefill, engine.decoder, self.sequences[0], tokens, engine.chunk_tokens
            )
        bandwidth.synchronise(self.engine.decoder.device)


class _Theirs(Contender):
    def __init__(self, task: Task, name: str) -> None:
        config = task.config.replace(policy="full", near_memory_bytes=None)
        self.engine = open_engine(replace(task, context_tokens=1), config)
        self.task, self.device = task, self.engine.decoder.device
        if self.device.type != "cuda":
            raise InvalidOptionError(
                f"{name} needs a CUDA GPU, and none is used here. Leave it out of --against."
            )
        self.run = TransformersRun(self.engine.decoder, offloaded=name.endswith("offloaded"))

    def memory(self) -> dict[str, int]:
        """Only peaks: transformers does not report the size of its cache."""
        gpu = peak_gpu_bytes(self.device)
        return {"peak_rss_bytes": peak_rss_bytes(), "peak_gpu_bytes": gpu}


class _TheirDecoding(_Theirs):
    def __init__(self, task: Task, name: str) -> None:
        super().__init__(task, name)
        with memory_errors():
            self.run.fill(task.context_tokens, task.batch)
            torch.cuda.reset_peak_memory_stats(self.device)  # of decoding, not of being filled
            self._tokens = torch.ones(task.batch, dtype=torch.int64, device=self.device)
            for _ in range(WARM_UP_STEPS - 1):
                self.work()

    def work(self) -> None:
        """One token of every sequence."""
        self.engine.hands.run(self.run.decode, self._tokens)
        bandwidth.synchronise(self.device)


class _TheirReading(_Theirs):
    def __init__(self, task: Task, name: str) -> None:
        super().__init__(task, name)
        self._tokens = _prompt(task, self.engine)
        with memory_errors():
            self.run.read(self._tokens[: min(2048, len(self._tokens))])

    def clear(self) -> None:
        """Drop the last prompt's cache."""
        self.run.forget()

    def work(self) -> None:
        """Read the prompt into an empty cache."""
        with memory_errors():
            self.engine.hands.run(self.run.read, self._tokens)
        bandwidth.synchronise(self.device)


def _prompt(task: Task, engine: Engine) -> torch.Tensor:
    generator = torch.Generator().manual_seed(generator_seed(task.config.seed))
    vocabulary = engine.model_config.vocab_size
    ids = torch.randint(vocabulary, (task.context_tokens,), generator=generator)
    return ids.to(engine.decoder.device)

"""One answer under one policy, timed token by token."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch

from nearfar.config import SamplingConfig
from nearfar.runtime.engine.accounting import memory_errors
from nearfar.runtime.engine.engine import Engine
from nearfar.runtime.engine.generation import check_room
from nearfar.runtime.engine.sampling import Sampler
from nearfar.runtime.memory.sequence import Sequence
from nearfar.runtime.steps.prefill import prefill


@dataclass(frozen=True)
class Answered:
    """Tokens and their times."""

    token_ids: tuple[int, ...]
    first_token_seconds: float
    step_seconds: tuple[float, ...]  # of each further token
    far_bytes_read_per_token: float

    @property
    def step_ms(self) -> tuple[float, float, float] | None:
        """p20, p50 and p80 of decoding a token; None of an answer of one token."""
        if not self.step_seconds:
            return None
        p20, p50, p80 = np.percentile(self.step_seconds, (20, 50, 80)) * 1000
        return float(p20), float(p50), float(p80)


def answer(
    engine: Engine,
    sequence: Sequence,
    prompt: tuple[list[int], list[int]],
    max_new_tokens: int,
) -> Answered:
    """Continue after the context of ``sequence``, with the most likely token at each step.

    ``prompt`` has two parts: ids that are read with exact attention over the kept keys, and at
    least one id that goes through the policy; such ids are decoded one by one.
    """
    read, stepped = prompt
    decoder = engine.decoder
    check_room(decoder, sequence.tokens, len(read) + len(stepped) + max_new_tokens)
    stop = frozenset(engine.tokenizer.eos_token_ids) | set(engine.model_config.eos_token_ids)
    with memory_errors():
        started = time.perf_counter()
        if read:
            ids = torch.tensor(read, device=decoder.device)
            prefill(decoder, sequence, ids, engine.chunk_tokens)
        far_bytes_before = sequence.far.bytes_read
        tokens, clock = _drawn(engine, sequence, stepped, max_new_tokens, stop)
    steps = len(stepped) + len(clock) - 1
    return Answered(
        tuple(tokens),
        clock[0] - started,
        tuple(np.diff(clock).tolist()),
        (sequence.far.bytes_read - far_bytes_before) / steps,
    )


def _drawn(
    engine: Engine,
    sequence: Sequence,
    stepped: list[int],
    max_new_tokens: int,
    stop: frozenset[int],
) -> tuple[list[int], list[float]]:
    """Tokens that follow ``stepped``, less the one that stops, and when each was drawn."""
    sampler = Sampler(SamplingConfig())
    tokens: list[int] = []
    clock: list[float] = []
    waiting = list(stepped)
    while waiting:
        logits = engine.step([sequence], [waiting.pop(0)])
        if waiting:
            continue
        token = sampler.sample(logits[0])
        clock.append(time.perf_counter())
        if token not in stop:
            tokens.append(token)
            if len(tokens) < max_new_tokens:
                waiting.append(token)
    return tokens, clock

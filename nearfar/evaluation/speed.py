"""Speed of decoding and of prefill, beside what the machine allows.

The ceiling comes first: the time that reading the weights and the chosen keys (decode), or the
matrix products (prefill), takes at the rates measured here by `bandwidth`. Selecting, merging and
sampling are not in it; they are ours to make small. Seconds and bytes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence as Several
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from nearfar.config import Budget, EngineConfig
from nearfar.errors import ContextTooLongError, InvalidOptionError
from nearfar.evaluation import bandwidth
from nearfar.policies.base import Traits
from nearfar.records import Geometry
from nearfar.runtime.engine import Engine
from nearfar.runtime.model_config import ModelConfig
from nearfar.runtime.prefill import prefill
from nearfar.runtime.results import MemoryReport
from nearfar.runtime.sequence import Sequence

WARM_UP_STEPS = 3  # the first steps compile kernels and fill caches


@dataclass(frozen=True)
class Timing:
    """Seconds of a step: the median, and the steps at one and four fifths."""

    median_seconds: float
    p20_seconds: float
    p80_seconds: float


@dataclass(frozen=True)
class Traffic:
    """Bytes that one decoded token must read."""

    weight_bytes: int
    near_bytes: int
    far_bytes: int


@dataclass(frozen=True)
class DecodeCeiling:
    """The least time of a token. Near and far overlap where they are different memories."""

    traffic: Traffic
    sequential_bytes_per_second: float  # where near lives
    gather_bytes_per_second: float  # of far rows
    overlap: bool

    @property
    def seconds(self) -> float:
        """Of one token."""
        near = self.traffic.weight_bytes + self.traffic.near_bytes
        near_seconds = near / self.sequential_bytes_per_second
        far_seconds = self.traffic.far_bytes / self.gather_bytes_per_second
        return max(near_seconds, far_seconds) if self.overlap else near_seconds + far_seconds


@dataclass(frozen=True)
class PrefillCeiling:
    """The least time of a prompt: its matrix products at the rate of the largest of them."""

    flops: float
    flops_per_second: float

    @property
    def seconds(self) -> float:
        """Of the whole prompt."""
        return self.flops / self.flops_per_second


@dataclass(frozen=True)
class DecodeSpeed:
    """What a decoded token took."""

    ceiling: DecodeCeiling
    timing: Timing
    far_bytes_read_per_token: float
    memory: MemoryReport


@dataclass(frozen=True)
class PrefillSpeed:
    """What reading a prompt took."""

    ceiling: PrefillCeiling
    timing: Timing
    memory: MemoryReport


def summarise(samples: Several[float]) -> Timing:
    """Median and spread of seconds."""
    median, p20, p80 = (float(np.percentile(samples, share)) for share in (50, 20, 80))
    return Timing(median, p20, p80)


def decode_traffic(
    model: ModelConfig, traits: Traits, config: EngineConfig, context_tokens: int, item_bytes: int
) -> Traffic:
    """Bytes that a token at ``context_tokens`` reads, in a near type of ``item_bytes``.

    Of the embedding table only a row is read, unless it is the output projection too. A selecting
    policy reads its budget, in rows of the far type.
    """
    parameters = model.parameter_count()
    if not model.tied_embeddings:
        parameters -= model.vocab_size * model.hidden_size
    always_near = min(context_tokens, config.sinks + config.window)
    rest = context_tokens - always_near
    near, far = context_tokens, 0
    if traits.keeps_far:
        near = always_near
        far = rest if traits.kind == "exact" else Budget(config.budget).keys(rest)
    elif traits.kind == "evicts":
        near = always_near + Budget(config.budget).keys(rest)
    far_item_bytes = getattr(torch, config.far_dtype).itemsize
    return Traffic(
        parameters * item_bytes,
        near * _row_items(model.geometry) * item_bytes,
        far * _row_items(model.geometry) * far_item_bytes,
    )


def _row_items(geometry: Geometry) -> int:
    """Numbers in the keys and values of a token, all layers."""
    return geometry.layers * geometry.kv_heads * 2 * geometry.head_dim


def prefill_flops(model: ModelConfig, tokens: int) -> float:
    """Operations of a prompt: products with the weights, and causal attention."""
    weights = model.parameter_count() - model.vocab_size * model.hidden_size * (
        1 if model.tied_embeddings else 2
    )
    attention = 2.0 * model.layers * model.query_heads * model.head_dim * tokens**2
    return 2.0 * weights * tokens + attention


def bench_decode(
    engine: Engine,
    context_tokens: int,
    steps: int,
    on_ceiling: Callable[[DecodeCeiling], None] | None = None,
) -> DecodeSpeed:
    """Seconds of a token after ``context_tokens``, which are random keys and values."""
    _at_least_one("context", context_tokens)
    _at_least_one("steps", steps)
    device, dtype = _place(engine)
    total = context_tokens + WARM_UP_STEPS + steps
    _require_memory(engine, total)
    far_row = 2 * engine.model_config.head_dim * getattr(torch, engine.config.far_dtype).itemsize
    traits = engine.policy.traits
    ceiling = DecodeCeiling(
        decode_traffic(engine.model_config, traits, engine.config, context_tokens, dtype.itemsize),
        bandwidth.sequential_bytes_per_second(device),
        bandwidth.gather_bytes_per_second(far_row),
        overlap=device.type != "cpu",
    )
    if on_ceiling is not None:
        on_ceiling(ceiling)
    sequence = random_context(engine, context_tokens)
    tokens = torch.randint(engine.model_config.vocab_size, (total,)).tolist()

    def step(token: int) -> None:
        engine.step([sequence], [token])

    for token in tokens[:WARM_UP_STEPS]:
        step(token)
    read_before = sequence.far_bytes_read
    samples = [_seconds(partial(step, token), device) for token in tokens[-steps:]]
    read = (sequence.far_bytes_read - read_before) / steps
    report = engine.report_of([sequence])
    sequence.close()
    return DecodeSpeed(ceiling, summarise(samples), read, report)


def random_context(engine: Engine, tokens: int) -> Sequence:
    """A sequence that holds ``tokens`` of normal keys and values, as if it had read them."""
    device, dtype = _place(engine)
    sequence, geometry = engine.new_sequence(), engine.model_config.geometry
    generator = torch.Generator(device).manual_seed(engine.config.seed)
    shape = (geometry.kv_heads, tokens, geometry.head_dim)
    received = None
    if engine.policy.traits.needs_attention:
        received = torch.ones(geometry.query_heads, tokens, device=device)
    for layer in range(geometry.layers):
        keys, values = (
            torch.empty(shape, dtype=dtype, device=device).normal_(generator=generator)
            for _ in range(2)
        )
        sequence.absorb_prompt(layer, keys, values, received)
    sequence.finish_step(tokens)
    return sequence


def bench_prefill(
    engine: Engine,
    context_tokens: int,
    repeats: int,
    on_ceiling: Callable[[PrefillCeiling], None] | None = None,
) -> PrefillSpeed:
    """Seconds of reading ``context_tokens`` random tokens, near and far memory and index filled."""
    _at_least_one("context", context_tokens)
    _at_least_one("repeats", repeats)
    model, (device, dtype) = engine.model_config, _place(engine)
    _require_memory(engine, context_tokens)
    chunk = min(engine.config.chunk_tokens, context_tokens)
    product = (chunk, model.hidden_size, 2 * model.intermediate_size)
    ceiling = PrefillCeiling(
        prefill_flops(model, context_tokens),
        bandwidth.matmul_flops_per_second(product, dtype, device),
    )
    if on_ceiling is not None:
        on_ceiling(ceiling)
    tokens = torch.randint(model.vocab_size, (context_tokens,), device=device)
    runs = [_read_once(engine, tokens, chunk) for _ in range(repeats)]
    return PrefillSpeed(ceiling, summarise([seconds for seconds, _ in runs]), runs[-1][1])


def _read_once(
    engine: Engine, tokens: torch.Tensor, chunk_tokens: int
) -> tuple[float, MemoryReport]:
    """Seconds and memory of reading ``tokens`` into an empty sequence, which is then dropped."""
    sequence = engine.new_sequence()
    read = partial(prefill, engine.decoder, sequence, tokens, chunk_tokens)
    seconds = _seconds(read, tokens.device)
    report = engine.report_of([sequence])
    sequence.close()
    return seconds, report


def _place(engine: Engine) -> tuple[torch.device, torch.dtype]:
    return engine.decoder.device, engine.decoder.dtype


def _require_memory(engine: Engine, context_tokens: int) -> None:
    """Raise OutOfMemoryError if the context does not fit beside the weights, which are loaded."""
    limit = engine.model_config.max_context_tokens
    if context_tokens > limit:
        raise ContextTooLongError(
            f"The model reads at most {limit:,} tokens, and this run needs {context_tokens:,}. "
            "Lower --context."
        )
    engine.check_memory(context_tokens)


def _at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise InvalidOptionError(f"{name} must be 1 or more. Got {value}.")


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    bandwidth.synchronise(device)
    start = time.perf_counter()
    work()
    bandwidth.synchronise(device)
    return time.perf_counter() - start

"""The ceiling of the machine for decoding and prefill, and measurements beside it.

The ceiling of decoding is the time of reading weights, codes and chosen keys and of the round trips
to the host; that of prefill is the time of the matrix products. Rates are measured by `bandwidth`.
Launching, merging and sampling are not in it. Seconds and bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import numpy as np

from nearfar.config import EngineConfig
from nearfar.errors import NearfarError
from nearfar.evaluation import bandwidth
from nearfar.evaluation.contenders import Task, open_contender
from nearfar.evaluation.shapes import shape_config
from nearfar.evaluation.turns import (
    ContenderResult,
    LocalContender,
    RemoteContender,
    started,
    take_turns,
)
from nearfar.policies.base import Policy
from nearfar.policies.registry import create_policy
from nearfar.records import Geometry
from nearfar.runtime.engine.prepared import prepare
from nearfar.runtime.memory.hardware import choose_device, choose_dtype
from nearfar.runtime.memory.sequence_settings import budget_of, near_limit
from nearfar.runtime.models.plan import ModelPlan
from nearfar.runtime.steps.stepping import far_micro_batches
from nearfar.storage import FORMATS, bytes_read, group_tokens, token_bytes


@dataclass(frozen=True)
class Timing:
    """Seconds of a step: the median, and the steps at one and four fifths."""

    median_seconds: float
    p20_seconds: float
    p80_seconds: float


@dataclass(frozen=True)
class Traffic:
    """Bytes that one decode step must read; weights once, the rest for every sequence."""

    weight_bytes: int
    near_bytes: int
    index_bytes: int  # codes that are scanned where near is
    far_bytes: int

    def of_batch(self, batch: int) -> Traffic:
        """The traffic of ``batch`` such sequences that are decoded together."""
        return Traffic(
            self.weight_bytes,
            batch * self.near_bytes,
            batch * self.index_bytes,
            batch * self.far_bytes,
        )


@dataclass(frozen=True)
class DecodeCeiling:
    """The least time of a step.

    The selection needs the query, and the rest of the layer needs the rows, so the parts of one
    sequence add up. With several sequences the host may attend for one while the GPU computes the
    other: then the longer of the two counts.
    """

    traffic: Traffic
    sequential_bytes_per_second: float  # of near memory
    gather_bytes_per_second: float  # of far rows, by the host
    link_bytes_per_second: float  # from host to GPU, where the GPU fetches some of them; else 0
    handoff_seconds: float  # to the host and back, all layers; 0 where near is the host
    overlap: bool

    @property
    def near_seconds(self) -> float:
        """Of near reads."""
        traffic = self.traffic
        near = traffic.weight_bytes + traffic.near_bytes + traffic.index_bytes
        return near / self.sequential_bytes_per_second

    @property
    def far_seconds(self) -> float:
        """Of the far rows."""
        rate = self.gather_bytes_per_second + self.link_bytes_per_second
        return self.traffic.far_bytes / rate

    @property
    def seconds(self) -> float:
        """Of one step."""
        if self.overlap:
            return max(self.near_seconds, self.far_seconds)
        return self.near_seconds + self.far_seconds + self.handoff_seconds


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
class Speed:
    """A ceiling, and the result of each contender; the first is the requested one."""

    ceiling: DecodeCeiling | PrefillCeiling
    entries: tuple[ContenderResult, ...]


def summarise(samples: Sequence[float]) -> Timing:
    """Median and spread of seconds."""
    median, p20, p80 = (float(np.percentile(samples, share)) for share in (50, 20, 80))
    return Timing(median, p20, p80)


def decode_traffic(
    model: ModelPlan,
    policy: Policy,
    config: EngineConfig,
    context_tokens: int,
    item_bytes: int,
    *,
    near_selection: bool = False,
) -> Traffic:
    """Bytes that a step of one sequence at ``context_tokens`` reads, near in ``item_bytes`` each.

    Of the embedding table only a row is read, unless it is the output projection too. A selecting
    policy reads its budget, in rows of the far type; with ``near_selection`` its index is scanned
    in near memory.
    """
    parameters = model.parameter_count()
    if not model.tied_embeddings:
        parameters -= model.vocab_size * model.hidden_size
    always_near = min(context_tokens, config.sinks + config.window)
    rest = context_tokens - always_near
    near, far, index = context_tokens, 0, 0
    geometry, traits = model.geometry, policy.traits
    budget = budget_of(config, geometry, traits, item_bytes)
    if traits.keeps_far:
        near = always_near
        far = rest if traits.kind == "exact" else budget.keys(rest)
        if near_selection:
            index = policy.predict_near_index_bytes(geometry, rest)
    elif traits.kind == "evicts":
        spared = config.sinks + config.window
        near = min(context_tokens, near_limit(budget, spared, context_tokens))
    return Traffic(
        parameters * item_bytes,
        near * _row_items(geometry) * item_bytes,
        index,
        _far_bytes(geometry, config.far_dtype, far, chosen=traits.kind != "exact"),
    )


def _far_bytes(geometry: Geometry, far_dtype: str, rows: int, *, chosen: bool) -> int:
    """Bytes of ``rows`` far rows of each KV head in all layers."""
    stored = FORMATS[far_dtype]
    # selected keys are scattered: each is read with the shared part of its group
    groups = rows if chosen else math.ceil(rows / group_tokens(stored))
    head_bytes = bytes_read(stored, geometry.head_dim, rows, groups)
    return geometry.layers * geometry.kv_heads * head_bytes


def _row_items(geometry: Geometry) -> int:
    """Numbers in the keys and values of a token, all layers."""
    return geometry.layers * geometry.kv_heads * 2 * geometry.head_dim


def prefill_flops(model: ModelPlan, tokens: int) -> float:
    """Operations of a prompt: products with the weights, and causal attention."""
    weights = model.parameter_count() - model.vocab_size * model.hidden_size * (
        1 if model.tied_embeddings else 2
    )
    geometry = model.geometry
    attention = 2.0 * geometry.layers * geometry.query_heads * geometry.head_dim * tokens**2
    return 2.0 * weights * tokens + attention


def ceiling_of(task: Task) -> DecodeCeiling | PrefillCeiling:
    """The ceiling of this machine, measured now."""
    config = task.config
    model = shape_config(task.model, 1) if task.random else prepare(task.model).config
    device, _ = choose_device(config.device)
    dtype, _ = choose_dtype(config.dtype, device)
    if task.what == "prefill":
        tokens = min(task.context_tokens, 4096)
        product = (tokens, model.hidden_size, 2 * model.widest_inner_size)
        rate = bandwidth.matmul_flops_per_second(product, dtype, device)
        return PrefillCeiling(prefill_flops(model, task.context_tokens), rate)
    policy, on_gpu = create_policy(config.policy), device.type == "cuda"
    near_selection = on_gpu and policy.selects_near
    sizes = (task.context_tokens, dtype.itemsize)
    one = decode_traffic(model, policy, config, *sizes, near_selection=near_selection)
    traffic = one.of_batch(task.batch)
    far_row_bytes = token_bytes(FORMATS[config.far_dtype], model.geometry.head_dim)
    handoff = 0.0
    if on_gpu and policy.traits.keeps_far:
        handoff = bandwidth.handoff_seconds(device) * model.geometry.layers
    return DecodeCeiling(
        traffic,
        bandwidth.sequential_bytes_per_second(device),
        bandwidth.gather_bytes_per_second(far_row_bytes),
        # a batch in two lanes leaves all far rows to the host
        bandwidth.link_bytes_per_second(device)
        if near_selection and far_micro_batches(task.batch) == 1
        else 0.0,
        handoff,
        overlap=on_gpu and far_micro_batches(task.batch) > 1,
    )


def measure(
    task: Task,
    against: Sequence[str] = (),
    on_ceiling: Callable[[DecodeCeiling | PrefillCeiling], None] = lambda _: None,
    on_round: Callable[[int, int], None] = lambda *_: None,
) -> Speed:
    """Measure ``task`` under its own policy and, in turns with it, ``against`` others.

    Without others the work is done in this process. A rival that cannot run becomes an entry with
    the reason; an engine that cannot run is an error.
    """
    ceiling = ceiling_of(task)
    on_ceiling(ceiling)
    own = ContenderResult(task.config.policy)
    if not against:
        take_turns([(own, LocalContender(open_contender(task, own.name)))], task.steps, on_round)
        return Speed(ceiling, (own,))
    entries = [own, *(ContenderResult(name) for name in against)]
    with ExitStack() as stack:
        # all get ready at the same time, which takes each of them much longer than a turn
        remotes = [
            (entry, stack.enter_context(started(_as(task, entry, own), entry.name)))
            for entry in entries
        ]
        contenders: list[tuple[ContenderResult, LocalContender | RemoteContender]] = []
        for entry, remote in remotes:
            try:
                remote.ready()
                contenders.append((entry, remote))
            except NearfarError as error:
                entry.error = str(error)
        if own.error is not None:
            raise NearfarError(own.error)
        take_turns(contenders, task.steps, on_round)
    return Speed(ceiling, tuple(entries))


def _as(task: Task, entry: ContenderResult, own: ContenderResult) -> Task:
    """The task for a contender: the cap on near memory is for the user's own choice alone."""
    if entry is own:
        return task
    return replace(task, config=task.config.replace(near_memory_bytes=None))

"""The step that a GPU captures, taken launch by launch: in Triton's interpreter without a GPU.

There the host answers where a stream would wait, so all but the flags and the graph is the same.
"""

from __future__ import annotations

import gc
import itertools
import weakref
from functools import partial
from typing import Any

import pytest
import torch
from tiny_engine import DEVICE, changed, read, tiny_config, tiny_engine, tokens

from nearfar.gpu_kernels.fetch_attention import attend_fetched
from nearfar.lsh import near_sketch
from nearfar.runtime.engine.engine import Engine
from nearfar.runtime.memory import far_state
from nearfar.runtime.models.plan import ModelPlan
from nearfar.runtime.steps.gpu.fetch_balance import FIRST
from nearfar.runtime.steps.stepping import Stepper
from nearfar.runtime.steps.timeline import STAGES

pytestmark = pytest.mark.slow  # each step is interpreted
close = partial(torch.testing.assert_close, rtol=2e-4, atol=2e-4)
FULL_BUDGET = 100_000
POLICIES = ["full", "full-far", "sketch", "sketch:per=head:bits=2", "topk-oracle", "lsh-tables"]


def by_micro_batches(model: ModelPlan | None = None, **settings: Any) -> Engine:
    engine = tiny_engine(model, **settings)
    engine._stepper = Stepper(engine.decoder, 1, by_micro_batches=True)
    return engine


def decode(engine: Engine, sequences: list[Any], ids: torch.Tensor) -> torch.Tensor:
    return torch.stack([engine.step(sequences, [one] * len(sequences)) for one in ids.tolist()])


@pytest.mark.parametrize("policy", POLICIES)
def test_a_budget_above_the_length_is_exact(policy: str) -> None:
    prompt, answer = tokens(70), tokens(6, seed=1)
    exact = tiny_engine(policy="full")
    want = decode(exact, [read(exact, prompt)], answer)
    engine = by_micro_batches(policy=policy, budget=FULL_BUDGET)
    sequence = read(engine, prompt)
    close(decode(engine, [sequence], answer), want)
    assert sequence.tokens == 76
    if sequence.policy.traits.keeps_far and "lsh" not in policy:
        assert sequence.far.rows_read >= 6 * 2 * 2 * 62


@pytest.mark.parametrize("policy", ["full", "sketch"])
@pytest.mark.parametrize("batch", [2, 3])
def test_a_ragged_batch_equals_each_alone(policy: str, batch: int) -> None:
    engine = by_micro_batches(policy=policy, budget=FULL_BUDGET)
    prompts = [tokens(length, seed=length) for length in (57, 3, 91)][:batch]
    answer = tokens(4, seed=1)
    together = decode(engine, [read(engine, prompt) for prompt in prompts], answer)
    exact = tiny_engine(policy="full")
    for number, prompt in enumerate(prompts):
        close(together[:, number], decode(exact, [read(exact, prompt)], answer)[:, 0])


@pytest.mark.parametrize("policy", ["full-far", "sketch"])
def test_tokens_that_leave_the_window_are_still_read(
    policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(far_state, "SPILL_TOKENS", 8)
    answer = tokens(24, seed=1)
    exact = tiny_engine(tiny_config(2, 1, 8, 1), policy="full")
    want = decode(exact, [read(exact, tokens(4))], answer)
    engine = by_micro_batches(tiny_config(2, 1, 8, 1), policy=policy, budget=FULL_BUDGET)
    sequence = read(engine, tokens(4))
    close(decode(engine, [sequence], answer), want)
    assert sequence.far.store.length(0) == 16


@pytest.mark.parametrize("far_dtype", ["int4", "kivi-2"])
def test_packed_rows_are_read_by_the_host_alone(
    far_dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("these rows a GPU cannot read")

    monkeypatch.setattr("nearfar.runtime.steps.gpu.host_attention.attend_fetched", refuse)
    prompt, answer, model = tokens(700), tokens(2, seed=1), tiny_config(6, 2, 32)
    settings: dict[str, Any] = {"budget": FULL_BUDGET, "far_dtype": far_dtype}
    exact = tiny_engine(model, policy="full-far", **settings)
    want_sequence = read(exact, prompt)
    want = decode(exact, [want_sequence], answer)
    for policy in ("sketch", "full-far"):
        engine = by_micro_batches(model, policy=policy, **settings)
        sequence = read(engine, prompt)
        close(decode(engine, [sequence], answer), want)
        assert sequence.far.bytes_read == want_sequence.far.bytes_read > 0


@pytest.mark.parametrize("far_dtype", ["float32", "int8"])
@pytest.mark.parametrize("policy", ["sketch", "sketch:per=head"])
def test_what_the_gpu_fetches_itself_is_in_the_answer(
    policy: str, far_dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(near_sketch, "LEAST_SEGMENT_KEYS", 256)
    prompt, answer = tokens(700), tokens(2, seed=1)
    settings: dict[str, Any] = {"budget": FULL_BUDGET, "far_dtype": far_dtype}
    host_alone = by_micro_batches(policy="full-far", **settings)
    want = decode(host_alone, [read(host_alone, prompt)], answer)
    fetched: list[int] = []

    def counted(*given: Any) -> None:
        if DEVICE == "cpu":  # a GPU captures launches, and nothing may wait for it then
            fetched.append(int(given[3].fetched_counts.sum()))
        attend_fetched(*given)

    monkeypatch.setattr("nearfar.runtime.steps.gpu.host_attention.attend_fetched", counted)
    engine = by_micro_batches(policy=policy, **settings)
    sequence = read(engine, prompt)
    close(decode(engine, [sequence], answer), want)
    if DEVICE == "cpu":  # so small a far memory is not registered with a GPU
        rows = 2 if policy == "sketch" else 6
        assert fetched == [rows * 2 * FIRST] * 2 * 2  # of two segments of 256
    assert sequence.far.rows_read >= 2 * 2 * 2 * 690


def test_sampling_reads_about_the_budget_and_errs_little() -> None:
    prompt, answer = tokens(600), tokens(3, seed=1)
    exact = tiny_engine(policy="full")
    want = decode(exact, [read(exact, prompt)], answer)
    errors, reads = [], []
    for budget in (20, 200):
        engine = by_micro_batches(policy="sketch", budget=budget)
        sequence = read(engine, prompt)
        errors.append(float((decode(engine, [sequence], answer) - want).norm()))
        reads.append(sequence.far.rows_read / (3 * 2 * 2))
    assert errors[1] < errors[0]
    assert 12 < reads[0] < 30
    assert 170 < reads[1] < 230


def test_rewinding_and_other_sequences_are_noticed() -> None:
    engine = by_micro_batches(policy="sketch", budget=FULL_BUDGET)
    prompt, answer = tokens(80), tokens(3, seed=1)
    sequence = read(engine, prompt)
    mark = sequence.mark()
    first = decode(engine, [sequence], answer)
    other = read(engine, tokens(33, seed=5))
    decode(engine, [other], answer)
    sequence.rewind(mark)
    close(decode(engine, [sequence], answer), first)


@pytest.mark.parametrize(
    "changes",
    [
        {"mixer": {"qk_norm": True}},
        {"rope_layers": (True, False)},
        {"mixer": {"qkv_bias": True, "output_bias": True}, "mlp_bias": True},
        {"tied_embeddings": False},
    ],
    ids=str,
)
def test_families_of_models(changes: dict[str, Any]) -> None:
    model = changed(tiny_config(6, 2, 10), **changes)
    exact = tiny_engine(model, policy="full")
    prompt, answer = tokens(40), tokens(3, seed=1)
    want = decode(exact, [read(exact, prompt)], answer)
    engine = by_micro_batches(model, policy="sketch", budget=FULL_BUDGET)
    close(decode(engine, [read(engine, prompt)], answer), want)


def test_a_failure_leaves_the_engine_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = by_micro_batches(policy="topk-oracle", budget=FULL_BUDGET)
    sequence = read(engine, tokens(50))
    mark = sequence.mark()
    monkeypatch.setattr(sequence.far, "select", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        engine.step([sequence], [1])
    monkeypatch.undo()
    sequence.rewind(mark)
    exact = tiny_engine(policy="full")
    want = exact.step([read(exact, tokens(50))], [1])
    close(engine.step([sequence], [1]), want)
    assert DEVICE in ("cpu", "cuda")


@pytest.mark.parametrize("policy", ["full", "sketch"])
def test_a_traced_step_is_a_step_with_a_timeline(policy: str) -> None:
    engine = by_micro_batches(policy=policy, budget=FULL_BUDGET)
    sequence = read(engine, tokens(70))
    mark = sequence.mark()
    want = engine.step([sequence], [3])
    sequence.rewind(mark)
    logits, timeline = engine._stepper.traced_step([sequence], [3])
    close(logits, want)
    stages = timeline.seconds_by_stage()
    far = {"attend_far"} if policy == "sketch" else set()
    assert set(stages) == {"embed", *STAGES, "logits", *far}
    assert all(seconds >= 0 for seconds in stages.values())
    events = [e for e in timeline.events if e.processor == "GPU"]
    assert len(events) == 2 + 2 * len(STAGES)
    assert all(a.stop_ns == b.start_ns for a, b in itertools.pairwise(events))
    assert (timeline.handoff_seconds() is None) == (policy == "full")


@pytest.mark.parametrize("policy", ["full", "full-far", "sketch", "lsh-tables:num_tables=20"])
def test_what_is_let_go_is_gone_at_once(policy: str) -> None:
    """Near rows, codes and tables of a long context are gigabytes: they cannot wait for a cycle."""
    engine = by_micro_batches(policy=policy)
    was_on = gc.isenabled()
    gc.disable()
    try:
        sequence = read(engine, tokens(90))
        decode(engine, [sequence], tokens(2, seed=1))
        gone, micro_batches = weakref.ref(sequence), weakref.ref(engine._stepper._micro_batches)
        del sequence
        assert gone() is None
        engine._stepper.close()
        assert micro_batches() is None
    finally:
        if was_on:
            gc.enable()

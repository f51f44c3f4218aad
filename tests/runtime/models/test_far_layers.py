"""A model in which only some layers attend: stores and policies count those alone."""

from __future__ import annotations

import dataclasses
from functools import partial

import pytest
import torch
from specs import tiny_specs
from tiny_engine import decode, dense_logits, read, tiny_config, tiny_engine, tokens

from nearfar.policies.registry import policy_names
from nearfar.runtime.models.plan import LayerPlan, ModelPlan
from nearfar.runtime.models.weights import model_layout, random_weights
from nearfar.runtime.steps.stepping import Stepper

close = partial(torch.testing.assert_close, rtol=2e-4, atol=2e-4)


def sparse_plan() -> ModelPlan:
    """Five layers: the second attends, the fourth does all, the others are feed-forwards alone."""
    plan = tiny_config(layers=2)
    both = plan.layers[0]
    attends = dataclasses.replace(both, feed_forward=None)
    passes = LayerPlan(None, both.feed_forward)
    return dataclasses.replace(plan, layers=(passes, attends, passes, both, passes))


def test_the_plan_counts_layers_with_far_rows_apart() -> None:
    plan = sparse_plan()
    assert plan.far_layers == (1, 3)
    assert plan.geometry.layers == 2
    assert len(plan.layers) == 5
    shapes = {name: parts for name, parts in model_layout(plan).items() if "layers" in name}
    assert "layers.0.qkv" not in shapes
    assert "layers.1.gate_up" not in shapes
    weights = random_weights(plan, torch.float32, torch.device("cpu"))
    assert sum(tensor.numel() for tensor in weights.values()) == plan.parameter_count()


@pytest.mark.parametrize("policy", ["full", "full-far", "sketch", "topk-oracle"])
def test_prompts_and_steps_equal_the_model_dense_logits(policy: str) -> None:
    engine = tiny_engine(sparse_plan(), policy=policy, budget=100_000, chunk_tokens=16)
    ids = tokens(90)
    want = dense_logits(engine, ids)
    sequence = read(engine, ids[:50])
    close(decode(engine, sequence, ids[50:80]), want[50:80])
    read(engine, ids[80:], sequence)
    assert sequence.layers[1].held_tokens == 90


@pytest.mark.parametrize("spec", tiny_specs(policy_names()))
def test_every_policy_steps_and_rewinds(spec: str) -> None:
    engine = tiny_engine(sparse_plan(), policy=spec, budget=16)
    sequence = read(engine, tokens(120))
    mark = sequence.mark()
    first = decode(engine, sequence, tokens(70, seed=1))
    sequence.rewind(mark)
    assert torch.equal(decode(engine, sequence, tokens(70, seed=1)), first)


@pytest.mark.parametrize("policy", ["full", "full-far"])
def test_the_launches_of_a_gpu_step_do_the_same(policy: str) -> None:
    plan, settings = sparse_plan(), {"policy": policy, "budget": 100_000}
    plain, micro_batches = tiny_engine(plan, **settings), tiny_engine(plan, **settings)
    micro_batches._stepper = Stepper(micro_batches.decoder, 1, by_micro_batches=True)
    want = decode(plain, read(plain, tokens(20)), tokens(2, seed=1))
    close(decode(micro_batches, read(micro_batches, tokens(20)), tokens(2, seed=1)), want)


def test_memory_is_planned_for_the_layers_that_keep_rows() -> None:
    sparse, dense = tiny_engine(sparse_plan(), policy="full-far"), tiny_engine(policy="full-far")
    assert sparse.plan(2000).far_bytes == dense.plan(2000).far_bytes
    assert sparse.plan(2000).weight_bytes == sum(
        tensor.nbytes for tensor in sparse.decoder.weights.values()
    )

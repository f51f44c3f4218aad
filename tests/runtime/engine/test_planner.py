from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import torch
from specs import tiny_specs
from tiny_engine import VOCABULARY, decode, read, tiny_config, tiny_engine, tokens

from nearfar.config import GIB, EngineConfig
from nearfar.errors import InvalidOptionError, OutOfMemoryError
from nearfar.policies.registry import create_policy, policy_names
from nearfar.runtime.engine.engine import Engine
from nearfar.runtime.engine.planning import planner
from nearfar.runtime.engine.planning.memory_plan import CONTEXT_BYTES, MemoryPlan, plan_memory
from nearfar.runtime.engine.planning.memory_setup import MemorySetup
from nearfar.runtime.engine.planning.planner import check_plan
from nearfar.runtime.memory.far_state import SPILL_TOKENS
from nearfar.runtime.memory.sequence_settings import budget_of
from nearfar.runtime.models.weights import total_bytes

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")
PLAN = MemoryPlan(
    context_tokens=1000,
    weight_bytes=4 * GIB,
    near_kv_bytes=GIB,
    prefill_bytes=GIB,
    far_bytes=8 * GIB,
    index_bytes=2 * GIB,
)
NEAR_PARTS = "weights 4.00 GiB, near keys and values 1.00 GiB, reading the prompt 1.00 GiB"
FAR_PARTS = "far keys and values 8.00 GiB, index 2.00 GiB"
NEAR_REMEDY = "Raise --near-memory, choose a smaller model or --dtype, or give a shorter text."
FAR_REMEDY = (
    "Raise --far-memory, choose a smaller --far-dtype or a policy that keeps less, or give a "
    "shorter text."
)
HOST_REMEDY = (
    "Choose a smaller model, --dtype or --far-dtype or a policy that keeps less, or give a shorter "
    "text."
)


def refusal(
    monkeypatch: pytest.MonkeyPatch,
    host: float,
    gpu: float | None = None,
    **caps: Any,
) -> str | None:
    """What is said about PLAN with ``host`` and ``gpu`` GiB free; None: it fits."""
    monkeypatch.setattr(planner, "available_memory_bytes", lambda: int(host * GIB))
    if gpu is not None:
        free = (int(gpu * GIB), 80 * GIB)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: free)
    try:
        check_plan(PLAN, EngineConfig(**caps), CPU if gpu is None else CUDA)
    except OutOfMemoryError as error:
        return str(error)
    return None


def said(tier: str, need: str, parts: str, have: str, remedy: str) -> str:
    return f"Not enough {tier} memory: {need} needed ({parts}), {have} there. {remedy}"


def test_plan_that_fits_is_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert refusal(monkeypatch, host=16) is None
    exactly: dict[str, int] = {"near_memory_bytes": 6 * GIB, "far_memory_bytes": 10 * GIB}
    assert refusal(monkeypatch, host=16, **exactly) is None
    assert refusal(monkeypatch, host=10, gpu=6) is None


def test_near_cap(monkeypatch: pytest.MonkeyPatch) -> None:
    want = said("near", "6.00 GiB", NEAR_PARTS, "5.50 GiB", NEAR_REMEDY)
    cap = int(5.5 * GIB)
    assert refusal(monkeypatch, host=100, near_memory_bytes=cap) == want
    assert refusal(monkeypatch, host=100, gpu=80, near_memory_bytes=cap) == want
    assert refusal(monkeypatch, host=100, gpu=5.5) == want
    assert refusal(monkeypatch, host=100, gpu=5.5, near_memory_bytes=9 * GIB) == want


def test_far_cap(monkeypatch: pytest.MonkeyPatch) -> None:
    want = said("far", "10.00 GiB", FAR_PARTS, "9.00 GiB", FAR_REMEDY)
    for gpu in (None, 80):
        assert refusal(monkeypatch, host=100, gpu=gpu, far_memory_bytes=9 * GIB) == want
        assert refusal(monkeypatch, host=9, gpu=gpu, far_memory_bytes=90 * GIB) == want


def test_host_holds_both_where_near_is_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = f"{NEAR_PARTS}, {FAR_PARTS}"
    want = said("host", "16.00 GiB", parts, "15.00 GiB", HOST_REMEDY)
    assert refusal(monkeypatch, host=15) == want
    assert refusal(monkeypatch, host=15, gpu=6) is None


def test_sums() -> None:
    assert PLAN.near_bytes == 6 * GIB
    assert PLAN.host_bytes == 10 * GIB


@pytest.mark.parametrize("policy", tiny_specs(policy_names()))
def test_prediction_is_what_is_held(policy: str) -> None:
    """Keys and values near (at their most), far, and the index."""
    engine = tiny_engine(policy=policy, budget=300, window=30, far_dtype="bfloat16")
    sequence = read(engine, tokens(1950))
    if not engine.policy.traits.evicts_once:  # what comes after the prompt adds to what they keep
        decode(engine, sequence, tokens(SPILL_TOKENS - 1))
    plan = engine.plan(sequence.tokens)
    assert plan.near_kv_bytes == pytest.approx(sequence.near_bytes, rel=0.05)
    assert plan.far_bytes == pytest.approx(sequence.far.store.num_bytes, rel=0.05)
    assert plan.index_bytes == pytest.approx(sequence.far.index_bytes, rel=0.08)  # in whole blocks
    assert plan.weight_bytes == total_bytes(engine.decoder.weights)


@pytest.mark.parametrize("policy", tiny_specs(policy_names()))
def test_short_context_is_predicted_too(policy: str) -> None:
    engine = tiny_engine(policy=policy, budget=20)
    spill_bytes = 2 * 2 * 2 * 16 * 4 * SPILL_TOKENS  # what may stay near until it spills
    for tokens_read in (1, 7, 8, 9, 100):
        sequence = read(engine, tokens(tokens_read))
        plan = engine.plan(tokens_read)
        assert 0 <= plan.near_kv_bytes - sequence.near_bytes <= spill_bytes, tokens_read
        assert plan.far_bytes == sequence.far.store.num_bytes, tokens_read


def test_a_share_as_budget_is_of_the_context() -> None:
    engine = tiny_engine(policy="h2o", budget=0.1)
    sequence = read(engine, tokens(505))
    assert engine.plan(505).near_kv_bytes == sequence.near_bytes


@pytest.mark.parametrize(
    ("changes", "part", "ratio"),
    [
        ({"far_dtype": "float32"}, "far_bytes", 2.0),
        ({"far_dtype": "float16"}, "far_bytes", 1.0),
        ({"far_dtype": "int8"}, "far_bytes", 0.5),
        ({"dtype": "float32"}, "weight_bytes", 2.0),
        ({"dtype": "float32"}, "near_kv_bytes", 2.0),
    ],
)
def test_types_scale_what_they_are_the_type_of(
    changes: dict[str, Any], part: str, ratio: float
) -> None:
    def predict(**settings: Any) -> float:
        config = EngineConfig(**{"dtype": "bfloat16", "far_dtype": "bfloat16", **settings})
        policy = create_policy("sketch")
        dtype = getattr(torch, config.dtype)
        plan = plan_memory(MemorySetup(tiny_config(), config, policy, dtype), 2000)
        return float(getattr(plan, part))

    assert predict(**changes) == ratio * predict()


@pytest.mark.parametrize(
    ("policy", "far_dtype", "row_bytes"),
    [("sketch", "bfloat16", 2), ("sketch", "int8", 1), ("streaming-llm", "int8", 4)],
)
def test_a_budget_in_bytes_is_what_a_token_reads(
    policy: str, far_dtype: str, row_bytes: int
) -> None:
    """Of far rows in their type; of near rows, here float32, under a policy that evicts."""
    engine = tiny_engine(policy=policy, far_dtype=far_dtype, budget="64KiB", dtype="float32")
    token_bytes = 2 * 2 * 2 * 16 * row_bytes
    settings = engine.new_sequence().settings
    assert settings.budget.value == 2**16 // token_bytes
    traits = engine.policy.traits
    with pytest.raises(InvalidOptionError, match="A budget of 10B is too small: one key and value"):
        budget_of(EngineConfig(budget="10B"), engine.model_config.geometry, traits, 4)
    with pytest.raises(InvalidOptionError, match="A budget of 10B is too small"):  # before it loads
        MemorySetup(tiny_config(), EngineConfig(budget="10B"), engine.policy, torch.float32)


def test_heads_too_small_for_int8_are_refused_before_anything_is_loaded() -> None:
    config = EngineConfig(far_dtype="int8")
    with pytest.raises(InvalidOptionError, match="Use --far-dtype bfloat16"):
        MemorySetup(tiny_config(head_dim=8), config, create_policy("sketch"), torch.float32)


def test_loaded_weights_are_not_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tiny_engine(near_memory_bytes=None)
    need = engine.plan(100).near_bytes + engine.plan(100).host_bytes
    weights = engine.plan(100).weight_bytes
    monkeypatch.setattr(planner, "available_memory_bytes", lambda: need - weights)
    engine.check_memory(100)
    monkeypatch.setattr(planner, "available_memory_bytes", lambda: need - weights - 1)
    with pytest.raises(OutOfMemoryError, match=re.escape("needed (near keys and values")):
        engine.check_memory(100)


def test_a_cap_counts_the_weights_that_are_loaded() -> None:
    cap = tiny_engine().plan(100).near_bytes
    tiny_engine(near_memory_bytes=cap).check_memory(100)
    with pytest.raises(OutOfMemoryError, match="Not enough near memory"):
        tiny_engine(near_memory_bytes=cap - 1).check_memory(100)


def test_a_refusal_says_how_much_would_fit() -> None:
    model, policy = tiny_config(), create_policy("full-far")
    setup = MemorySetup(model, EngineConfig(), policy, torch.float32)
    needs = [plan_memory(setup, tokens) for tokens in (700, 701)]
    cap = needs[0].near_bytes
    assert needs[1].near_bytes > cap
    config = {"policy": "full-far", "near_memory_bytes": cap, "dtype": "float32", "device": "cpu"}
    with pytest.raises(OutOfMemoryError, match=r"shorter text\. At most 700 tokens would fit\."):
        Engine.random(model, EngineConfig(**config), context_tokens=3000)  # type: ignore[arg-type]
    config["near_memory_bytes"] = 1000
    with pytest.raises(OutOfMemoryError, match=r"shorter text\. Not one token would\."):
        Engine.random(model, EngineConfig(**config), context_tokens=3000)  # type: ignore[arg-type]


def test_a_gpu_holds_a_near_index_and_what_cuda_takes() -> None:
    model = dataclasses.replace(tiny_config(), tied_embeddings=False)
    setup = MemorySetup(
        model, EngineConfig(policy="sketch"), create_policy("sketch"), torch.bfloat16
    )
    on_gpu = dataclasses.replace(setup, device=CUDA)
    here, there = plan_memory(setup, 5000), plan_memory(on_gpu, 5000)
    assert here.near_index_bytes == here.context_bytes == 0 < here.index_bytes
    assert there.index_bytes == 0 < there.near_index_bytes
    assert there.context_bytes == CONTEXT_BYTES
    table = VOCABULARY * 48 * 2
    assert there.weight_bytes == here.weight_bytes - table
    assert there.host_weight_bytes == table
    four = plan_memory(on_gpu, 5000, sequences=4)
    assert four.far_bytes == 4 * there.far_bytes
    assert four.near_index_bytes == 4 * there.near_index_bytes
    assert four.weight_bytes == there.weight_bytes

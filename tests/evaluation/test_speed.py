from __future__ import annotations

import dataclasses

import pytest
import torch
from specs import representatives

from nearfar.config import EngineConfig
from nearfar.errors import (
    OutOfMemoryError,
    UnknownNameError,
)
from nearfar.evaluation import bandwidth, contenders, shapes, speed
from nearfar.policies.registry import create_policy, policy_names
from nearfar.runtime.checkpoints.model_config import parse_config
from nearfar.runtime.engine.planning.memory_plan import plan_memory
from nearfar.runtime.engine.planning.memory_setup import MemorySetup
from nearfar.runtime.models.plan import ModelPlan

CPU = torch.device("cpu")
MIB = 2**20


def tiny(context: int = 512, **changes: object) -> ModelPlan:
    small: dict[str, object] = {
        "vocab_size": 33,
        "hidden_size": 48,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": context,
    }
    return parse_config(shapes.SHAPES["smollm2-135m"] | small | changes, "test")


@pytest.fixture(autouse=True)
def quick_bandwidth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bandwidth, "sequential_bytes_per_second", lambda _: 10e9)
    monkeypatch.setattr(bandwidth, "gather_bytes_per_second", lambda _: 2e9)
    monkeypatch.setattr(bandwidth, "matmul_flops_per_second", lambda *_: 1e9)
    for module in (speed, contenders):
        monkeypatch.setattr(module, "shape_config", lambda _, tokens: tiny(tokens))


def test_timing() -> None:
    timing = speed.summarise([5.0, 1.0, 3.0, 2.0, 4.0])
    assert timing.median_seconds == 3.0
    assert timing.p20_seconds == pytest.approx(1.8)
    assert timing.p80_seconds == pytest.approx(4.2)
    assert speed.summarise([2.0]) == speed.Timing(2.0, 2.0, 2.0)


@pytest.mark.parametrize(
    ("policy", "near_tokens", "far_tokens"),
    [
        ("full", 1000, 0),
        ("full-far", 7, 993),
        ("sketch", 7, 16),
        ("streaming-llm", 7 + 16, 0),
        ("h2o", 7 + 16, 0),
    ],
)
def test_traffic_by_kind_of_policy(policy: str, near_tokens: int, far_tokens: int) -> None:
    config = EngineConfig(budget=16, sinks=2, window=5)
    traffic = speed.decode_traffic(tiny(), create_policy(policy), config, 1000, item_bytes=4)
    token_items = 2 * 2 * 2 * 8  # layers, KV heads, key and value, head_dim
    assert traffic.near_bytes == near_tokens * token_items * 4
    assert traffic.far_bytes == far_tokens * token_items * 2  # bfloat16


@pytest.mark.parametrize("budget", [16, 0.25, "64KiB"])
def test_an_evicting_policy_reads_near_rows_as_they_are_planned(budget: float | str) -> None:
    config, policy = EngineConfig(budget=budget, sinks=2, window=5), create_policy("h2o")
    traffic = speed.decode_traffic(tiny(), policy, config, 1000, item_bytes=4)
    plan = plan_memory(MemorySetup(tiny(), config, policy, torch.float32), 1000)
    assert traffic.near_bytes == plan.near_kv_bytes
    rows = {16: 16, 0.25: 250, "64KiB": 2**16 // (2 * 2 * 2 * 8 * 4)}[budget]
    assert traffic.near_bytes == (7 + rows) * 2 * 2 * 2 * 8 * 4


def test_traffic_of_a_context_within_the_window() -> None:
    config = EngineConfig(sinks=2, window=5)
    traffic = speed.decode_traffic(tiny(), create_policy("sketch"), config, 3, 4)
    assert traffic.far_bytes == 0
    assert traffic.near_bytes == 3 * 64 * 4


def test_an_embedding_table_is_read_only_as_output_projection() -> None:
    policy, config = create_policy("full"), EngineConfig()
    tied = speed.decode_traffic(tiny(tie_word_embeddings=True), policy, config, 1, 4)
    untied = speed.decode_traffic(tiny(tie_word_embeddings=False), policy, config, 1, 4)
    assert (
        tied.weight_bytes == untied.weight_bytes == tiny(tie_word_embeddings=True).weight_bytes(4)
    )


def test_decode_ceiling_adds_or_overlaps() -> None:
    traffic = speed.Traffic(weight_bytes=80, near_bytes=15, index_bytes=5, far_bytes=30)
    apart = speed.DecodeCeiling(traffic, 10.0, 3.0, 2.0, 0.5, overlap=False)
    assert apart.seconds == pytest.approx(100 / 10 + 30 / 5 + 0.5)
    assert dataclasses.replace(apart, overlap=True).seconds == pytest.approx(10.0)


def test_a_batch_reads_weights_once_and_codes_near() -> None:
    sizes = (tiny(), create_policy("sketch"), EngineConfig(budget=16, sinks=2, window=5), 1000, 4)
    one = speed.decode_traffic(*sizes, near_selection=True)
    four = one.of_batch(4)
    assert four.weight_bytes == one.weight_bytes
    assert four.far_bytes == 4 * one.far_bytes
    assert four.index_bytes == 4 * one.index_bytes >= 4 * 993 * 2 * 2 * 16


def test_prefill_flops() -> None:
    model = tiny(tie_word_embeddings=False)
    weights = model.parameter_count() - 2 * 33 * 48
    assert speed.prefill_flops(model, 10) == 2 * weights * 10 + 2 * 2 * 6 * 8 * 100
    assert speed.PrefillCeiling(100.0, 50.0).seconds == 2.0


def task(what: str, policy: str, context: int = 101, **changes: object) -> contenders.Task:
    config = EngineConfig(
        policy=policy, budget=16, sinks=2, window=5, dtype="float32", device="cpu"
    )
    steps = 4 if what == "decode" else 2
    made = contenders.Task(what, "tiny", True, context, 1, steps, config)  # type: ignore[arg-type]
    return dataclasses.replace(made, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("policy", representatives(policy_names()))
def test_decode_of_every_kind_of_policy(policy: str) -> None:
    found: list[object] = []
    measured = speed.measure(task("decode", policy), on_ceiling=found.append)
    assert found == [measured.ceiling]
    (entry,) = measured.entries
    assert len(entry.seconds) == 4
    assert min(entry.seconds) > 0
    keeps_far = create_policy(policy).traits.keeps_far
    assert (entry.memory["far_bytes"] > 0) == keeps_far
    if not keeps_far:
        assert entry.far_bytes_read_per_step == 0
    if policy == "topk-oracle":
        assert isinstance(measured.ceiling, speed.DecodeCeiling)
        assert entry.far_bytes_read_per_step == measured.ceiling.traffic.far_bytes


def test_prefill() -> None:
    found: list[object] = []
    measured = speed.measure(task("prefill", "full-far", 37), on_ceiling=found.append)
    assert found == [measured.ceiling]
    assert len(measured.entries[0].seconds) == 2
    assert measured.entries[0].memory["far_bytes"] > 0


def test_a_batch_decodes_together() -> None:
    measured = speed.measure(task("decode", "full-far", batch=3))
    one = speed.measure(task("decode", "full-far"))
    assert measured.entries[0].memory["far_bytes"] == 3 * one.entries[0].memory["far_bytes"]
    assert measured.entries[0].far_bytes_read_per_step == one.entries[0].far_bytes_read_per_step


def test_what_does_not_fit_is_refused() -> None:
    config = task("decode", "full-far").config.replace(far_memory_bytes=1000)
    with pytest.raises(OutOfMemoryError, match="Not enough far memory"):
        speed.measure(task("decode", "full-far", 500, config=config))


def test_shapes_are_whole_models_of_the_size_they_are_named_for() -> None:
    sizes = {"smollm2-135m": 0.135, "qwen2.5-0.5b": 0.494, "llama-3.2-1b": 1.236}
    sizes |= {"llama-3.1-8b": 8.03, "qwen2.5-7b": 7.616, "qwen3-8b": 8.191, "qwen3-0.6b": 0.596}
    for name, billions in sizes.items():
        found = shapes.shape_config(name, 1).parameter_count() / 1e9
        assert found == pytest.approx(billions, abs=1e-3)
    for name in shapes.SHAPES:
        assert shapes.shape_config(name, 2**20).max_context_tokens == 2**20


def test_an_unknown_shape() -> None:
    with pytest.raises(UnknownNameError, match=r"Unknown shape 'llama-3.1-8'\. Did you mean"):
        shapes.shape_config("llama-3.1-8", 1)

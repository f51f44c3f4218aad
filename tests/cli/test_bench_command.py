from __future__ import annotations

import json
from typing import Any

import pytest
from fake_engine import nearfar

from nearfar.evaluation import bandwidth, host_speed, shapes


@pytest.fixture(autouse=True)
def small_and_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bandwidth, "sequential_bytes_per_second", lambda _: 10e9)
    monkeypatch.setattr(bandwidth, "gather_bytes_per_second", lambda _: 2e9)
    tiny = shapes.SHAPES["smollm2-135m"] | {
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "vocab_size": 50,
    }
    monkeypatch.setitem(shapes.SHAPES, "tiny", tiny)


def bench(*arguments: object) -> Any:
    options = ["--shape", "tiny", "--context", 150, "--steps", 2, "--policy", "full-far"]
    return nearfar("bench", *arguments, *options)


def test_decode_json() -> None:
    result = bench("decode", "--json")
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert record["model"] == "tiny"
    assert record["context_tokens"] == 150
    assert record["median_seconds"] > 0
    assert record["times_the_ceiling"] == pytest.approx(
        record["median_seconds"] / record["ceiling"]["seconds"]
    )
    assert record["ceiling"]["traffic"]["far_bytes"] == (150 - 68) * 2 * 2 * 8 * 2
    assert record["far_bytes_read_per_token"] > 0
    assert {"near_bytes", "far_bytes", "index_bytes", "peak_rss_bytes"} <= set(record)
    assert [entry["name"] for entry in record["contenders"]] == ["full-far"]


def test_prefill_json() -> None:
    result = bench("prefill", "--json")
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert record["tokens_per_second"] == pytest.approx(150 / record["median_seconds"])
    assert record["ceiling"]["flops"] > 0


@pytest.mark.parametrize("what", ["decode", "prefill"])
def test_the_ceiling_is_printed_first(what: str) -> None:
    result = bench(what)
    assert result.exit_code == 0, result.output
    assert 0 <= result.stdout.index("Ceiling") < result.stdout.index("Measured")
    assert "times the ceiling" in result.stdout


@pytest.mark.slow
def test_host_prints_every_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_speed, "FLUSH_BYTES", 2**12)
    tiny = shapes.SHAPES["tiny"] | {"head_dim": 16}
    monkeypatch.setitem(shapes.SHAPES, "tiny", tiny)
    arguments = ["host", "--shape", "tiny", "--context", 400, "--steps", 1, "--threads", 1]
    result = nearfar("bench", *arguments, "--json")
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert (record["num_keys"], record["budget"], record["rounds"]) == (400, 8, 1)
    assert record["geometry"]["head_dim"] == 16
    assert {kernel["storage"] for kernel in record["results"]} > {"bfloat16", "int8", "4 bits"}
    shown = nearfar("bench", *arguments, "--budget", 16)
    assert shown.exit_code == 0, shown.output
    assert "400, of which 16 are read" in shown.stdout
    assert "attend, keys of a group" in shown.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["host", "--shape", "tinny"], "Unknown shape 'tinny'. Did you mean 'tiny'?"),
        (["host", "--model", "x"], "The host kernels have no model: give --shape."),
        (["host", "--against", "sketch"], "--against of host is faiss. Got 'sketch'."),
        (["host", "--batch", "2"], "--batch, --trace and --picture are for decode."),
        (["host", "--steps", "0"], "--context, --batch and --steps must be 1 or more."),
        (["decode", "--shape", "llama-3.1-8"], "Unknown shape 'llama-3.1-8'. Did you mean"),
        (["decode", "--shape", "tiny", "--model", "x"], "Give --shape or --model, not both."),
        (["decode", "--context", "0"], "--context, --batch and --steps must be 1 or more."),
        (["decode", "--policy", "skech"], "Did you mean 'sketch'?"),
        (["decod"], "'decod' is not one of 'decode', 'prefill'"),
    ],
)
def test_mistakes(arguments: list[str], message: str) -> None:
    result = nearfar("bench", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stdout == ""

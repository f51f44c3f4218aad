from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from limits import LIMIT_SECONDS
from specs import tiny_specs
from tiny_engine import decode, dense_logits, read, tiny_config, tiny_engine, tokens

from nearfar.policies.registry import policy_names
from nearfar.runtime.engine.engine import Engine
from nearfar.runtime.models.decoder import Decoder
from nearfar.runtime.models.weights import Weights
from nearfar.runtime.steps.prefill import prefill

close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)
PEAK = Path("/proc/self/clear_refs")  # writing 5 makes the kernel find the peak anew
# Says for each policy by how many bytes the peak grew from a prompt of N tokens to one of 2 N.
# What would blur it is off: huge pages (41, 1), and a buffer as long as these short prompts.
GROWTH = """
import ctypes, sys
from pathlib import Path
import psutil
from nearfar.lsh import sketch
from nearfar.runtime.engine.accounting import peak_rss_bytes
from tiny_engine import read, tiny_config, tiny_engine, tokens

ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)
sketch.ENCODE_TOKENS = 256
N, layers = int(sys.argv[1]), int(sys.argv[2])
model = tiny_config(heads=2, kv_heads=2, head_dim=128, layers=layers, context=4 * N)

def used(policy, length):
    engine = tiny_engine(model, policy=policy, budget=64, chunk_tokens=256, threads=1)
    Path("/proc/self/clear_refs").write_text("5")
    before = psutil.Process().memory_info().rss
    read(engine, tokens(length))
    return peak_rss_bytes() - before

for policy in sys.argv[3:]:
    used(policy, N // 4)
    print(used(policy, 2 * N) - used(policy, N))
"""


@pytest.mark.parametrize("policy", ["full", "full-far", "h2o", "streaming-llm"])
@pytest.mark.parametrize("chunk_tokens", [1, 16, 37, 5000])
def test_prompt_is_read_with_exact_attention(policy: str, chunk_tokens: int) -> None:
    engine = tiny_engine(policy=policy, budget=4, chunk_tokens=chunk_tokens)
    ids = tokens(75)
    wanted = dense_logits(engine, ids)
    got = prefill(engine.decoder, engine.new_sequence(), ids, chunk_tokens)
    assert got.shape == wanted[-1].shape
    assert got.dtype == torch.float32
    close(got, wanted[-1])


@pytest.mark.parametrize("policy", ["full", "full-far", "sketch"])
def test_prompt_in_parts_is_the_prompt_as_a_whole(policy: str) -> None:
    """A question is read exactly over all of the document, also where that is far."""
    engine = tiny_engine(policy=policy, budget=8, chunk_tokens=32)
    ids = tokens(200)
    sequence = read(engine, ids[:150])
    read(engine, ids[150:151], sequence)
    got = prefill(engine.decoder, sequence, ids[151:], 32)
    close(got, dense_logits(engine, ids)[-1])


@pytest.mark.parametrize("policy", ["full", "full-far"])
def test_prompt_after_an_answer_sees_the_answer(policy: str) -> None:
    engine = tiny_engine(policy=policy)
    ids = tokens(170)
    sequence = read(engine, ids[:20])
    decode(engine, sequence, ids[20:110])
    got = prefill(engine.decoder, sequence, ids[110:], 1000)
    close(got, dense_logits(engine, ids)[-1])


def test_model_in_bfloat16_reads_about_the_same() -> None:
    engine = tiny_engine(dtype="bfloat16", far_dtype="bfloat16", policy="full-far", chunk_tokens=32)
    # the same numbers in float32: two types need not draw the same random weights
    named = engine.decoder.weights.items()
    wide = Weights((name, tensor.float()) for name, tensor in named)
    reference = Engine("float32", Decoder(engine.model_config, wide), None, engine.config)
    exact = dense_logits(reference, tokens(75))[-1]
    got = prefill(engine.decoder, engine.new_sequence(), tokens(75), 32)
    assert got.dtype == torch.float32
    close(got, exact, atol=0.15, rtol=0)


def test_progress_counts_layers() -> None:
    engine = tiny_engine(tiny_config(layers=3))
    seen: list[tuple[int, int]] = []

    def note(done: int, total: int) -> None:
        seen.append((done, total))

    prefill(engine.decoder, engine.new_sequence(), tokens(9), 4, note)
    assert seen == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.skipif(not PEAK.exists(), reason="the peak is measured by Linux")
@pytest.mark.slow
def test_peak_grows_by_one_layer_and_what_is_kept() -> None:
    """Doubling a prompt adds hidden states, one layer's keys and values, and what stays."""
    N, layers, policies = 2048, 8, ("streaming-llm", "sketch")
    done = subprocess.run(
        [sys.executable, "-c", GROWTH, str(N), str(layers), *policies],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"},  # what is freed is given back
        capture_output=True,
        text=True,
        check=False,
        timeout=LIMIT_SECONDS,
    )
    assert done.returncode == 0, done.stderr
    hidden, layer = N * 48 * 4, N * 2 * 2 * 128 * 4
    # unrotated keys, and rows on their way to where they stay: less than two more of a layer
    working = 2 * hidden + 3 * layer
    assert layers * layer > 2 * working  # so that keeping all layers would be seen
    for policy, grew in zip(policies, map(int, done.stdout.split()), strict=True):
        engine = tiny_engine(tiny_config(2, 2, 128, layers), policy=policy, budget=64)
        longer, shorter = engine.plan(2 * N), engine.plan(N)
        kept = sum(
            getattr(longer, part) - getattr(shorter, part)
            for part in ("near_kv_bytes", "far_bytes", "index_bytes")
        )
        assert kept < grew < kept + working, policy


@pytest.mark.parametrize(
    "spec", tiny_specs([name for name in policy_names() if name != "lsh-tables"])
)
def test_a_second_prompt_stands_at_the_same_distance_in_all_layers(spec: str) -> None:
    """Policies that count cache slots too: no layer may count what an earlier one took in."""
    model = tiny_config(layers=4)
    document, question = tokens(40), tokens(17, seed=1)
    exact = tiny_engine(model, policy="full")
    want = prefill(exact.decoder, read(exact, document), question, 4096)
    engine = tiny_engine(model, policy=spec, budget=1000)
    close(prefill(engine.decoder, read(engine, document), question, 4096), want)

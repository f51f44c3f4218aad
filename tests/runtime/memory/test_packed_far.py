"""Sequences whose far rows are packed: the same contract, to the bit where nothing is rounded."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from tiny_engine import decode, read, tiny_config, tiny_engine, tokens

from nearfar.policies.registry import create_policy, usable_names
from nearfar.records import Selection
from nearfar.runtime.engine.engine import Engine
from nearfar.runtime.memory.far_state import SPILL_TOKENS
from nearfar.runtime.steps.attention import groups_read
from nearfar.storage import FORMATS, token_bytes

NAMES = ["int4", "kivi-4", "kivi-2"]
SELECTING = [n for n in usable_names() if create_policy(n).traits.kind == "selects"]
PROMPT, ANSWER = 331, 2 * SPILL_TOKENS + 9
equal = partial(torch.testing.assert_close, rtol=0, atol=0)
close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)
every_name = pytest.mark.parametrize("name", NAMES)


def engine_of(name: str, **settings: object) -> Engine:
    return tiny_engine(tiny_config(6, 2, 32), far_dtype=name, **settings)


@every_name
@pytest.mark.parametrize("spec", SELECTING)
def test_every_policy_reads_what_is_packed(spec: str, name: str) -> None:
    prompt, answer = tokens(PROMPT), tokens(3, seed=1)
    exact = engine_of(name, policy="full-far")
    want = decode(exact, read(exact, prompt), answer)
    engine = engine_of(name, policy=spec, budget=100_000)
    close(decode(engine, read(engine, prompt), answer), want)
    engine = engine_of(name, policy=spec, budget=40)
    assert decode(engine, read(engine, prompt), answer).isfinite().all()


@every_name
def test_the_plan_and_the_ledger_count_packed_bytes(name: str) -> None:
    engine = engine_of(name, policy="full-far")
    sequence = read(engine, tokens(PROMPT))
    size = token_bytes(FORMATS[name], 32)
    assert sequence.far.store.token_bytes == 2 * size
    assert sequence.far.store.num_bytes == 2 * 512 * 2 * size == engine.plan(PROMPT).far_bytes
    decode(engine, sequence, tokens(2, seed=1))
    assert sequence.far.bytes_read == 2 * 2 * 2 * sequence.far.store.length(0) * size


@every_name
def test_what_does_not_fill_a_group_stays_near(name: str) -> None:
    engine = engine_of(name, policy="full-far")
    for length in (8, 9, 39, 40, 41, 72, PROMPT):
        sequence = read(engine, tokens(length))
        group = sequence.far.store.group_tokens
        assert sequence.far.store.length(0) == (length - 8) // group * group
        assert sequence.layers[0].held_tokens == length
        near = sequence.near[0].keys
        decode(engine, sequence, tokens(ANSWER, seed=1))
        assert sequence.far.store.length(0) % group == 0
        assert 8 <= sequence.near[0].length < 8 + SPILL_TOKENS
        assert near.shape[1] < 8 + group


@every_name
def test_a_short_text_is_exact(name: str) -> None:
    """As long as nothing is far nothing is rounded: KIVI with a residual above the length."""
    prompt, answer = tokens(30), tokens(20, seed=1)
    exact = engine_of("float32", policy="full")
    engine = engine_of(name, policy="full-far", window=60)
    close(decode(engine, read(engine, prompt), answer), decode(exact, read(exact, prompt), answer))


@every_name
def test_chunks_and_neighbours_make_no_difference(name: str) -> None:
    prompt, answer = tokens(PROMPT), tokens(5, seed=1)
    engine = engine_of(name, policy="full-far")
    want = decode(engine, read(engine, prompt), answer)
    for chunk_tokens in (64, 7):
        other = engine_of(name, policy="full-far", chunk_tokens=chunk_tokens)
        close(decode(other, read(other, prompt), answer), want)
    both = [read(engine, prompt), read(engine, tokens(57, seed=7))]
    steps = [engine.step(both, [token] * 2) for token in answer.tolist()]
    close(torch.stack(steps)[:, 0], want)


@every_name
def test_rewinding_is_never_having_read(name: str) -> None:
    engine = engine_of(name, policy="sketch", budget=30)
    prompt, drafted, answer = tokens(PROMPT), tokens(ANSWER, seed=1), tokens(ANSWER, seed=2)
    want = decode(engine, read(engine, prompt), answer)
    sequence = read(engine, prompt)
    mark = sequence.mark()
    for _ in range(2):
        read(engine, drafted[:40], sequence)
        decode(engine, sequence, drafted)
        sequence.rewind(mark)
    equal(decode(engine, sequence, answer), want)


def test_groups_are_counted_as_they_are_read() -> None:
    indices = torch.tensor([0, 31, 32, 40, 99, 99, 5, 64], dtype=torch.int32).numpy()
    offsets = torch.tensor([0, 5, 5, 6, 8]).numpy()
    weights = torch.zeros(8).numpy()
    # 0 | 1 | 3, nothing, 3, and 0 | 2
    assert groups_read(Selection(indices, offsets, weights, 1), 32) == 3 + 1 + 2
    nothing = Selection(indices[:0], offsets[:2] * 0, weights[:0], 1)
    assert groups_read(nothing, 32) == 0

from __future__ import annotations

from functools import partial

import pytest
import torch
from tiny_engine import decode, read, tiny_config, tiny_engine, tokens

from nearfar.runtime.steps.prefill import prefill

close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_decoding_is_reading_one_token_more() -> None:
    """Two ways through two kernels: a token at a time, and each prefix anew."""
    engine = tiny_engine(tiny_config(heads=5, kv_heads=1, head_dim=6, layers=3), policy="full")
    ids = tokens(140)
    steps = decode(engine, read(engine, ids[:3]), ids[3:])
    for length in (4, 5, 30, 139, 140):
        whole = prefill(engine.decoder, engine.new_sequence(), ids[:length], 64)
        close(steps[length - 4], whole)


def test_everything_is_near_and_in_order() -> None:
    engine = tiny_engine(policy="full", budget=1, window=1, sinks=0)
    sequence = read(engine, tokens(300))
    decode(engine, sequence, tokens(100, seed=1))
    assert {near.length for near in sequence.near} == {400}
    assert all(near.positions is near.scores is None for near in sequence.near)
    assert sequence.far.store.num_bytes == sequence.far.index_bytes == sequence.far.bytes_read == 0
    assert sequence.near_bytes == 2 * 400 * 2 * 2 * 16 * 4
    assert sequence.next_position == 400


def test_far_type_and_cap_have_nothing_to_act_on() -> None:
    ids = tokens(50, seed=1)
    plain, other = (
        tiny_engine(policy="full"),
        tiny_engine(policy="full", far_dtype="float16", far_memory_bytes=0),
    )
    got = [decode(engine, read(engine, tokens(200)), ids) for engine in (plain, other)]
    torch.testing.assert_close(got[0], got[1], rtol=0, atol=0)

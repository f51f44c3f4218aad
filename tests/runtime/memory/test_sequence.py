"""What goes where; whether attention over it is right is the policies' contract tests."""

from __future__ import annotations

import dataclasses
from functools import partial

import pytest
import torch
from tiny_engine import decode, read, tiny_engine, tokens

from nearfar.config import Budget
from nearfar.policies.base import Policy
from nearfar.policies.registry import create_policy
from nearfar.policies.streaming_llm import StreamingLLM
from nearfar.records import ALL, NONE, Geometry
from nearfar.runtime.memory.far_state import SPILL_TOKENS
from nearfar.runtime.memory.ledger import Ledger
from nearfar.runtime.memory.sequence import Sequence
from nearfar.runtime.memory.sequence_settings import SequenceSettings

GEOMETRY = Geometry(layers=2, query_heads=6, kv_heads=3, head_dim=5)
SINKS, WINDOW = 2, 4
equal = partial(torch.testing.assert_close, rtol=0, atol=0)


class RecentOnce(StreamingLLM):
    """Drops what is old after the first prompt, and never again."""

    traits = dataclasses.replace(StreamingLLM.traits, evicts_once=True)


def new_sequence(policy: str | Policy, budget: float = 6, sinks: int = SINKS) -> Sequence:
    made = create_policy(policy) if isinstance(policy, str) else policy
    place = (torch.float32, torch.device("cpu"))
    settings = SequenceSettings(
        GEOMETRY, made, Budget(budget), sinks, WINDOW, torch.float32, 2000, 0, *place
    )
    return Sequence(settings, Ledger())


def marked(start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [3, stop - start, 5] that say their token."""
    keys = torch.arange(start, stop).float()[None, :, None].expand(3, -1, 5)
    return keys, -keys


def past(sequence: Sequence, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values that the sequence holds, in order."""
    rows = torch.empty(3, sequence.layers[layer].held_tokens, 10)
    sequence.layers[layer].copy_past(rows)
    return rows[..., :5], rows[..., 5:]


def read_prompt(sequence: Sequence, count: int) -> None:
    """As prefill does: every layer takes its past and the prompt, then the step is finished."""
    for layer in range(GEOMETRY.layers):
        held = past(sequence, layer)
        new = marked(sequence.tokens, sequence.tokens + count)
        keys, values = (torch.cat(parts, 1) for parts in zip(held, new, strict=True))
        sequence.absorb_prompt(layer, keys, values, None)
    sequence.finish_step(count)


def take(sequence: Sequence, count: int) -> None:
    """As decode steps do, one token each."""
    for _ in range(count):
        key, value = marked(sequence.tokens, sequence.tokens + 1)
        for layer in range(GEOMETRY.layers):
            sequence.append(layer, key[:, 0], value[:, 0])
            sequence.layers[layer].evict(sequence.tokens)
        sequence.finish_step()


def near_tokens(sequence: Sequence, layer: int = 1) -> list[int]:
    keys = sequence.near[layer].keys
    equal(sequence.near[layer].values, -keys)
    equal(keys, keys[:1, :, :1].expand(3, -1, 5))
    return [int(key) for key in keys[0, :, 0]]


def far_tokens(sequence: Sequence, layer: int = 1) -> list[int]:
    far = sequence.far.store.view(layer)
    equal(far.values(), -far.keys())
    return [int(key) for key in far.keys()[0, :, 0]]


@pytest.mark.parametrize("length", [1, 2, 3, 6, 7, 50])
@pytest.mark.parametrize("sinks", [0, 2])
def test_prompt_is_laid_into_sinks_far_and_window(length: int, sinks: int) -> None:
    sequence = new_sequence("full-far", sinks=sinks)
    read_prompt(sequence, length)
    window_start = max(sinks, length - WINDOW)
    for layer in range(2):
        assert far_tokens(sequence, layer) == list(range(sinks, window_start))
        assert near_tokens(sequence, layer) == [
            *range(min(sinks, length)),
            *range(window_start, length),
        ]


def test_window_spills_in_blocks() -> None:
    sequence = new_sequence("full-far")
    read_prompt(sequence, 10)
    take(sequence, SPILL_TOKENS - 1)
    assert far_tokens(sequence) == list(range(2, 6))
    assert near_tokens(sequence) == [0, 1, *range(6, 9 + SPILL_TOKENS)]
    take(sequence, 1)
    for layer in range(2):
        assert far_tokens(sequence, layer) == list(range(2, 6 + SPILL_TOKENS))
        assert near_tokens(sequence, layer) == [0, 1, *range(6 + SPILL_TOKENS, 10 + SPILL_TOKENS)]
    take(sequence, 3 * SPILL_TOKENS)
    assert far_tokens(sequence) == list(range(2, 6 + 4 * SPILL_TOKENS))


def test_short_prompt_grows_into_sinks_window_and_far() -> None:
    sequence = new_sequence("full-far")
    read_prompt(sequence, 1)
    take(sequence, 5 + SPILL_TOKENS)
    assert near_tokens(sequence) == [0, 1, *range(2 + SPILL_TOKENS, 6 + SPILL_TOKENS)]
    assert far_tokens(sequence) == list(range(2, 2 + SPILL_TOKENS))


@pytest.mark.parametrize("policy", ["full", "full-far", "sketch", "topk-oracle"])
def test_past_is_all_tokens_in_order(policy: str) -> None:
    sequence = new_sequence(policy)
    for step in (30, 1, 7):
        read_prompt(sequence, step)
        take(sequence, SPILL_TOKENS + 3)
        for layer in range(2):
            keys, values = marked(0, sequence.tokens)
            equal(past(sequence, layer)[0], keys)
            equal(past(sequence, layer)[1], values)
    assert sequence.next_position == sequence.tokens == 38 + 3 * (SPILL_TOKENS + 3)


def test_past_of_an_empty_sequence_is_empty() -> None:
    keys, values = past(new_sequence("full-far"), 0)
    assert keys.shape == values.shape == (3, 0, 5)


def test_evicting_keeps_to_the_limit_and_knows_positions() -> None:
    sequence = new_sequence("streaming-llm", budget=6)
    for count in (7, 1, 60):
        read_prompt(sequence, count)
        assert len(near_tokens(sequence)) == min(sequence.tokens, SINKS + WINDOW + 6)
    take(sequence, 9)
    near = sequence.near[1]
    assert near.positions is not None
    assert near_tokens(sequence) == near.positions[0, : near.length].tolist()
    assert sorted(near_tokens(sequence)) == [0, 1, *range(67, 77)]
    assert sequence.far.store.num_bytes == 0
    assert sequence.next_position == 12  # slots are counted, not tokens


def test_share_of_a_budget_is_of_the_first_prompt() -> None:
    sequence = new_sequence("streaming-llm", budget=0.25)
    read_prompt(sequence, 81)
    assert len(near_tokens(sequence)) == SINKS + WINDOW + 21
    read_prompt(sequence, 100)
    take(sequence, 5)
    assert len(near_tokens(sequence)) == SINKS + WINDOW + 21


def test_whole_budget_is_not_cut_to_a_short_first_prompt() -> None:
    sequence = new_sequence("streaming-llm", budget=50)
    read_prompt(sequence, 3)
    read_prompt(sequence, 100)
    assert len(near_tokens(sequence)) == SINKS + WINDOW + 50


def test_selecting_asks_the_index_where_there_are_far_tokens() -> None:
    query = torch.zeros(6, 5)
    sequence = new_sequence("full-far")
    assert sequence.far.select(0, query, sequence.tokens) is NONE
    read_prompt(sequence, 6)
    assert sequence.far.select(0, query, sequence.tokens) is NONE
    read_prompt(sequence, 1)
    assert sequence.far.select(0, query, sequence.tokens) is ALL
    everything_near = new_sequence("full")
    read_prompt(everything_near, 50)
    assert everything_near.far.select(0, query, everything_near.tokens) is NONE


@pytest.mark.parametrize("policy", ["full", "full-far", "streaming-llm"])
def test_rewinding_returns_to_the_mark_any_number_of_times(policy: str) -> None:
    sequence = new_sequence(policy)
    read_prompt(sequence, 40)
    take(sequence, 5)
    mark = sequence.mark()
    before = [(near_tokens(sequence, i), far_tokens(sequence, i)) for i in range(2)]
    for count in (1, 200):
        take(sequence, count)
        read_prompt(sequence, 70)
        assert sequence.tokens == 115 + count
        sequence.rewind(mark)
        assert sequence.tokens == 45
        assert [(near_tokens(sequence, i), far_tokens(sequence, i)) for i in range(2)] == before


def test_mark_of_rows_that_only_grow_copies_nothing() -> None:
    growing, spilling = new_sequence("full"), new_sequence("full-far")
    for sequence in (growing, spilling):
        read_prompt(sequence, 40)
    assert growing.mark().layers == (40, 40)
    assert [getattr(saved, "length", None) for saved in spilling.mark().layers] == [6, 6]


def test_bytes_read_are_those_of_the_selected_rows() -> None:
    engine = tiny_engine(policy="full-far", far_dtype="bfloat16")
    sequence = read(engine, tokens(100))
    assert sequence.far.bytes_read == 0  # reading a prompt is not decoding
    decode(engine, sequence, tokens(3))
    layers, kv_heads, row_bytes = 2, 2, 2 * 16 * 2
    assert sequence.far.bytes_read == 3 * layers * kv_heads * (100 - 3 - 5) * row_bytes
    oracle = tiny_engine(policy="topk-oracle", budget=10)
    sequence = read(oracle, tokens(100))
    decode(oracle, sequence, tokens(3))
    assert sequence.far.bytes_read == 3 * layers * kv_heads * 10 * 2 * 16 * 4


def test_what_evicts_once_keeps_all_that_comes_after_the_first_prompt() -> None:
    sequence = new_sequence(RecentOnce())
    limit = SINKS + WINDOW + 6
    read_prompt(sequence, 40)
    assert sequence.near[0].length == limit
    kept = sequence.near[0].keys[0, :, 0].tolist()
    assert kept == [0.0, 1.0, *(float(token) for token in range(30, 40))]
    mark = sequence.mark()
    read_prompt(sequence, 15)
    take(sequence, 3)
    assert sequence.near[0].length == limit + 18
    assert sequence.near[0].keys[0, limit:, 0].tolist() == [float(i) for i in range(40, 58)]
    sequence.rewind(mark)
    assert sequence.near[0].keys[0, :, 0].tolist() == kept

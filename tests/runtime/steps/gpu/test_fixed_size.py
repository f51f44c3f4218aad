"""Steps of policies that evict, as a GPU takes them; without one the same launches, uncaptured."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from specs import tiny_specs
from tiny_engine import DEVICE, read, tiny_engine, tokens

from nearfar.progress import silent
from nearfar.runtime.engine.engine import Engine
from nearfar.runtime.memory.sequence import Sequence
from nearfar.runtime.steps.stepping import Stepper, suits_micro_batches

close = partial(torch.testing.assert_close, rtol=2e-4, atol=2e-4)
STEADY = [*tiny_specs(["h2o", "h2o-mean", "tova", "less", "streaming-llm"]), "keydiff:once=False"]
RAGGED = ["adakv", "adakv:score=keydiff"]
COMPRESSED = ["snapkv", "pyramidkv", "expected-attention", "keydiff", "knorm", "random"]
ONCE = [pytest.param(policy, marks=pytest.mark.slow) for policy in (*COMPRESSED, *RAGGED)]


def engines(policy: str, budget: int = 20) -> tuple[Engine, Engine]:
    """One that steps launch by launch, and one that steps as on a GPU."""
    eager, other = (tiny_engine(policy=policy, budget=budget) for _ in range(2))
    eager._stepper = Stepper(eager.decoder, 1, by_micro_batches=False)
    micro_batches = suits_micro_batches(other.policy, 16)
    other._stepper = Stepper(other.decoder, 1, by_micro_batches=micro_batches, by_graphs=True)
    return eager, other


def decode(engine: Engine, sequences: list[Sequence], ids: torch.Tensor) -> torch.Tensor:
    return torch.stack([engine.step(sequences, [one] * len(sequences)) for one in ids.tolist()])


def held(sequence: Sequence) -> list[list[int]]:
    """Positions near, of every layer and head."""
    layers = range(len(sequence.near))
    return [sorted(head.tolist()) for i in layers for head in sequence.layers[i].positions]


@pytest.mark.parametrize("policy", [*STEADY, *ONCE])
@pytest.mark.parametrize("lengths", [(90,), (71, 90), (3, 60)])
def test_it_is_what_launch_by_launch_gives(policy: str, lengths: tuple[int, ...]) -> None:
    eager, other = engines(policy)
    answer = tokens(13, seed=1)
    pairs = [[read(each, tokens(n, seed=n)) for n in lengths] for each in (eager, other)]
    want, got = (decode(*each, answer) for each in zip((eager, other), pairs, strict=True))
    close(got, want)
    for one, same in zip(*pairs, strict=True):
        assert held(one) == held(same)
        assert one.tokens == same.tokens
        assert one.near_bytes == same.near_bytes
    if policy in STEADY and min(lengths) > 28:
        assert other._stepper._steady is not None


@pytest.mark.parametrize("policy", STEADY)
def test_a_near_set_that_fills_becomes_steady(policy: str) -> None:
    eager, other = engines(policy)
    answer = tokens(12, seed=1)
    sequences = [read(each, tokens(22)) for each in (eager, other)]
    want = decode(eager, sequences[:1], answer)
    for count in range(0, 12, 3):
        span = slice(count, count + 3)
        close(decode(other, sequences[1:], answer[span]), want[span])
        assert sequences[1].is_fixed_size == (count > 0)  # 28 rows are its limit
    assert other._stepper._steady is not None


@pytest.mark.parametrize("policy", [*STEADY, *ONCE])
def test_a_mark_is_returned_to(policy: str) -> None:
    _, other = engines(policy)
    sequence = read(other, tokens(90))
    decode(other, [sequence], tokens(4, seed=2))
    mark = sequence.mark()
    first = decode(other, [sequence], tokens(6, seed=1))
    rows = held(sequence)
    for _ in range(2):
        sequence.rewind(mark)
        close(decode(other, [sequence], tokens(6, seed=1)), first, rtol=0, atol=0)
        assert held(sequence) == rows


@pytest.mark.parametrize("policy", STEADY)
def test_a_captured_step_outlives_a_question(policy: str) -> None:
    eager, other = engines(policy)
    pairs = [(each, read(each, tokens(90))) for each in (eager, other)]
    marks = [sequence.mark() for _, sequence in pairs]
    answer, steps = tokens(5, seed=1), []
    for length in (7, 12, 31):
        got = []
        for (engine, sequence), mark in zip(pairs, marks, strict=True):
            sequence.rewind(mark)
            engine.read_ids(sequence, tokens(length, seed=length).tolist(), silent)
            got.append(decode(engine, [sequence], answer))
        close(got[1], got[0])
        steps.append(other._stepper._steady)
    assert steps[0] is not None
    assert steps[0] is steps[1] is steps[2]


@pytest.mark.parametrize("policy", [*STEADY, *ONCE])
def test_two_sequences_in_turn_do_not_meet(policy: str) -> None:
    eager, other = engines(policy)
    answer = tokens(5, seed=1)
    want = [decode(eager, [read(eager, tokens(n))], answer) for n in (60, 80)]
    sequences = [read(other, tokens(n)) for n in (60, 80)]
    for count in range(0, 5, 3):
        span = slice(count, count + 3)
        for sequence, wanted in zip(sequences, want, strict=True):
            close(decode(other, [sequence], answer[span]), wanted[span])


def test_what_changes_its_rows_is_never_captured() -> None:
    eager, other = engines("lococo:maps=random")
    sequences = [read(each, tokens(90)) for each in (eager, other)]
    answer = tokens(20, seed=1)
    want = decode(eager, sequences[:1], answer)
    close(decode(other, sequences[1:], answer), want, rtol=0, atol=0)
    assert not sequences[1].is_fixed_size
    assert other._stepper._steady is None


def test_ragged_heads_that_start_anywhere_are_not_for_micro_batches() -> None:
    ragged, other = (tiny_engine(policy=policy).policy for policy in ("adakv", "snapkv"))
    assert [suits_micro_batches(ragged, size) for size in (16, 24, 256)] == [True, False, True]
    assert suits_micro_batches(other, 24)


@pytest.mark.slow
@pytest.mark.parametrize("lengths", [(90, 80), (90, 5), (5, 90)])
def test_ragged_rows_of_a_prompt_that_was_taken_back_are_not_read(lengths: tuple[int, int]) -> None:
    eager, other = engines("adakv")
    answer = tokens(5, seed=1)
    sequence = other.new_sequence()
    mark = sequence.mark()
    for length in lengths:
        sequence.rewind(mark)
        other.read_ids(sequence, tokens(length).tolist(), silent)
        want = decode(eager, [read(eager, tokens(length))], answer)
        close(decode(other, [sequence], answer), want)


@pytest.mark.skipif(DEVICE == "cpu", reason="a graph is captured on a GPU")
def test_a_captured_step_is_replayed() -> None:
    _, other = engines("h2o")
    sequence = read(other, tokens(90))
    decode(other, [sequence], tokens(4, seed=2))
    steady = other._stepper._steady
    assert steady is not None
    assert steady._graph is not None
    decode(other, [sequence], tokens(4, seed=3))
    assert other._stepper._steady is steady


def test_arrays_that_come_again_at_an_address_are_others() -> None:
    """A graph knows addresses and strides; an allocator may give both out again."""
    other = tiny_engine(policy="h2o", budget=20)
    sequence = read(other, tokens(90))
    near, before = sequence.near[0], sequence.layout
    storage = near.rows
    near.reserve(near.rows.shape[1] + 1)
    near.rows = storage  # as if the old place had been given out for the new array
    assert sequence.layout != before
    sequence.rewind(sequence.mark())
    after = sequence.layout
    sequence.rewind(sequence.mark())
    assert sequence.layout == after  # what is copied back lies where it lay

from __future__ import annotations

import re
import time

import pytest
import torch
from specs import representatives
from tiny_engine import VOCABULARY, decode, read, tiny_config, tiny_engine, tokens

from nearfar.config import SamplingConfig
from nearfar.errors import ContextTooLongError
from nearfar.policies.registry import create_policy, policy_names
from nearfar.runtime.engine.engine import Engine
from nearfar.runtime.engine.generation import GenerationState, check_room, decode_all, generation_of


def start(
    engine: Engine,
    prompt: torch.Tensor,
    new_tokens: int = 10,
    stop_ids: frozenset[int] = frozenset(),
    temperature: float = 0.0,
) -> GenerationState:
    sampling = SamplingConfig(max_new_tokens=new_tokens, temperature=temperature)
    run = GenerationState(engine.new_sequence(), sampling, stop_ids)
    run.read_prompt(engine.decoder, prompt.tolist(), engine.chunk_tokens)
    return run


def finish(engine: Engine, *runs: GenerationState) -> list[list[GenerationState]]:
    return list(decode_all(engine.decoder, engine.step, list(runs)))


def test_greedy_is_the_largest_logit_step_by_step() -> None:
    engine = tiny_engine(policy="full")
    run = start(engine, tokens(20), 12)
    finish(engine, run)
    ids = tokens(20)
    for token in run.token_ids:
        sequence = read(engine, ids[:-1])
        assert int(decode(engine, sequence, ids[-1:])[0].argmax()) == token
        ids = torch.cat([ids, torch.tensor([token])])
    assert run.finish_reason == "length"
    assert run.sequence.tokens == 20 + 11  # nothing was asked after the last token


@pytest.mark.parametrize("after", [1, 2, 7])
def test_stop_token_ends_and_is_left_out(after: int) -> None:
    engine = tiny_engine()
    free = start(engine, tokens(20), 12, temperature=1.0)
    finish(engine, free)
    stop = free.token_ids[after]
    assert stop not in free.token_ids[:after]
    run = start(engine, tokens(20), 12, frozenset({stop}), temperature=1.0)
    finish(engine, run)
    assert run.token_ids == free.token_ids[:after]
    assert run.finish_reason == "stop"


def test_stop_token_may_come_first() -> None:
    engine = tiny_engine()
    run = start(engine, tokens(20), 12, frozenset(range(VOCABULARY)))
    assert run.finish_reason == "stop"
    assert finish(engine, run) == [[]]
    result = generation_of(run, "")
    assert (result.token_ids, result.new_tokens, result.prompt_tokens) == ((), 0, 20)
    assert result.tokens_per_second == result.far_bytes_read_per_token == 0.0


def test_one_token_needs_no_decode_step() -> None:
    engine = tiny_engine()
    run = start(engine, tokens(20), 1)
    assert finish(engine, run) == [[run]]
    assert (len(run.token_ids), run.finish_reason) == (1, "length")
    assert run.tokens_per_second == 0.0


@pytest.mark.parametrize("policy", representatives(policy_names()))
def test_generation_ends_where_the_model_can_read_no_further(policy: str) -> None:
    """Unless positions count the cache: then there is no end."""
    engine = tiny_engine(tiny_config(context=64), policy=policy, budget=30)
    run = start(engine, tokens(40), 300)
    finish(engine, run)
    if create_policy(policy).traits.positions == "cache-index":
        assert (len(run.token_ids), run.finish_reason) == (300, "length")
        assert run.sequence.next_position == 38
    else:
        # 64 tokens are read; the last one of the answer never needs to be
        assert (len(run.token_ids), run.finish_reason) == (25, "context")


def test_prompt_may_fill_the_context_and_not_more() -> None:
    engine = tiny_engine(tiny_config(context=64))
    run = start(engine, tokens(64), 300)
    assert (len(run.token_ids), run.finish_reason) == (1, "context")
    check_room(engine.decoder, 60, 4)
    message = (
        "The text has 65 tokens and the model reads at most 64. Shorten it, split it, or choose a "
        "model with a longer context (--model)."
    )
    with pytest.raises(ContextTooLongError, match=f"^{re.escape(message)}$"):
        start(engine, tokens(65))
    with pytest.raises(ContextTooLongError, match="The text has 65 tokens"):
        check_room(engine.decoder, 60, 5)


def test_runs_of_any_length_go_on_beside_each_other() -> None:
    engine = tiny_engine(policy="full-far")
    lengths = [(30, 5), (3, 9), (61, 1), (17, 7)]
    runs = [start(engine, tokens(n, seed=n), count, temperature=1.0) for n, count in lengths]
    steps = finish(engine, *runs)
    assert [len(step) for step in steps] == [4, 3, 3, 3, 3, 2, 2, 1, 1]
    assert steps[-1] == [runs[1]]
    for run, (n, count) in zip(runs, lengths, strict=True):
        alone = start(engine, tokens(n, seed=n), count, temperature=1.0)
        finish(engine, alone)
        assert run.token_ids == alone.token_ids
        assert run.finish_reason == "length"


def test_nothing_to_decode_is_no_error() -> None:
    assert finish(tiny_engine()) == [[]]


def test_numbers_are_of_this_answer_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tiny_engine(policy="full-far")
    sequence = read(engine, tokens(100))
    decode(engine, sequence, tokens(8, seed=1))
    clock = iter(range(100))  # a look at it takes a second
    monkeypatch.setattr("time.perf_counter", lambda: float(next(clock)))
    run = GenerationState(sequence, SamplingConfig(max_new_tokens=5), frozenset())
    run.read_prompt(engine.decoder, tokens(20).tolist(), 1000)
    finish(engine, run)
    result = generation_of(run, "text")
    assert result.prompt_tokens == 20
    assert result.prompt_seconds == result.seconds_to_first_token == 1.0
    assert result.tokens_per_second == 1.0  # four steps in four seconds
    far_tokens = 128 - 3 - 5  # of a step; nothing spills in four steps
    assert result.far_bytes_read_per_token == 2 * 2 * far_tokens * 2 * 16 * 4
    assert (result.text, result.finish_reason) == ("text", "length")


def test_clock_is_a_clock() -> None:
    engine = tiny_engine()
    before = time.perf_counter()
    run = start(engine, tokens(30), 20)
    finish(engine, run)
    passed = time.perf_counter() - before
    assert 0 < run.seconds_to_first_token < passed
    assert run.tokens_per_second > 19 / passed

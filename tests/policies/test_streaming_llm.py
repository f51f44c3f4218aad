from __future__ import annotations

from functools import partial

import pytest
import torch
from eviction_reference import EvictingReference, Kept, near_state
from tiny_engine import decode, read, tiny_config, tiny_engine, tokens

from nearfar.policies.streaming_llm import StreamingLLM
from nearfar.runtime.memory.sequence import Sequence

SINKS, WINDOW = 3, 5  # of tiny_engine
close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)


def positions(sequence: Sequence) -> list[int]:
    """What all heads of all layers keep."""
    found = []
    for near in sequence.near:
        assert near.positions is not None
        found += near.positions[:, : near.length].sort(-1).values.tolist()
    assert all(head == found[0] for head in found)
    return list(found[0])


def oldest(budget: int, sinks: int = SINKS) -> EvictingReference:
    limit = sinks + WINDOW + budget

    def drop(kept: list[Kept]) -> list[Kept]:
        return sorted(kept, key=lambda row: row.position)[sinks:][: max(0, len(kept) - limit)]

    return EvictingReference(tiny_engine(), drop, count_slots=True)


@pytest.mark.parametrize("sinks", [0, 3])
@pytest.mark.parametrize("prompt", [1, 3, 19, 20, 21, 70])
def test_sinks_and_the_most_recent_are_kept(prompt: int, sinks: int) -> None:
    engine = tiny_engine(policy="streaming-llm", budget=12, sinks=sinks)
    sequence = read(engine, tokens(prompt))
    for length in range(prompt, prompt + 30):
        recent = max(sinks, length - WINDOW - 12)
        assert positions(sequence) == [*range(min(sinks, length)), *range(recent, length)]
        decode(engine, sequence, tokens(1, seed=length))


@pytest.mark.parametrize("sinks", [0, 3])
def test_positions_are_those_of_the_cache(sinks: int) -> None:
    """As a reference that keeps unrotated keys and turns them anew for every query."""
    engine = tiny_engine(policy="streaming-llm", budget=12, sinks=sinks)
    reference = oldest(budget=12, sinks=sinks)
    sequence = read(engine, tokens(45))
    reference.read(tokens(45))
    for token in tokens(60, seed=1):
        close(decode(engine, sequence, token[None])[0], reference.read(token[None]))
        assert positions(sequence) == reference.kept_positions(1, 1)


def test_question_goes_on_from_the_cache() -> None:
    engine = tiny_engine(policy="streaming-llm", budget=12, chunk_tokens=10)
    reference = oldest(budget=12)
    sequence = engine.new_sequence()
    for part in (tokens(50), tokens(33, seed=2)):
        read(engine, part, sequence)
        reference.read(part)
    for token in tokens(5, seed=1):
        close(decode(engine, sequence, token[None])[0], reference.read(token[None]))
    assert sequence.tokens == 88
    assert sequence.next_position == SINKS + WINDOW + 12


def test_until_the_first_token_goes_all_is_exact() -> None:
    limit = SINKS + WINDOW + 40
    engines = [tiny_engine(policy=name, budget=40) for name in ("full", "streaming-llm")]
    ids = tokens(80, seed=1)
    full, streaming = (decode(engine, read(engine, tokens(20)), ids) for engine in engines)
    exact = limit + 1 - 20  # the step that drops a token has still seen it
    close(streaming[:exact], full[:exact])
    assert (streaming[exact] - full[exact]).abs().max() > 1e-3


def test_text_has_no_end() -> None:
    """Far beyond the positions that the model has, the logits stay those of a window."""
    engine = tiny_engine(tiny_config(context=64), policy="streaming-llm", budget=30)
    sequence = read(engine, tokens(40))
    ids = tokens(300, seed=1)
    logits = decode(engine, sequence, ids)
    assert logits.isfinite().all()
    assert sequence.tokens == 340
    assert sequence.next_position == 38
    assert positions(sequence) == [0, 1, 2, *range(305, 340)]
    # the same last token, read at once after what is kept: the deeper layers' keys differ, because
    # they have seen what is gone, but the first layer's are these tokens' alone
    kept = torch.cat([tokens(40), ids])[positions(sequence)]
    again = read(engine, kept)
    first, other = sequence.near[0], again.near[0]
    assert first.positions is not None
    order = first.positions[0, : first.length].argsort()
    close(first.keys[:, order], other.keys)


def test_victims_are_the_oldest_whatever_the_order() -> None:
    order = torch.randperm(20)
    near = near_state(order.expand(2, -1), None, sinks=2, window=3, limit=9)
    gone = order[StreamingLLM().victims(near)]
    assert gone.sort(-1).values.tolist() == [list(range(2, 13))] * 2

from __future__ import annotations

import re
from functools import partial

import pytest
import torch
from eviction_reference import EvictingReference, Kept, near_state
from tiny_engine import decode, read, tiny_config, tiny_engine, tokens

from nearfar.errors import InvalidOptionError
from nearfar.policies.h2o import H2O
from nearfar.policies.registry import create_policy
from nearfar.runtime.memory.sequence import Sequence

SINKS, WINDOW = 3, 5  # of tiny_engine
close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)


def positions(sequence: Sequence, layer: int, head: int) -> list[int]:
    near = sequence.near[layer]
    assert near.positions is not None
    kept: list[int] = near.positions[head, : near.length].tolist()
    assert len(set(kept)) == len(kept)
    return sorted(kept)


def scores(sequence: Sequence, layer: int, head: int) -> torch.Tensor:
    """In the order of positions."""
    near = sequence.near[layer]
    assert near.positions is not None
    assert near.scores is not None
    order = near.positions[head, : near.length].argsort()
    return near.scores[head, : near.length][order]


def lightest(budget: int, recent: int) -> EvictingReference:
    """The rule: beyond the limit the lightest go, of those neither sinks nor recent."""
    limit = SINKS + WINDOW + budget

    def drop(kept: list[Kept]) -> list[Kept]:
        newest = max(row.position for row in kept)
        old = [row for row in kept if SINKS <= row.position <= newest - WINDOW - recent]
        old.sort(key=lambda row: row.score)
        return old[: max(0, len(kept) - limit)]

    return EvictingReference(tiny_engine(), drop, count_slots=False)


@pytest.mark.parametrize("chunk_tokens", [1000, 32, 7])
def test_scores_after_a_prompt_are_column_sums(chunk_tokens: int) -> None:
    """With nothing dropped: what every token got from the whole prompt, mean over the group."""
    engine = tiny_engine(policy="h2o", budget=1000, chunk_tokens=chunk_tokens)
    sequence = read(engine, tokens(61))
    reference = lightest(budget=1000, recent=500)
    reference.read(tokens(61))
    for layer in range(2):
        for head in range(2):
            wanted = torch.tensor([row.score for row in reference.heads[layer][head]])
            close(scores(sequence, layer, head), wanted)
            assert float(wanted.sum()) == pytest.approx(61, abs=1e-3)


@pytest.mark.parametrize(("share", "recent"), [(0.5, 6), (0.0, 0), (0.25, 3), (1.0, 12)])
def test_kept_tokens_are_those_of_the_rule(share: float, recent: int) -> None:
    engine = tiny_engine(policy=f"h2o:recent_share={share}", budget=12)
    reference = lightest(budget=12, recent=recent)
    sequence = read(engine, tokens(45))
    reference.read(tokens(45))
    for step, token in enumerate(tokens(60, seed=1)):
        logits = decode(engine, sequence, token[None])[0]
        close(logits, reference.read(token[None]), rtol=1e-4, atol=1e-4)
        for layer in range(2):
            for head in range(2):
                kept = positions(sequence, layer, head)
                assert kept == reference.kept_positions(layer, head), step
                assert len(kept) == SINKS + WINDOW + 12
                assert kept[:SINKS] == list(range(SINKS))
                newest = 45 + step
                assert kept[-WINDOW - recent :] == list(
                    range(newest - WINDOW - recent + 1, newest + 1)
                )


def test_heads_and_layers_keep_different_heavy_hitters() -> None:
    engine = tiny_engine(policy="h2o", budget=12)
    sequence = read(engine, tokens(200))
    kept = {tuple(positions(sequence, layer, head)) for layer in range(2) for head in range(2)}
    assert len(kept) == 4


def test_a_second_prompt_adds_to_the_scores() -> None:
    engine = tiny_engine(policy="h2o", budget=12, chunk_tokens=10)
    reference = lightest(budget=12, recent=6)
    sequence = engine.new_sequence()
    for part in (tokens(50), tokens(1, seed=1), tokens(33, seed=2)):
        read(engine, part, sequence)
        reference.read(part)
        for layer in range(2):
            for head in range(2):
                assert positions(sequence, layer, head) == reference.kept_positions(layer, head)
                wanted = sorted((row.position, row.score) for row in reference.heads[layer][head])
                close(scores(sequence, layer, head), torch.tensor([score for _, score in wanted]))


def test_memory_is_bounded() -> None:
    engine = tiny_engine(tiny_config(layers=1), policy="h2o", budget=20)
    sequence = read(engine, tokens(500))
    capacity = set()
    for token in tokens(300, seed=1):
        decode(engine, sequence, token[None])
        near = sequence.near[0]
        assert near.positions is not None
        assert near.scores is not None
        assert near.length == SINKS + WINDOW + 20
        capacity.add((near.rows.shape[1], near.positions.shape[1], near.scores.shape[1]))
    assert len(capacity) == 1
    assert max(max(capacity)) < 500


def test_scores_of_a_batch_do_not_mix() -> None:
    engine = tiny_engine(policy="h2o", budget=12)
    prompts = [tokens(n, seed=n) for n in (4, 61, 30)]
    answer = tokens(20, seed=1)
    together = [read(engine, prompt) for prompt in prompts]
    for token in answer.tolist():
        engine.step(together, [token] * 3)
    for prompt, sequence in zip(prompts, together, strict=True):
        alone = read(engine, prompt)
        decode(engine, alone, answer)
        for layer in range(2):
            for head in range(2):
                assert positions(sequence, layer, head) == positions(alone, layer, head)
                close(scores(sequence, layer, head), scores(alone, layer, head))


def test_group_is_averaged() -> None:
    attention = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0], [0.2, 0.8]])
    got = H2O().update_scores(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), attention)
    close(got, torch.tensor([[1.75, 2.25], [3.1, 4.9]]))


def test_equal_scores_still_spare_sinks_and_recent() -> None:
    order = torch.randperm(20)
    near = near_state(order.expand(2, -1), torch.zeros(2, 20), sinks=2, window=3, limit=9)
    gone = order[H2O().victims(near)]
    assert gone.shape == (2, 11)
    for head in gone.tolist():
        assert len(set(head)) == 11
        assert set(head) <= set(range(2, 15))  # of the budget of four, two are recent


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_share_outside_its_rule(share: float) -> None:
    message = f"h2o's recent_share must be between 0 and 1. Got {share!r}."
    with pytest.raises(InvalidOptionError, match=f"^{re.escape(message)}$"):
        create_policy(f"h2o:recent_share={share}")

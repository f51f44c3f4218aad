"""What each evicting policy keeps, against its paper's rule written out token by token."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from eviction_reference import EvictingReference, Kept, near_state
from tiny_engine import decode, read, tiny_config, tiny_engine, tokens

from nearfar.errors import InvalidOptionError
from nearfar.policies.adakv import AdaKV
from nearfar.policies.base import Moments, NearState, PromptQueryStats
from nearfar.policies.expected_attention import ExpectedAttention
from nearfar.policies.h2o import H2OMean
from nearfar.policies.key_only import KeyDiff, Knorm, Random
from nearfar.policies.pyramidkv import PyramidKV
from nearfar.policies.registry import create_policy
from nearfar.policies.snapkv import SnapKV
from nearfar.runtime.memory.sequence import Sequence
from nearfar.runtime.models.rope import Angles, RopeConfig, Rotary, rotate

SINKS, WINDOW = 3, 5  # of tiny_engine
Hkv, G, C, D = 2, 3, 41, 6
ROTARY = Rotary(RopeConfig(100.0), D, torch.device("cpu"))


def make_near(limit: int = 20, sinks: int = 2, window: int = 4) -> NearState:
    """Rows in token order with random keys and values."""
    generator = torch.Generator().manual_seed(C)
    keys, values = torch.randn(2, Hkv, C, D, generator=generator)
    positions = torch.arange(C).expand(Hkv, -1)
    return NearState(positions, None, sinks, window, limit, keys, values)


def make_last(count: int) -> torch.Tensor:
    return torch.randn(Hkv * G, count, D, generator=torch.Generator().manual_seed(1))


def gone_of(policy: SnapKV | Knorm | KeyDiff | Random, near: NearState) -> list[set[int]]:
    gone = [set(head) for head in policy.victims(near).tolist()]
    assert all(len(head) == C - near.limit for head in gone)
    return gone


def lightest(weights: torch.Tensor, near: NearState) -> list[set[int]]:
    """The rule, one token at a time: of those neither sinks nor window the lightest go."""
    gone = []
    for head in weights:
        free = list(range(near.sinks, C - near.window))
        gone.append(set(sorted(free, key=lambda j: float(head[j]))[: C - near.limit]))
    return gone


@pytest.mark.parametrize("pool", ["max", "avg"])
@pytest.mark.parametrize(("queries", "kernel"), [(1, 1), (7, 3), (9, 7)])
def test_snapkv_keeps_what_the_last_queries_vote_for(pool: str, queries: int, kernel: int) -> None:
    near, last = make_near(), make_last(12)
    policy = SnapKV(queries=queries, kernel=kernel, pool=pool)
    votes = torch.zeros(Hkv, C, dtype=torch.float64)
    for head in range(Hkv * G):
        for back in range(queries):
            seen = C - back  # a query sees what came before it, and itself
            keys = near.keys[head // G, :seen].double()
            weights = (keys @ last[head, -1 - back].double()).softmax(0)
            votes[head // G, :seen] += weights / G
    pooled = torch.zeros_like(votes)
    for j in range(C):
        around = votes[:, max(0, j - kernel // 2) : j + kernel // 2 + 1]
        pooled[:, j] = around.amax(1) if pool == "max" else around.sum(1) / kernel
    scores = policy.score_prompt(near, PromptQueryStats(ROTARY.angles, last=last))
    torch.testing.assert_close(scores, pooled.float(), rtol=1e-5, atol=1e-6)
    judged = NearState(near.positions, scores, 2, 4, 20, near.keys, near.values)
    pairs = zip(gone_of(policy, judged), lightest(pooled, near), pooled, strict=True)
    for gone, wanted, weights in pairs:  # of equal ones, which pooling makes, any may go
        got, expected = (weights[list(j)].sort().values for j in (gone, wanted))
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layers", [1, 2, 7, 30])
@pytest.mark.parametrize("budget", [0, 1, 16, 1000])
def test_pyramid_falls_and_keeps_its_mean(layers: int, budget: int) -> None:
    policy = PyramidKV()
    budgets = [policy.layer_budget(budget, layer, layers) for layer in range(layers)]
    assert sum(budgets) == layers * budget
    assert all(low >= high - 1 for low, high in itertools.pairwise(budgets))
    if layers > 1 and budget == 1000:
        assert (budgets[0], budgets[-1]) == (1950, 50)
        steps = [low - high for low, high in itertools.pairwise(budgets)]
        assert max(steps) - min(steps) <= 4  # sums are rounded, not steps


def test_pyramid_layers_hold_what_they_keep() -> None:
    engine = tiny_engine(tiny_config(layers=3), policy="pyramidkv", budget=20)
    sequence = read(engine, tokens(150))
    assert [near.length for near in sequence.near] == [8 + 39, 8 + 20, 8 + 1]
    assert sequence.near_bytes == 3 * (8 + 20) * 2 * 2 * 16 * 4
    decode(engine, sequence, tokens(3))
    assert [near.length for near in sequence.near] == [8 + 39 + 3, 8 + 20 + 3, 8 + 1 + 3]


def test_knorm_and_keydiff() -> None:
    near = make_near()
    norms = near.keys.norm(dim=-1)
    assert gone_of(Knorm(), near) == lightest(-norms, near)
    anchor = (near.keys / norms[..., None]).mean(1, keepdim=True)
    cosine = (near.keys * anchor).sum(-1) / norms / anchor.norm(dim=-1)
    assert gone_of(KeyDiff(), near) == lightest(-cosine, near)


def test_random_is_uniform_and_does_not_depend_on_when_tokens_go() -> None:
    engine = tiny_engine(policy="random:once=false", budget=12)
    grown, at_once = read(engine, tokens(40)), read(engine, tokens(100))
    decode(engine, grown, tokens(60, seed=1))
    kept = [[sorted(h.tolist()) for h in s.layers[1].positions] for s in (grown, at_once)]
    assert kept[0] == kept[1]
    assert kept[0][0] != kept[0][1]
    assert kept[0] != [sorted(h.tolist()) for h in grown.layers[0].positions]
    counts = torch.zeros(C)
    for seed in range(400):
        near = make_near(limit=20)
        for head in gone_of(Random(seed=seed), near):
            counts[list(head)] += 1
    free = counts[2:-4]
    assert float(counts.sum()) == 800 * 21 == float(free.sum())
    expected = 800 * 21 / 35
    # squared deviations of 35 counts, each of variance below that of a binomial
    chi_square = float(((free - expected) ** 2).sum() / (expected * (1 - 21 / 35)))
    assert chi_square < 66  # once in a thousand


@pytest.mark.slow
def test_expected_attention_is_what_gaussian_queries_give() -> None:
    """The formula against queries that are drawn from the Gaussian and rotated."""
    generator = torch.Generator().manual_seed(3)
    mean = torch.randn(Hkv * G, D, generator=generator) / 2
    root = torch.randn(Hkv * G, D, D, generator=generator) / 4
    near = make_near()
    stats = PromptQueryStats(ROTARY.angles, moments=Moments(mean, root @ root.transpose(1, 2)))
    policy = ExpectedAttention(horizon=9, epsilon=0.01)
    drawn = mean[:, None] + torch.randn(Hkv * G, 200_000, D, generator=generator) @ root.transpose(
        1, 2
    )
    cos, sin = ROTARY.angles(torch.arange(C, C + 9))
    turned = rotate(drawn, Angles(cos.mean(0), sin.mean(0)))
    keys = near.keys.repeat_interleave(G, 0)
    seen = (turned @ keys.transpose(1, 2)).double().exp().mean(1)
    shares = (seen / seen.sum(1, keepdim=True)).view(Hkv, G, C).mean(1)
    wanted = (shares + 0.01) * near.values.norm(dim=-1)
    torch.testing.assert_close(
        policy.score_prompt(near, stats), wanted.float(), rtol=0.05, atol=0.0
    )


def test_mean_attention_is_over_the_queries_that_could_see_a_token() -> None:
    order = torch.tensor([[4, 0, 2], [0, 4, 2]])
    near = near_state(order, torch.tensor([[1.0, 5.0, 3.0], [10.0, 2.0, 6.0]]), 0, 1, 2)
    wanted = torch.tensor([[1.0, 1.0, 1.0], [2.0, 2.0, 2.0]])
    torch.testing.assert_close(H2OMean().weights(near), wanted, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("spec", ["h2o-mean", "tova"])
def test_kept_tokens_are_those_of_the_rule(spec: str) -> None:
    """Bounded through decode, beside a reference that goes token by token and head by head."""
    engine = tiny_engine(policy=spec, budget=12)
    reference = mean_reference() if spec == "h2o-mean" else TovaReference()
    sequence = read(engine, tokens(45))
    reference.read(tokens(45))
    for step, token in enumerate(tokens(40, seed=1)):
        logits = decode(engine, sequence, token[None])[0]
        torch.testing.assert_close(logits, reference.read(token[None]), rtol=1e-4, atol=1e-4)
        for layer in range(2):
            kept = [sorted(head.tolist()) for head in sequence.layers[layer].positions]
            assert kept == [reference.kept_positions(layer, head) for head in range(2)], step
            assert {len(head) for head in kept} == {SINKS + WINDOW + 12}


def mean_reference() -> EvictingReference:
    def drop(kept: list[Kept]) -> list[Kept]:
        newest = max(row.position for row in kept)
        old = [row for row in kept if SINKS <= row.position <= newest - WINDOW - 6]
        old.sort(key=lambda row: row.score / (newest + 1 - row.position))
        return old[: max(0, len(kept) - SINKS - WINDOW - 12)]

    return EvictingReference(tiny_engine(), drop, count_slots=False)


class TovaReference(EvictingReference):
    """Scores are those of the newest query; a token's is the mean over the heads of the layer."""

    def __init__(self) -> None:
        super().__init__(tiny_engine(), self._least, count_slots=False)
        self._known: tuple[int, int] | None = None

    def _attend(self, queries: torch.Tensor, kept: list[Kept]) -> torch.Tensor:
        for row in kept:
            row.score = 0.0
        return super()._attend(queries, kept)

    def _least(self, kept: list[Kept]) -> list[Kept]:
        layer = next(i for i, heads in enumerate(self.heads) if any(kept is h for h in heads))
        if kept is self.heads[layer][0]:  # no head of this layer has dropped anything yet
            self._mean = {
                rows[0].position: sum(row.score for row in rows)
                for rows in zip(*self.heads[layer], strict=True)
            }
        newest = max(row.position for row in kept)
        old = [row for row in kept if SINKS <= row.position <= newest - WINDOW]
        old.sort(key=lambda row: self._mean[row.position])
        return old[: max(0, len(kept) - SINKS - WINDOW - 12)]


def test_adakv_spends_one_budget_where_weights_are_largest() -> None:
    near, last = make_near(limit=16), make_last(12)
    policy = AdaKV(score="snapkv+pool=avg", floor=0.3)
    weights = SnapKV(pool="avg").score_prompt(near, PromptQueryStats(ROTARY.angles, last=last))
    # as if one head's keys mattered twenty times as much
    weights[0] *= 20
    state = NearState(near.positions, weights, 2, 4, 16, near.keys, near.values)
    kept = policy.kept(state)
    always = [{*range(2), *range(C - 4, C)} for _ in range(Hkv)]
    for head in range(Hkv):
        free = [j for j in range(C) if j not in always[head]]
        always[head] |= set(sorted(free, key=lambda j: -float(weights[head, j]))[:3])
    rest = [(h, j) for h in range(Hkv) for j in range(C) if j not in always[h]]
    rest.sort(key=lambda place: -float(weights[place]))
    for head, j in rest[: Hkv * 16 - sum(map(len, always))]:
        always[head].add(j)
    assert [set(row.nonzero()[:, 0].tolist()) for row in kept] == always
    assert kept.sum().item() == Hkv * 16
    assert kept[1].sum().item() == 2 + 4 + 3


@pytest.mark.parametrize("chunk_tokens", [1000, 7])
def test_adakv_with_equal_shares_is_the_policy_that_it_wraps(chunk_tokens: int) -> None:
    """Through ragged rows, a question and an answer come out as from dense ones."""
    logits = []
    for spec in ("snapkv:pool=avg", "adakv:score=snapkv+pool=avg:floor=1.0"):
        engine = tiny_engine(policy=spec, budget=12, chunk_tokens=chunk_tokens)
        sequence = read(engine, tokens(90))
        first = decode(engine, sequence, tokens(3, seed=1))
        read(engine, tokens(20, seed=2), sequence)
        logits.append(torch.cat([first, decode(engine, sequence, tokens(5, seed=3))]))
    assert sequence.layers[0].ragged is not None
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-5, atol=1e-5)


def masked_logits(sequence: Sequence, prompt: torch.Tensor, answer: torch.Tensor) -> torch.Tensor:
    """Of exact attention whose keys outside of what ``sequence`` keeps are taken away by hand."""
    engine = tiny_engine(policy="full")
    exact = read(engine, prompt)
    for layer, near in enumerate(exact.near):
        for head, positions in enumerate(sequence.layers[layer].positions):
            gone = torch.ones(len(prompt), dtype=torch.bool)
            gone[positions[positions < len(prompt)]] = False
            near.keys[head][gone] = 0.0
            near.values[head][gone] = torch.nan  # must not be read
    reference = HeadsApart(engine, sequence, len(prompt))
    return torch.stack([reference.step(exact, token) for token in answer])


class HeadsApart:
    """Decodes with a softmax per query head over the keys that its KV head keeps."""

    def __init__(self, engine: object, sequence: Sequence, prompt: int) -> None:
        self.engine, self.sequence, self.prompt = engine, sequence, prompt

    def step(self, exact: Sequence, token: torch.Tensor) -> torch.Tensor:
        from nearfar.runtime.steps.decode import Attended, decode_step

        def apart(seen: Attended) -> torch.Tensor:
            near = exact.near[seen.layer]
            out = torch.empty_like(seen.query)
            for q, query in enumerate(seen.query):
                head = q // 3
                own = self.sequence.layers[seen.layer].positions[head]
                rows = [*own[own < self.prompt].tolist(), *range(self.prompt, near.length)]
                weights = (near.keys[head, rows] @ query).softmax(0)
                out[q] = weights @ near.values[head, rows]
            return out

        return decode_step(self.engine.decoder, [exact], token[None], apart)[0]  # type: ignore[attr-defined]


def test_adakv_heads_hold_and_read_what_they_keep() -> None:
    engine = tiny_engine(policy="adakv:floor=0.1", budget=12)
    sequence = read(engine, tokens(150))
    for layer in range(2):
        lengths = [len(head) for head in sequence.layers[layer].positions]
        assert sum(lengths) == 2 * (SINKS + WINDOW + 12)
        assert min(lengths) >= SINKS + WINDOW + 1
        ragged = sequence.layers[layer].ragged
        assert ragged is not None
        assert ragged.rows.untyped_storage().nbytes() == sum(lengths) * 2 * 16 * 4
        assert sequence.near[layer].rows.untyped_storage().nbytes() == 0
    assert len({len(head) for layer in range(2) for head in sequence.layers[layer].positions}) > 1
    got = decode(engine, sequence, tokens(4, seed=1))
    wanted = masked_logits(sequence, tokens(150), tokens(4, seed=1))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("score", ["snapkv", "expected-attention", "h2o", "knorm", "pyramidkv"])
def test_adakv_wraps_any_score(score: str) -> None:
    engine = tiny_engine(policy=f"adakv:score={score}", budget=12)
    assert engine.policy.traits.watches == create_policy(score).traits.watches
    sequence = read(engine, tokens(150))
    held = sum(len(head) for layer in range(2) for head in sequence.layers[layer].positions)
    assert held == 4 * (SINKS + WINDOW + 12)
    assert decode(engine, sequence, tokens(3)).isfinite().all()


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("snapkv:queries=0", "snapkv's queries must be between 1 and 128. Got 0."),
        ("pyramidkv:queries=129", "pyramidkv's queries must be between 1 and 128. Got 129."),
        ("snapkv:kernel=4", "snapkv's kernel must be an odd number above 0. Got 4."),
        ("snapkv:pool=min", "snapkv's pool must be max or avg. Got 'min'."),
        ("pyramidkv:beta=0.5", "pyramidkv's beta must be 1 or more. Got 0.5."),
        ("adakv:floor=2", "adakv's floor must be between 0 and 1. Got 2.0."),
        (
            "adakv:score=sketch",
            "adakv's score must be a policy that drops the lightest tokens, like snapkv or "
            "expected-attention. Got 'sketch'.",
        ),
        (
            "adakv:score=adakv",
            "adakv's score must be a policy that drops the lightest tokens, like snapkv or "
            "expected-attention. Got 'adakv'.",
        ),
        (
            "adakv:score=less+maps=random",
            "adakv keeps nothing of dropped tokens, which less does. Give the score of what it "
            "drops them by, like h2o. Got 'less+maps=random'.",
        ),
        (
            "adakv:score=snapkv+kernel=2",
            "snapkv's kernel must be an odd number above 0. Got 2.",
        ),
        (
            "expected-attention:horizon=0",
            "expected-attention's horizon must be 1 or more. Got 0.",
        ),
        (
            "expected-attention:epsilon=-1",
            "expected-attention's epsilon must be 0 or more. Got -1.0.",
        ),
    ],
)
def test_values_that_cannot_be_used(spec: str, text: str) -> None:
    with pytest.raises(InvalidOptionError, match=f"^{re.escape(text)}$"):
        create_policy(spec)


def test_adakv_forgets_a_first_prompt_that_is_taken_back() -> None:
    engine = tiny_engine(policy="adakv:floor=0.1", budget=12)
    sequence, fresh = engine.new_sequence(), engine.new_sequence()
    mark = sequence.mark()
    read(engine, tokens(90, seed=4), sequence)
    assert sequence.layers[0].ragged is not None
    sequence.rewind(mark)
    answers = [
        decode(engine, read(engine, tokens(70), each), tokens(3, seed=1))
        for each in (sequence, fresh)
    ]
    assert torch.equal(answers[0], answers[1])
    assert sequence.near_bytes == fresh.near_bytes
    sequence.rewind(mark)
    assert sequence.near_bytes == 0

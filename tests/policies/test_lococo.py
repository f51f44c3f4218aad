"""LoCoCo: what rows are merged to, against the paper's formula, and what stays as it is."""

from __future__ import annotations

import re
from functools import partial

import pytest
import torch
from tiny_engine import decode, read, tiny_engine, tokens

from nearfar.errors import InvalidOptionError
from nearfar.policies.convolution import (
    KERNEL,
    LayerConv,
    convolutions,
    merge_in_segments,
    merge_rows,
    random_convolutions,
)
from nearfar.policies.lococo import LoCoCo
from nearfar.policies.merged_rows import MergedRows
from nearfar.records import Geometry

Hkv, D, SLOTS = 2, 6, 4
SPEC = "lococo:maps=random"
close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)


def some_rows(n: int) -> MergedRows:
    generator = torch.Generator().manual_seed(n)
    rows = torch.randn(Hkv, n, 2 * D, generator=generator)
    scores = torch.rand(Hkv, n, generator=generator)
    order = torch.rand(Hkv, n, generator=generator).argsort(-1)
    return MergedRows(rows, scores, order * 3)


def some_conv(blend: float = 0.4) -> LayerConv:
    tensors = random_convolutions(Geometry(1, 6, Hkv, D), seed=1, slots=SLOTS)
    return LayerConv(tensors["weight"][0] * 5, tensors["bias"][0] + 0.1, torch.tensor(blend))


def merged_by_hand(some: MergedRows, count: int, conv: LayerConv, head: int) -> torch.Tensor:
    """Section 3 of the paper with loops, float64; rows kept and then rows made."""
    rows, scores = some.rows[head].double(), some.scores[head].tolist()
    slots = min(conv.slots, count // 2)
    best = sorted(range(len(scores)), key=lambda i: -scores[i])
    kept, others = best[: count - slots], best[count - slots :]
    others = sorted(others, key=lambda i: int(some.positions[head, i]))
    n, half = len(others), KERNEL // 2
    channels = torch.zeros(slots, n, dtype=torch.float64)
    for slot in range(slots):
        for t in range(n):
            total = float(conv.bias[slot])
            for k in range(KERNEL):
                if 0 <= t + k - half < n:
                    row = rows[others[t + k - half]]
                    total += float(row @ conv.weight[slot, :, k].double())
            channels[slot, t] = max(total, 0.0)
    ranked = sorted(sorted(range(n), key=lambda t: -scores[others[t]])[:slots])
    ones = torch.zeros(slots, n, dtype=torch.float64)
    ones[range(slots), ranked] = 1.0
    blend = float(conv.blend)
    mixtures = (1 - blend) * ones + blend * channels.softmax(-1)
    return torch.cat([rows[kept], mixtures @ rows[others]])


@pytest.mark.parametrize(("n", "count"), [(40, 12), (13, 12), (30, 3), (9, 1)])
def test_rows_are_merged_as_the_paper_says(n: int, count: int) -> None:
    some, conv = some_rows(n), some_conv()
    got = merge_rows(some, count, conv)
    assert got.rows.shape == (Hkv, count, 2 * D)
    for head in range(Hkv):
        close(
            got.rows[head].double(), merged_by_hand(some, count, conv, head), rtol=1e-4, atol=1e-4
        )


def test_without_a_share_of_mixtures_the_best_rows_stay() -> None:
    some = some_rows(40)
    got = merge_rows(some, 12, some_conv(blend=0.0))
    for head in range(Hkv):
        best = some.scores[head].topk(12).indices
        want = {tuple(row) for row in some.rows[head, best].tolist()}
        assert {tuple(row) for row in got.rows[head].tolist()} == want
        assert set(got.positions[head].tolist()) == set(some.positions[head, best].tolist())


def test_segments_are_merged_one_after_another() -> None:
    some, conv = some_rows(50), some_conv()
    memory = some.span(0, 10)
    for start, stop in ((10, 26), (26, 42), (42, 50)):
        memory = merge_rows(memory.join(some.span(start, stop)), 10, conv)
    got = merge_in_segments(some, 10, conv, 16)
    close(got.rows, memory.rows)
    assert merge_in_segments(some, 50, conv, 16) is not None
    close(merge_in_segments(some, 60, conv, 16).rows, some.rows)


def test_sinks_and_window_stay_as_they_are() -> None:
    prompt = tokens(120)
    full = read(tiny_engine(policy="full"), prompt)
    sequence = read(tiny_engine(policy=SPEC, budget=30), prompt)
    for near, every in zip(sequence.near, full.near, strict=True):
        assert near.length == 3 + 5 + 30 - 15  # half of so small a budget is room for later ones
        close(near.rows[:, :3], every.rows[:, :3])
        close(near.rows[:, near.length - 5 : near.length], every.rows[:, 115:120])


def test_never_more_than_the_limit() -> None:
    engine = tiny_engine(policy=SPEC, budget=30)
    sequence = read(engine, tokens(120))
    lengths = set()
    for token in tokens(60, seed=1):
        decode(engine, sequence, token[None])
        lengths |= {near.length for near in sequence.near}
    assert max(lengths) == 3 + 5 + 30
    assert min(lengths) == 3 + 5 + 30 - 15


def test_the_convolution_can_be_left_out() -> None:
    prompt, answer = tokens(120), tokens(20, seed=1)
    with_it = tiny_engine(policy=SPEC, budget=30)
    without = tiny_engine(policy=SPEC + ":convolution=false", budget=30)
    got, other = (decode(e, read(e, prompt), answer) for e in (with_it, without))
    assert (got - other).abs().max() > 1e-3


@pytest.mark.parametrize("queries", [0, 129])
def test_what_is_no_number_of_queries(queries: int) -> None:
    text = f"lococo's queries must be between 1 and 128. Got {queries}."
    with pytest.raises(InvalidOptionError, match=f"^{re.escape(text)}$"):
        LoCoCo(queries=queries)


def test_a_layer_without_mixtures_needs_no_convolution() -> None:
    tensors = random_convolutions(Geometry(3, 6, Hkv, D), seed=1, slots=SLOTS)
    tensors["blend"] = torch.tensor([0.4, 0.0, -0.1])
    layers = convolutions(tensors)
    assert [layer.slots for layer in layers] == [SLOTS, 0, 0]
    some = some_rows(40)
    full = LayerConv(tensors["weight"][1], tensors["bias"][1], tensors["blend"][1])
    got, want = (merge_rows(some, 12, conv) for conv in (layers[1], full))
    for name in ("rows", "scores", "positions"):
        ordered = [getattr(each.pick(each.positions.argsort(-1)), name) for each in (got, want)]
        torch.testing.assert_close(*ordered, rtol=0, atol=0)


@pytest.mark.parametrize("blend", [-0.3, 0.4, 1.7])
def test_rows_do_not_grow_from_segment_to_segment(blend: float) -> None:
    """They are means of others, whatever a file says: half of them are mixed anew each time."""
    some = some_rows(2000)
    some = some.pick(some.positions.argsort(-1))
    got = merge_in_segments(some, 10, some_conv(blend), 16)
    assert got.rows.abs().max() <= some.rows.abs().max()


@pytest.mark.parametrize("budget", [1, 2, 17])
def test_budgets_below_the_slots(budget: int) -> None:
    """Fewer slots then: half of the rows at most are made."""
    engine = tiny_engine(policy=SPEC, budget=budget)
    sequence = read(engine, tokens(70))
    assert decode(engine, sequence, tokens(20, seed=1)).isfinite().all()
    assert all(near.length <= 3 + 5 + budget for near in sequence.near)


def test_rows_that_stay_are_as_they_were_in_any_type() -> None:
    some, conv = some_rows(50), some_conv()
    ordered = some.pick(some.positions.argsort(-1))
    half = MergedRows(ordered.rows.bfloat16(), ordered.scores, ordered.positions)
    got = merge_in_segments(half, 10, conv, 16)
    close(got.rows, merge_in_segments(half.widened(), 10, conv, 16).rows, rtol=0, atol=0)
    kept = got.rows[:, : 10 - SLOTS]
    there = (kept[:, :, None] == half.rows.float()[:, None]).all(-1).any(-1)
    assert there.all()


def test_positions_of_mixtures_lie_between_those_of_their_rows() -> None:
    """Sinks and window stay first and last, however often the rows between them are merged."""
    engine = tiny_engine(policy=SPEC, budget=30)
    sequence = read(engine, tokens(120))
    decode(engine, sequence, tokens(60, seed=1))
    for layer in range(2):
        for head in sequence.layers[layer].positions:
            ordered = head.sort().values.tolist()
            assert ordered[:3] == [0, 1, 2]
            assert ordered[-5:] == list(range(175, 180))
            assert all(3 <= position < 175 for position in ordered[3:-5])

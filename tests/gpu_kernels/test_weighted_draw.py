from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from kernel_cases import DEVICE, close, integers, poisoned, random

from nearfar.cpu_kernels.draw import uniform
from nearfar.gpu_kernels.key_weights import (
    CURVE_POINTS,
    CURVE_UNIT,
    weigh_keys,
    weigh_keys_reference,
)
from nearfar.gpu_kernels.weighted_draw import (
    SHARE_UNIT,
    draw_keys,
    draw_keys_reference,
    inclusion_probabilities,
    row_key_reference,
    uniform_reference,
)
from nearfar.records import DrawnKeys

SEGMENT_KEYS = 1024
N = SEGMENT_KEYS + 301
SEGMENTS = 2
FETCHED = 90  # of SHARE_UNIT


def peaks_of(scores: torch.Tensor, lengths: list[int], temper: float) -> torch.Tensor:
    R, G, _ = scores.shape
    peaks = poisoned(R, G, SEGMENTS, 2)
    for r in range(R):
        length = lengths[r * len(lengths) // R]
        for s in range(-(-length // SEGMENT_KEYS)):
            part = scores[r, :, s * SEGMENT_KEYS : min(length, (s + 1) * SEGMENT_KEYS)] * temper
            peaks[r, :, s, 0] = part.amax(-1)
            peaks[r, :, s, 1] = (part - part.amax(-1, keepdim=True)).exp().sum(-1)
    return peaks


Pair = tuple[torch.Tensor, torch.Tensor]


def weighed(
    weigh: Callable[..., None],
    scores: torch.Tensor,
    lengths: list[int],
    wanted: list[int],
    temper: float,
) -> Pair:
    R, G, given = scores.shape
    padded = poisoned(R, G, SEGMENTS * SEGMENT_KEYS, dtype=scores.dtype)
    padded[..., :given] = scores
    weights = poisoned(R, SEGMENTS * SEGMENT_KEYS)
    budget_curve = torch.zeros(R, CURVE_POINTS, dtype=torch.int64, device=DEVICE)
    peaks = peaks_of(scores, lengths, temper)
    sizes = (integers(*lengths), integers(*wanted), 1)
    weigh(padded, peaks, SEGMENT_KEYS, *sizes, temper, weights, budget_curve)
    return weights, budget_curve


def drawn(
    draw: Callable[..., None],
    weights: torch.Tensor,
    budget_curve: torch.Tensor,
    lengths: list[int],
    wanted: list[int],
    steps: list[int],
    seed: int = 7,
    share: int = 1,
    readable_tokens: int | None = None,
) -> list[Pair]:
    """What both processors get together; with ``readable_tokens`` some of it is for the GPU."""
    R = len(weights)
    chosen = poisoned(R, SEGMENTS, SEGMENT_KEYS, dtype=torch.int64)
    counts = torch.zeros(R, SEGMENTS, 2, dtype=torch.int32, device=DEVICE)
    room = 0 if readable_tokens is None else SEGMENT_KEYS // 2
    fetched = poisoned(R, SEGMENTS, room, dtype=torch.int64)
    fetched_counts = torch.zeros(R, SEGMENTS, dtype=torch.int32, device=DEVICE)
    within, portion = (integers(*[n or 0] * len(lengths)) for n in (readable_tokens, FETCHED))
    sizes = (integers(*lengths), integers(*wanted), share, integers(*steps))
    out = DrawnKeys(chosen, counts, fetched, fetched_counts, within, portion)
    draw(weights, budget_curve, *sizes, seed, 3, out)
    assert torch.equal(counts[..., 1], fetched_counts)
    for s in range(SEGMENTS):
        if room and (s + 1) * SEGMENT_KEYS <= (readable_tokens or 0):
            shares = fetched_counts[:, s] - counts[:, s].sum(-1) * FETCHED / SHARE_UNIT
            assert (shares.abs() < 1).all()
        else:
            assert (fetched_counts[:, s] == 0).all()
    rows = []
    for r in range(R):
        lists = []
        for s in range(SEGMENTS):
            lists += [chosen[r, s, : counts[r, s, 0]], fetched[r, s, : counts[r, s, 1]]]
        pairs = torch.cat(lists).cpu()
        log_weights = (pairs >> 32).int().view(torch.float32)
        rows.append((pairs & 0xFFFFFFFF, log_weights))
    return rows


@pytest.mark.parametrize("G", [1, 3])
def test_weights_and_budget_curve(G: int) -> None:
    lengths, wanted = [N, 7], [50, 3]
    scores = random(4, G, N + 3) * 3
    got = weighed(weigh_keys, scores, lengths, wanted, 0.7)
    want = weighed(weigh_keys_reference, scores, lengths, wanted, 0.7)
    close(got[0], want[0], equal_nan=True, rtol=1e-4, atol=1e-9)
    budget_curves = [budget_curve.double() * CURVE_UNIT for _, budget_curve in (got, want)]
    close(*budget_curves, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("spread", [0.0, 1.0, 6.0])
def test_draws_follow_the_law(spread: float) -> None:
    """Over many seeds each key comes as often as it should, and as many as were asked for."""
    length, wanted, rounds = 400, 40, 60
    scores = (random(1, 1, length) * spread).expand(rounds, 1, length).contiguous()
    lengths, budgets = [length] * rounds, [wanted] * rounds
    weights, budget_curve = weighed(weigh_keys, scores, lengths, budgets, 1.0)
    rows = drawn(draw_keys, weights, budget_curve, lengths, budgets, list(range(rounds)))
    law = inclusion_probabilities(weights[0, :length].cpu(), wanted)
    often = torch.zeros(length)
    for indices, log_weights in rows:
        often[indices] += 1
        assert (indices.diff() > 0).all()
        # within a step of the budget curve of the exact law, which is what the weights undo
        assert (log_weights >= -1e-6).all()
        heavy = law[indices] > 0.1
        close((-log_weights).exp()[heavy], law[indices][heavy], rtol=0.2, atol=0.02)
    expected = float(law.sum())
    read = often.sum().item() / rounds
    assert 0.95 * expected - 1 <= read <= 1.05 * expected + 1
    deviation = (often / rounds - law).abs() / (law * (1 - law) / rounds + 1 / rounds**2).sqrt()
    assert deviation.max() < 5.5


def test_where_few_keys_have_all_the_weight_fewer_are_read() -> None:
    length, wanted = 400, 40
    scores = random(1, 1, length) * 40
    weights, budget_curve = weighed(weigh_keys, scores, [length], [wanted], 1.0)
    ((indices, log_weights),) = drawn(draw_keys, weights, budget_curve, [length], [wanted], [5])
    weight = weights[0, :length].cpu()
    certain = (weight * wanted > 2.0**-14).nonzero()[:, 0]
    assert 0 < len(certain) < wanted
    assert set(certain.tolist()) <= set(indices.tolist())
    assert (log_weights[torch.isin(indices, certain)] == 0).all()
    assert len(indices) <= wanted
    assert weight[certain].sum() > 1 - 1e-4


@pytest.mark.slow
def test_sums_over_the_drawn_keys_are_unbiased() -> None:
    length, wanted, rounds = 500, 60, 80
    scores = (random(1, 1, length) * 2).expand(rounds, 1, length).contiguous()
    weights, budget_curve = weighed(weigh_keys, scores, [length] * rounds, [wanted] * rounds, 1.0)
    rows = drawn(
        draw_keys, weights, budget_curve, [length] * rounds, [wanted] * rounds, list(range(rounds))
    )
    value = random(length, seed=9).cpu() * weights[0, :length].cpu() * length
    sums = torch.tensor([float((value[i] * w.exp()).sum()) for i, w in rows])
    assert abs(sums.mean() - value.sum()) < 4 * sums.std() / math.sqrt(rounds)


def test_the_same_keys_as_the_reference_where_the_constant_agrees() -> None:
    """With equal weights nothing is certain: both laws are wanted / N."""
    length, wanted = SEGMENT_KEYS + 9, 100
    weights, budget_curve = weighed(
        weigh_keys, torch.zeros(1, 1, length).to(DEVICE), [length], [wanted], 1
    )
    arguments = (weights, budget_curve, [length], [wanted], [12345], 2**40 + 5)
    ((got, got_weights),) = drawn(draw_keys, *arguments)
    ((want, want_weights),) = drawn(draw_keys_reference, *arguments)
    assert got.tolist() == want.tolist()
    close(got_weights, want_weights, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("length", "wanted"), [(1, 1), (40, 40), (40, 1000), (N, N)])
def test_a_budget_of_all_keys_draws_all(length: int, wanted: int) -> None:
    scores = random(2, 2, N) * 80  # most weights underflow to zero
    weights, budget_curve = weighed(weigh_keys, scores, [length], [wanted], 1.0)
    for indices, log_weights in drawn(draw_keys, weights, budget_curve, [length], [wanted], [1]):
        assert indices.tolist() == list(range(length))
        assert (log_weights == 0).all()


def test_a_share_of_the_budget_and_rows_that_differ() -> None:
    length, wanted = 300, 90
    weights, _ = weighed(weigh_keys, torch.zeros(4, 1, length).to(DEVICE), [length], [wanted], 1)
    budget_curve = torch.zeros(4, 2, CURVE_POINTS, dtype=torch.int64, device=DEVICE)
    sizes = (integers(length), integers(wanted), 3, 1.0)
    scores = torch.zeros(4, 1, length, device=DEVICE)
    weigh_keys(scores, peaks_of(scores, [length], 1.0), SEGMENT_KEYS, *sizes, weights, budget_curve)
    rows = drawn(draw_keys, weights, budget_curve, [length], [wanted], [5], share=3)
    assert len({tuple(indices.tolist()) for indices, _ in rows}) == 4
    for indices, log_weights in rows:
        assert 12 < len(indices) < 52
        close(log_weights, torch.full_like(log_weights, math.log(10)), rtol=0.02, atol=0)


def test_no_keys_leave_everything_as_it_is() -> None:
    weights = poisoned(1, SEGMENTS * SEGMENT_KEYS)
    budget_curve = torch.zeros(1, CURVE_POINTS, dtype=torch.int64, device=DEVICE)
    ((indices, _),) = drawn(draw_keys, weights, budget_curve, [0], [0], [1])
    assert len(indices) == 0


def test_random_numbers_are_those_of_the_host() -> None:
    assert row_key_reference(2**40 + 5, 0, 0, 0) != row_key_reference(5, 0, 0, 0)
    for key in (0, 7, 2**31 - 1, 2**32 - 5):
        numbers = uniform_reference(torch.arange(50), key)
        host = [uniform(np.uint32(i), np.uint32(key & 0xFFFFFFFF)) for i in range(50)]
        assert numbers.tolist() == host


def test_long_segments_and_half_precision() -> None:
    """A segment of several tiles, scores as they are kept."""
    length, wanted, size = 3000, 100, 4096
    scores = poisoned(1, 2, size, dtype=torch.float16)
    scores[..., :length] = random(1, 2, length) * 2
    results = []
    for weigh in (weigh_keys, weigh_keys_reference):
        weights = poisoned(1, size)
        budget_curve = torch.zeros(1, CURVE_POINTS, dtype=torch.int64, device=DEVICE)
        used = scores[..., :length].float()
        top = used.amax(-1)
        peaks = torch.stack([top, (used - top[..., None]).exp().sum(-1)], -1)[:, :, None]
        sizes = (integers(length), integers(wanted), 1, 1.0)
        weigh(scores, peaks, size, *sizes, weights, budget_curve)
        results.append((weights, budget_curve))
    close(results[0][0], results[1][0], rtol=1e-3, atol=1e-9)
    budget_curves = [budget_curve.double() * CURVE_UNIT for _, budget_curve in results]
    close(*budget_curves, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("readable_tokens", [0, SEGMENT_KEYS - 1, SEGMENT_KEYS, N + 1000])
@pytest.mark.parametrize("wanted", [1, 90, N])
def test_what_the_gpu_fetches_is_a_part_of_the_same_keys(readable_tokens: int, wanted: int) -> None:
    scores = random(2, 1, N + 2) * 2
    weights, budget_curve = weighed(weigh_keys, scores, [N], [wanted], 1.0)
    arguments = (weights, budget_curve, [N], [wanted], [5])
    plain = drawn(draw_keys, *arguments)
    shared = drawn(draw_keys, *arguments, readable_tokens=readable_tokens)
    for (indices, log_weights), (want, want_weights) in zip(shared, plain, strict=True):
        assert torch.equal(indices, want)
        assert torch.equal(log_weights, want_weights)


def test_the_reference_divides_alike() -> None:
    weights, budget_curve = weighed(weigh_keys, random(1, 1, N) * 0.1, [N], [N], 1.0)
    for share in (0, 3, 128, 200):
        lists = []
        for draw in (draw_keys, draw_keys_reference):
            chosen = torch.zeros(1, SEGMENTS, SEGMENT_KEYS, dtype=torch.int64, device=DEVICE)
            counts = torch.zeros(1, SEGMENTS, 2, dtype=torch.int32, device=DEVICE)
            fetched = chosen[..., : SEGMENT_KEYS // 2].clone()
            out = DrawnKeys(
                chosen, counts, fetched, counts[..., 0].clone(), integers(N), integers(share)
            )
            draw(weights, budget_curve, integers(N), integers(N), 1, integers(5), 7, 3, out)
            lists.append(out)
        (chosen, *got), (want_chosen, *want) = lists
        assert torch.equal(chosen & 0xFFFFFFFF, want_chosen & 0xFFFFFFFF)
        assert torch.equal(got.pop(1) & 0xFFFFFFFF, want.pop(1) & 0xFFFFFFFF)
        for mine, theirs in zip(got, want, strict=True):
            assert torch.equal(mine, theirs)
        assert lists[0].counts[0, 0, 1] == SEGMENT_KEYS * min(share, 128) // SHARE_UNIT


def test_a_light_key_that_is_read_counts_by_the_chance_that_it_had() -> None:
    """Random numbers have 24 bits, so a chance is rounded up to a multiple of 2^-24."""
    length, wanted, seed, heavy, rounds = 1000, 5, 7, 10, 4
    scores = torch.zeros(1, 1, length, device=DEVICE)
    scores[..., heavy:] = -torch.linspace(11, 13, length - heavy)
    light = torch.arange(heavy, length)
    least = [
        float(uniform_reference(light, row_key_reference(seed, 3, step, 0)).min())
        for step in range(2000)
    ]
    steps = np.argsort(least)[:rounds].tolist()  # in these steps some light key is read
    lengths, budgets = [length] * rounds, [wanted] * rounds
    scores = scores.expand(rounds, 1, length).contiguous()
    weights, budget_curve = weighed(weigh_keys, scores, lengths, budgets, 1.0)
    for draw in (draw_keys, draw_keys_reference):
        rows = drawn(draw, weights, budget_curve, lengths, budgets, steps, seed)
        read = torch.cat([log_weights[indices >= heavy] for indices, log_weights in rows])
        chances = (-read.double()).exp() * 2**24
        assert len(chances) >= 2
        assert chances.max() < 300
        close(chances, chances.round(), rtol=1e-5, atol=0)

"""The sketch policy: its budget, its law by bits, unbiased attention, and draws that repeat."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tiny_engine import decode, read, tiny_engine, tokens

from nearfar.config import Budget
from nearfar.cpu_kernels.reference import attend_all, attend_selected
from nearfar.errors import InvalidOptionError
from nearfar.lsh.rotation import rotation
from nearfar.lsh.sketch import LEVEL_WIDTH
from nearfar.lsh.sketch_reference import read_probabilities, sketch_keys
from nearfar.policies.index import FarIndex
from nearfar.policies.registry import create_policy
from nearfar.policies.sketch import Sketch
from nearfar.policies.topk_oracle import TopkOracle
from nearfar.records import ALL, FarView, Geometry, Selection

GEOMETRY = Geometry(layers=2, query_heads=6, kv_heads=2, head_dim=16)
LAYER = 1


def make_far(N: int, offset: float = 1.0) -> FarView:
    """Keys around a mean of their own, and values that depend on them, as in a model."""
    generator = torch.Generator().manual_seed(N)
    rows = torch.full((2, N + 5, 32), torch.nan)
    keys = torch.randn(2, N, 16, generator=generator)
    rows[:, :N, :16] = keys + offset * torch.randn(2, 1, 16, generator=generator)
    rows[:, :N, 16:] = keys.roll(5, 2) + 0.5 * torch.randn(2, N, 16, generator=generator)
    return FarView(rows, N)


def make_query(seed: int = 0, size: float = 1.0) -> torch.Tensor:
    return size * torch.randn(6, 16, generator=torch.Generator().manual_seed(seed)) / 2


def indexed(policy: Sketch | TopkOracle, far: FarView, budget: float, seed: int = 0) -> FarIndex:
    index = policy.new_index(GEOMETRY, Budget(budget), seed)
    for layer in range(GEOMETRY.layers):
        index.extend(layer, far)
    return index


def chosen(
    index: FarIndex, query: torch.Tensor, far: FarView, step: int = 0, layer: int = LAYER
) -> Selection:
    selection = index.select(layer, query, far, step)
    assert isinstance(selection, Selection)
    assert len(selection.offsets) == len(query) // selection.heads_per_row + 1
    assert selection.offsets[-1] == len(selection.indices) == len(selection.log_weights)
    assert 0 <= selection.indices.min() <= selection.indices.max() < far.length
    return selection


def counts_of(selection: Selection) -> NDArray[np.int64]:
    return np.diff(selection.offsets)


def listed(selection: Selection) -> list[Any]:
    return [selection.offsets.tolist(), selection.indices.tolist(), selection.log_weights.tolist()]


def output_error(policy: Sketch | TopkOracle, far: FarView, budget: float, size: float) -> float:
    """Relative error of the attention output, root mean square over eight queries."""
    index, errors = indexed(policy, far, budget), []
    for step in range(8):
        query = make_query(step, size)
        exact = attend_all(query, far).out
        out = attend_selected(query, far, chosen(index, query, far, step)).out
        errors.append(float((out - exact).square().sum() / exact.square().sum()))
    return float(np.sqrt(np.mean(errors)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("per", "budget", "rows", "wanted"),
    [("group", 60, 2, 60), ("head", 60, 6, 20), ("group", 0.1, 2, 50), ("head", 0.1, 6, 16)],
)
def test_the_budget_is_what_a_group_reads(per: str, budget: float, rows: int, wanted: int) -> None:
    far, query = make_far(500), make_query()
    index = indexed(Sketch(per=per), far, budget)
    counts = []
    for step in range(200):
        selection = chosen(index, query, far, step)
        assert selection.heads_per_row == 6 // rows
        counts.append(counts_of(selection))
    total = np.sum(counts)
    trials = 200 * rows
    # Poisson sampling: the variance of a count is below its mean
    assert abs(total - trials * wanted) < 4 * np.sqrt(trials * wanted)
    assert np.std(counts, axis=0).max() < 1.2 * np.sqrt(wanted)


def test_a_head_reads_a_key_even_where_the_budget_is_less_than_the_group() -> None:
    far, query = make_far(100), make_query()
    index = indexed(Sketch(per="head"), far, 2)
    counts = [counts_of(index.select(LAYER, query, far, s)) for s in range(300)]  # type: ignore[arg-type]
    assert np.mean(counts) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("per", ["group", "head"])
def test_a_budget_for_all_keys_reads_all(per: str) -> None:
    far, query = make_far(65), make_query()
    for budget in (65, 66, 10_000, 0.999):
        assert indexed(Sketch(per=per), far, budget).select(LAYER, query, far, 0) is ALL
    nothing = FarView(far.rows, 0)
    assert indexed(Sketch(per=per), nothing, 64).select(LAYER, query, nothing, 0) is ALL
    assert isinstance(indexed(Sketch(per=per), far, 64).select(LAYER, query, far, 0), Selection)


@pytest.mark.parametrize("per", ["group", "head"])
@pytest.mark.parametrize(
    ("bits", "temper", "exponent"),
    [(1, 0, 0.7), (2, 0, 0.7), (3, 0, 1), (4, 0, 1), (4, 0.5, 0.5), (1, 1.2, 1.2)],
)
def test_log_weights_are_the_probabilities_of_brute_force(
    bits: int, temper: float, exponent: float, per: str
) -> None:
    """The law is flatter for the noisy estimates of one and two bits."""
    far, query = make_far(300), make_query()
    selection = chosen(indexed(Sketch(bits, per, temper), far, 90), query, far)
    turn = rotation(16).double().numpy()
    heads = 3 if per == "group" else 1
    for row in range(6 // heads):
        keys = far.keys().double().numpy()[row * heads // 3]
        sketch = sketch_keys(keys, keys.mean(0), turn, bits, LEVEL_WIDTH[bits])
        scores = sketch.scores(query[row * heads : (row + 1) * heads].double().numpy())
        probabilities = read_probabilities(scores, 90 * heads // 3, exponent)
        span = slice(selection.offsets[row], selection.offsets[row + 1])
        want = -np.log(probabilities[selection.indices[span]])
        close = np.abs(selection.log_weights[span] - want) < 2e-3
        assert close.mean() > 0.95  # a code may lie on the other side of a border


def test_temper_by_bits_and_by_hand() -> None:
    assert [Sketch(bits=bits).exponent for bits in (1, 2, 3, 4)] == [0.7, 0.7, 1.0, 1.0]
    assert Sketch(bits=1, temper=1.0).exponent == 1.0
    assert Sketch(bits=4, temper=0.5).exponent == 0.5


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["sketch", "sketch:per=head", "sketch:bits=1", "sketch:bits=2"])
def test_sums_of_attention_are_unbiased(spec: str) -> None:
    """Both of them, that of exp(logit) and that of exp(logit) value, by head and by coordinate."""
    far, query, steps = make_far(120), make_query(), 1500
    policy = create_policy(spec)
    assert isinstance(policy, Sketch)
    index = indexed(policy, far, 24)
    logits = torch.einsum("hgd,hnd->hgn", query.view(2, 3, 16), far.keys()).double()
    values = torch.cat([torch.ones(2, 120, 1), far.values()], 2).double()
    terms = (logits.exp()[..., None] * values[:, None]).view(6, 120, 17).numpy()
    full = terms.sum(1)

    def estimate(selection: Selection, weigh: bool) -> NDArray[np.float64]:
        sums = []
        for head in range(6):
            row = head // selection.heads_per_row
            span = slice(selection.offsets[row], selection.offsets[row + 1])
            weights = np.exp(selection.log_weights[span]) if weigh else 1.0
            sums.append((terms[head, selection.indices[span]].T * weights).sum(1))
        return np.array(sums)

    drawn = [index.select(LAYER, query, far, step) for step in range(steps)]
    for weigh in (True, False):
        sums = np.array([estimate(s, weigh) for s in drawn if isinstance(s, Selection)])
        assert len(sums) == steps
        deviations = np.abs(sums.mean(0) - full) / (sums.std(0) / np.sqrt(steps))
        if weigh:
            assert deviations.max() < 4.5  # of 102 numbers
        else:
            assert deviations[:, 0].min() > 30
            assert np.median(deviations) > 10


@pytest.mark.parametrize("per", ["group", "head"])
@pytest.mark.parametrize("size", [0.5, 2.0])
def test_output_error_falls_with_the_budget(per: str, size: float) -> None:
    far = make_far(2000)
    errors = [output_error(Sketch(per=per), far, budget, size) for budget in (30, 120, 480, 1900)]
    for earlier, later in itertools.pairwise(errors):
        assert later < 0.7 * earlier


@pytest.mark.parametrize("per", ["group", "head"])
def test_sampling_beats_the_best_keys_where_attention_is_flat(per: str) -> None:
    far = make_far(2000)
    for budget in (60, 240, 960):
        sampled = output_error(Sketch(per=per), far, budget, size=0.5)
        best = output_error(TopkOracle(per=per), far, budget, size=0.5)
        assert sampled < 0.6 * best


def test_output_error_falls_with_bits() -> None:
    far = make_far(2000)
    errors = [output_error(Sketch(bits=bits, temper=1.0), far, 200, 2.0) for bits in (1, 2, 4)]
    assert errors[0] > 1.3 * errors[1] > 1.3**2 * errors[2]


def test_a_heavy_key_is_read_for_certain_by_every_head_of_its_group() -> None:
    far = make_far(1000)
    query = make_query(size=0.1)
    query[4] = 20 * (far.keys()[1, 777] - far.keys()[1].mean(0)) / 16
    index = indexed(Sketch(), far, 30)
    for step in range(20):
        selection = chosen(index, query, far, step)
        second = slice(selection.offsets[1], selection.offsets[2])
        where = np.flatnonzero(selection.indices[second] == 777)
        assert len(where) == 1
        assert selection.log_weights[second][where[0]] == pytest.approx(0, abs=1e-6)


def test_draws_depend_on_seed_layer_and_step_alone() -> None:
    far, query = make_far(300), make_query()
    index = indexed(Sketch(), far, 40)
    first = listed(chosen(index, query, far, 5, layer=0))
    assert listed(chosen(index, query, far, 6, layer=0)) != first
    assert listed(chosen(index, query, far, 5, layer=1)) != first
    assert listed(chosen(index, query, far, 5, layer=0)) == first
    assert listed(chosen(indexed(Sketch(), far, 40), query, far, 5, layer=0)) == first
    assert listed(chosen(indexed(Sketch(), far, 40, seed=1), query, far, 5, layer=0)) != first
    rows = np.split(chosen(index, query, far).indices, chosen(index, query, far).offsets[1:-1])
    assert rows[0].tolist() != rows[1].tolist()


def test_whole_runs_repeat_with_the_seed_and_differ_without() -> None:
    prompt, answer = tokens(400), tokens(4, seed=1)
    logits = []
    for seed in (7, 7, 8):
        engine = tiny_engine(policy="sketch", budget=30, seed=seed)
        logits.append(decode(engine, read(engine, prompt), answer))
    assert torch.equal(logits[0], logits[1])
    assert not torch.equal(logits[0], logits[2])


def test_keys_that_come_later_are_found() -> None:
    far = make_far(500)
    index = Sketch().new_index(GEOMETRY, Budget(8), 0)
    for length in (100, 101, 163, 400, 401, 500):
        view = FarView(far.rows, length)
        index.extend(LAYER, view)
        newest = view.keys(length - 1, length)[:, 0] - view.keys().mean(1)
        selection = chosen(index, 2 * newest.repeat_interleave(3, 0), view)
        for start, stop in itertools.pairwise(selection.offsets):
            assert length - 1 in selection.indices[start:stop]


def test_rewinding_restores_selections() -> None:
    far, query = make_far(600), make_query()
    start = FarView(far.rows, 140)
    index = indexed(Sketch(), start, 20)
    before, mark = listed(chosen(index, query, start)), index.mark()
    for length in (141, 300, 600):  # the last is beyond four times the first
        index.extend(LAYER, FarView(far.rows, length))
        assert listed(chosen(index, query, FarView(far.rows, length))) != before
        index.rewind(mark)
        assert listed(chosen(index, query, start)) == before


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_bytes_are_as_predicted(bits: int) -> None:
    policy = Sketch(bits=bits)
    for N in (0, 1, 64, 65, 1000):
        far = make_far(N)
        assert indexed(policy, far, 8).index_bytes() == policy.predict_index_bytes(GEOMETRY, N)
    large = Geometry(layers=32, query_heads=32, kv_heads=8, head_dim=128)
    key_bytes = {1: 20, 2: 36, 3: 52, 4: 68}[bits]
    codes, scratch = 32 * 8 * 2**17 * key_bytes, policy.predict_index_bytes(large, 2**17)
    assert codes < scratch < codes + 26 * 2**20


@pytest.mark.parametrize(
    ("parameters", "text"),
    [
        ({"bits": 0}, "sketch's bits must be 1, 2, 3 or 4. Got 0."),
        ({"bits": 5}, "sketch's bits must be 1, 2, 3 or 4. Got 5."),
        ({"per": "layer"}, "sketch's per must be 'group' or 'head'. Got 'layer'."),
        ({"temper": -0.1}, "sketch's temper must be between 0 (by bits) and 2. Got -0.1."),
        ({"temper": 2.5}, "sketch's temper must be between 0 (by bits) and 2. Got 2.5."),
        ({"temper": np.nan}, "sketch's temper must be between 0 (by bits) and 2. Got nan."),
    ],
)
def test_parameters_are_checked(parameters: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidOptionError) as caught:
        Sketch(**parameters)
    assert str(caught.value) == text


def test_the_command_line_reaches_the_parameters() -> None:
    policy = create_policy("sketch:bits=2:per=head:temper=0.9")
    assert policy == Sketch(bits=2, per="head", temper=0.9)
    assert policy.traits.keeps_far

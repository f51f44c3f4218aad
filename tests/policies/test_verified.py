"""The bound that is stated holds as often as is stated, and what it costs is told."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator
from pathlib import Path

import numba
import numpy as np
import pytest
import saved_cases
import torch

from nearfar.config import Budget
from nearfar.cpu_kernels.reference import attend_all, attend_selected
from nearfar.errors import InvalidOptionError
from nearfar.evaluation.synthetic import PowerLawKeys
from nearfar.lsh.error_bound import sample_error
from nearfar.policies.registry import create_policy
from nearfar.policies.verified import ROUNDS, Verified, VerifyingIndex
from nearfar.records import ALL, FarView, Geometry, Selection

EPSILON, DELTA = 0.3, 0.1


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Small products gain nothing from more, and wait for busy neighbours."""
    before = torch.get_num_threads(), numba.get_num_threads()
    torch.set_num_threads(1)
    numba.set_num_threads(1)
    yield
    torch.set_num_threads(before[0])
    numba.set_num_threads(before[1])


def index_of(far: FarView, heads: int, budget: float, policy: Verified) -> VerifyingIndex:
    Hkv, D = far.rows.shape[0], far.head_dim
    index = VerifyingIndex(policy, Geometry(1, heads, Hkv, D), Budget(budget), 0)
    index.extend(0, far)
    return index


def errors(index: VerifyingIndex, query: torch.Tensor, far: FarView, step: int) -> torch.Tensor:
    """The larger of the two relative errors [Hq] of one selection."""
    selection = index.select(0, query, far, step)
    assert isinstance(selection, Selection)
    exact, got = attend_all(query, far), attend_selected(query, far, selection)
    output = (got.out - exact.out).norm(dim=1) / exact.out.norm(dim=1)
    return torch.maximum(output, (got.lse - exact.lse).exp().sub(1).abs()).float()


def random_sets() -> Iterator[tuple[FarView, Iterator[torch.Tensor]]]:
    """Keys without structure, of a power law, and in clusters; values with and without a mean."""
    generator = torch.Generator().manual_seed(5)
    for number in range(12):
        N, D = 1500 + 90 * number, 32
        values = torch.randn(2, N, D, generator=generator) + (number % 2)
        if number % 3 == 0:
            keys = torch.randn(2, N, D, generator=generator) * (1 + number / 6)
        elif number % 3 == 1:
            keys = PowerLawKeys(2, D, torch.float32, torch.device("cpu"), number).draw(N)
        else:
            places = 3 * torch.randn(2, 30, D, generator=generator)
            which = torch.randint(30, (N,), generator=generator)
            keys = places[:, which] + torch.randn(2, N, D, generator=generator)
        queries = (torch.randn(6, D, generator=generator) * D**-0.5 for _ in range(28))
        yield FarView(torch.cat([keys, values], -1), N), queries


def coverage(sets: Iterator[tuple[FarView, Iterator[torch.Tensor]]], budget: int) -> list[float]:
    """Errors of all heads of all selections."""
    found: list[float] = []
    policy = Verified(epsilon=EPSILON, delta=DELTA)
    for far, queries in sets:
        index = None
        for step, query in enumerate(queries):
            index = index or index_of(far, len(query), budget, policy)
            found += errors(index, query, far, step).tolist()
    return found


def test_the_bound_holds_for_random_keys() -> None:
    found = coverage(random_sets(), budget=100)
    assert len(found) == 12 * 28 * 6 > 2000
    assert np.mean([error <= EPSILON for error in found]) >= 1 - DELTA
    assert np.mean([error > 0.01 for error in found]) > 0.4  # few have read everything


@pytest.mark.model
def test_the_bound_holds_for_a_model_on_text() -> None:
    """Queries of the last tokens over the keys of every third layer of the built-in model."""
    from nearfar.runtime.engine.engine import Engine
    from nearfar.runtime.steps.decode import Attended, decode_step
    from nearfar.runtime.steps.prefill import prefill

    engine = Engine.from_pretrained("smollm2-135m-128k", policy="full-far", window=8, threads=1)
    text = Path("examples/carrow_point.md").read_text()
    ids = torch.tensor(engine.tokenizer.encode(text))[:1100]
    sequence = engine.new_sequence()
    prefill(engine.decoder, sequence, ids[:-9], engine.chunk_tokens)
    stats: dict[int, list[torch.Tensor]] = {}

    def note(seen: Attended) -> torch.Tensor:
        stats.setdefault(seen.layer, []).append(seen.query.clone())
        return seen.partial.out

    for token in ids[-9:]:
        decode_step(engine.decoder, [sequence], token[None], note)
    layers = list(range(0, 30, 3))
    sets = ((sequence.far.store.view(i), iter(stats[i])) for i in layers)
    found = coverage(sets, budget=60)
    assert len(found) == 10 * 9 * 9
    assert np.mean([error <= EPSILON for error in found]) >= 1 - DELTA


def test_standard_errors_are_those_of_many_samples() -> None:
    generator = torch.Generator().manual_seed(2)
    keys, values = torch.randn(2, 400, 16, generator=generator)
    values += 1
    query = torch.randn(3, 16, generator=generator) / 4
    logits = query.double() @ keys.double().T
    exact = logits.softmax(-1) @ values.double()
    pi = torch.rand(400, generator=generator) * 0.6 + 0.4
    outputs, masses, told = [], [], []
    for _ in range(600):
        read = torch.rand(400, generator=generator) < pi
        log_weights = -pi[read].log()
        error = sample_error(query, keys[read], values[read], log_weights)
        weighed = logits[:, read] + log_weights
        out = weighed.softmax(-1) @ values[read].double()
        outputs.append((out - exact).norm(dim=1) / exact.norm(dim=1))
        masses.append((weighed.logsumexp(1) - logits.logsumexp(1)).exp() - 1)
        told.append(torch.cat([error.output, error.mass]))
    seen = torch.cat([torch.stack(each).square().mean(0).sqrt() for each in (outputs, masses)])
    torch.testing.assert_close(torch.stack(told).mean(0).double(), seen, rtol=0.15, atol=0.0)


def test_a_tighter_bound_reads_more_up_to_everything() -> None:
    far, queries = next(random_sets())
    query = next(queries)
    rows, largest = [], []
    for epsilon in (0.9, 0.3, 0.1, 0.02, 1e-6):
        index = index_of(far, 6, 60, Verified(epsilon=epsilon))
        largest.append(float(errors(index, query, far, 0).max()))
        account = index.pop_verification()
        assert account.selections == 2
        assert account.bound <= epsilon
        selection = index.select(0, query, far, 0)
        assert isinstance(selection, Selection)
        rows.append(len(selection.indices))
    assert rows == sorted(rows)
    assert rows[-1] == 2 * far.length
    assert largest[-1] < 1e-5
    assert (account.widened, account.exhausted, account.missed_mass) == (2, 2, 0.0)


def test_the_account_starts_anew() -> None:
    far, queries = next(random_sets())
    index = index_of(far, 6, 60, Verified(epsilon=0.6))
    for step, query in enumerate(itertools.islice(queries, 3)):
        index.select(0, query, far, step)
    account = index.pop_verification()
    assert account.selections == 6
    assert 0 < account.bound <= 0.6
    assert 0 <= account.exhausted <= account.widened <= 6
    assert 0 < account.missed_mass < 1
    assert index.pop_verification().selections == 0
    assert index_of(far, 6, far.length, Verified()).select(0, query, far, 0) is ALL


def test_an_answer_says_what_held(tmp_path: Path) -> None:
    engine = saved_cases.tiny_engine(tmp_path, policy="verified:epsilon=0.5", budget=20)
    document = engine.read(saved_cases.TEXT)
    held = document.ask(saved_cases.QUESTION, saved_cases.NINE).verification
    assert held is not None
    geometry = engine.model_config.geometry
    # a selection of each step after the first token, which comes with the question
    assert held.selections == 8 * geometry.layers * geometry.kv_heads
    assert held.bound <= 0.5
    other = engine.with_policy("sketch").read(saved_cases.TEXT)
    assert other.ask(saved_cases.QUESTION, saved_cases.NINE).verification is None


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("verified:epsilon=0", "verified's epsilon must be between 0 and 1. Got 0.0."),
        ("verified:delta=1", "verified's delta must be between 0 and 1. Got 1.0."),
        ("verified:bits=5", "verified's bits must be 1, 2, 3 or 4. Got 5."),
    ],
)
def test_values_that_cannot_be_used(spec: str, text: str) -> None:
    with pytest.raises(InvalidOptionError, match=f"^{re.escape(text)}$"):
        create_policy(spec)


@pytest.mark.parametrize("delta", [0.3, 0.05, 1e-4])
def test_all_chances_to_err_share_delta(delta: float) -> None:
    """Two errors, each on two sides, in every draw that may be accepted."""
    beyond = math.erfc(Verified(delta=delta).quantile / math.sqrt(2))  # on both sides
    assert 2 * ROUNDS * beyond == pytest.approx(delta, rel=1e-9)


def test_the_bound_that_is_told_is_that_of_the_keys_read() -> None:
    far, queries = next(itertools.islice(random_sets(), 1, None))
    query, policy = next(queries), Verified(epsilon=0.9)
    index = index_of(far, 6, 400, policy)
    selection = index.select(0, query, far, 0)
    assert isinstance(selection, Selection)
    account = index.pop_verification()
    assert account.widened == 0
    largest, read = 0.0, 1.0
    for head, group in enumerate(query.view(2, 3, -1)):
        span = slice(selection.offsets[head], selection.offsets[head + 1])
        keys, values = far.gather(head, torch.from_numpy(selection.indices[span]))
        weights = torch.from_numpy(selection.log_weights[span])
        error = sample_error(group, keys, values, weights)
        largest = max(largest, *error.output.tolist(), *error.mass.tolist())
        read = min(read, *error.read_mass.tolist())
    assert account.bound == pytest.approx(policy.quantile * largest, rel=1e-5)
    assert account.missed_mass == pytest.approx(1 - read, rel=1e-5)

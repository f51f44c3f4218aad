from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_comparison import CONTEXT, TASKS, compare, tiny_engine_of, without_cost
from tiny_folder import make_folder

from nearfar.evaluation.harness.plan import (
    BOUNDED,
    EXACT,
    NO_CONTEXT,
    ONCE,
    SELECTS,
    Variation,
    make_variations,
    treatment_of,
)
from nearfar.evaluation.harness.results import Results, Row
from nearfar.evaluation.harness.timing import TimeLeft
from nearfar.evaluation.haystack import Haystack
from nearfar.evaluation.tasks.base import Material, Question
from nearfar.evaluation.tasks.niah import Niah
from nearfar.evaluation.tasks.questions import OwnQuestions
from nearfar.evaluation.tasks.text import DistancesTask, Throughput
from nearfar.policies import registry
from nearfar.policies.base import Policy
from nearfar.policies.h2o import H2O
from nearfar.policies.index import FarIndex, Stateless
from nearfar.policies.topk_oracle import TopkOracle
from nearfar.records import AllOrNone, FarView, Selection
from nearfar.runtime.engine.engine import Engine
from nearfar.runtime.engine.shared_prefill import prefill_once


class Broken(TopkOracle):
    """Fails when it should select."""

    def new_index(self, *_: Any) -> FarIndex:
        return _Fails()


class _Fails(Stateless):
    def select(
        self,
        layer: int,  # noqa: ARG002
        query: torch.Tensor,  # noqa: ARG002
        far: FarView,  # noqa: ARG002
        step: int,  # noqa: ARG002
    ) -> Selection | AllOrNone:
        raise ZeroDivisionError("division by zero")


class HeavyOnce(H2O):
    """Heavy hitters of the prompt alone."""

    traits = dataclasses.replace(H2O.traits, evicts_once=True)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    folder = tmp_path_factory.mktemp("tiny")
    make_folder(folder)
    return tiny_engine_of(folder)


@pytest.fixture(scope="module")
def whole(engine: Engine) -> list[Row]:
    results = Results()
    assert compare(engine, results)
    return list(results)


def test_every_sample_has_a_row_under_every_policy_and_exact_attention_first(
    whole: list[Row],
) -> None:
    by_sample: dict[tuple[Any, ...], list[str]] = {}
    for row in whole:
        key = row.key
        by_sample.setdefault((key.task, key.case, key.question), []).append(key.policy)
        assert row.error is None
    assert all(each == ["full", "sketch", "streaming-llm", "h2o"] for each in by_sample.values())
    counts = {task: sum(key[0] == task for key in by_sample) for task, *_ in by_sample}
    assert counts == {"niah_single_2": 4, "needles": 4, "perplexity": 4, "distances": 4}
    needles = [key[1:] for key in by_sample if key[0] == "needles"]
    assert needles == [(0, 0), (0, 1), (0, 2), (1, 0)]  # 4 questions, 3 of a case


def test_rows_say_what_was_done_and_what_it_took(whole: list[Row]) -> None:
    row = next(row for row in whole if (row.key.task, row.key.policy) == ("needles", "sketch"))
    assert row.treatment == SELECTS
    assert row.budget_bytes == 40 * 3 * 2 * 2 * 6 * 4  # keys, layers, heads, K and V, D, float32
    assert row.of == 3
    outcome, cost = row.outcome, row.cost
    assert outcome is not None
    assert cost is not None
    assert outcome.depth == pytest.approx(1 / 6)
    assert outcome.metric == "facts found"
    assert outcome.score in (0, 100)
    assert len(outcome.token_ids) <= 4
    assert 0.97 * CONTEXT < cost.prompt_tokens + 4 <= CONTEXT
    assert cost.shared_reading
    assert cost.read_seconds > 0 < cost.first_token_seconds
    assert cost.step_ms is not None
    assert 0 < cost.step_ms[0] <= cost.step_ms[1] <= cost.step_ms[2]
    # rows of one KV head: budget, both heads of three layers, drawn at random around it
    assert cost.far_bytes_read_per_token == pytest.approx(row.budget_bytes, rel=0.3)
    assert cost.near_bytes > 0 < cost.far_bytes
    assert "1 threads of" in cost.machine


def test_exact_attention_agrees_with_itself_and_has_no_distance(whole: list[Row]) -> None:
    for row in whole:
        assert row.outcome is not None
        if row.key.policy == "full":
            assert row.treatment == EXACT
            assert row.outcome.agreement in (None, 1.0)
            if row.key.task == "distances":
                assert row.outcome.score == pytest.approx(0, abs=1e-9)
                assert np.max(row.outcome.details["error"]) < 1e-5
                assert np.min(row.outcome.details["mass"]) == pytest.approx(1, abs=1e-5)


def test_a_run_that_was_stopped_anywhere_goes_on_to_the_same_rows(
    engine: Engine, whole: list[Row], tmp_path: Path
) -> None:
    path = tmp_path / "results.jsonl"
    finished = False
    stops = 0
    while not finished:
        left = 7

        def few(_: Row) -> bool:
            nonlocal left
            left -= 1
            return left == 0

        with Results(path) as results:
            finished = compare(engine, results, stop=few)
        stops += not finished
    assert stops > 5
    with Results(path) as results:
        assert without_cost(results) == without_cost(whole)
        assert compare(engine, results, stop=lambda _: pytest.fail("nothing was left"))


def test_a_finished_case_is_not_even_made_again(
    engine: Engine, whole: list[Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    results = Results()
    for row in whole:
        results.add(row)
    monkeypatch.setattr(Niah, "case", lambda *_: pytest.fail("made"))
    assert compare(engine, results, tasks=TASKS[:1])


def test_a_context_is_read_once_for_all_policies_that_allow_it(
    engine: Engine, whole: list[Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[bool] = []

    def counted(*args: Any, with_attention: bool) -> Any:
        reads.append(with_attention)
        return prefill_once(*args, with_attention=with_attention)

    monkeypatch.setattr("nearfar.evaluation.harness.contexts.prefill_once", counted)
    results = Results()
    policies = ("sketch", "streaming-llm", "topk-oracle", "full-far", "h2o", "h2o:recent_share=1.0")
    compare(engine, results, policies=policies, budgets=(40, 60), tasks=TASKS[:2], samples=3)
    assert reads == [False, True] * 4  # three cases of one question and one of three
    same = [row for row in without_cost(whole) if row.key.task == "niah_single_2"]
    mine = {row.key: row for row in without_cost(results)}
    assert [mine[row.key] for row in same if row.key in mine and row.key.policy != "full"] == [
        row for row in same if row.key.case < 3 and row.key.policy != "full"
    ]


def test_a_reading_that_does_not_fit_is_made_by_each_policy_itself(
    engine: Engine, whole: list[Row]
) -> None:
    """Far memory holds what a policy keeps, and not a reading beside it."""
    geometry = engine.model_config.geometry
    reading = geometry.layers * geometry.kv_heads * 2 * geometry.head_dim * CONTEXT * 4
    small = engine.with_config(engine.config.replace(far_memory_bytes=reading // 2))
    results = Results()
    compare(small, results, policies=("streaming-llm",), tasks=TASKS[:2])
    rows = list(results)
    assert all(row.cost is not None and not row.cost.shared_reading for row in rows)
    same = {row.key: row for row in without_cost(whole)}
    assert without_cost(rows) == [same[row.key] for row in rows]


def test_what_fails_is_a_row_and_others_go_on(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(registry.BUILT_IN, "broken", f"{__name__}:Broken")
    results = Results()
    assert compare(engine, results, policies=("broken", "sketch"), samples=1)
    rows = list(results)
    failed = [row for row in rows if row.key.policy == "broken"]
    assert [row.error for row in failed] == ["ZeroDivisionError: division by zero"] * 4
    assert all(row.outcome is None and row.cost is None for row in failed)
    assert all(row.error is None for row in rows if row.key.policy != "broken")


def test_a_context_that_does_not_fit_is_a_row_too(engine: Engine) -> None:
    small = engine.with_config(engine.config.replace(far_memory_bytes=1000))
    results = Results()
    compare(small, results, policies=("sketch", "h2o"), tasks=TASKS[:1], samples=1)
    errors = {row.key.policy: row.error for row in results}
    assert errors["full"] is errors["h2o"] is None
    assert errors["sketch"] is not None
    assert errors["sketch"].startswith("Not enough far memory:")


@pytest.mark.parametrize("query", ["aware", "strict"])
def test_when_the_question_is_known(engine: Engine, whole: list[Row], query: str) -> None:
    results = Results()
    policies = ("sketch:per=head", "streaming-llm")
    compare(engine, results, policies=policies, query=query, samples=2, tasks=TASKS[:2])
    rows = [row for row in results if row.key.policy == "full"]
    assert {row.key.query for row in rows} == {query}
    exact = {row.key: row.outcome for row in whole}
    for row in rows:  # exact attention does not care
        same = exact[dataclasses.replace(row.key, query="agnostic")]
        assert row.outcome is not None
        assert same is not None
        assert row.outcome.token_ids == same.token_ids


def test_no_context_stands_beside_questions(engine: Engine) -> None:
    asked = tuple(
        Question(f"\n\n{text}", answers, 3) for text, answers in (("What?", ("cat",)), ("And?", ()))
    )
    material = Material(engine.tokenizer, Haystack(), 0, (), "the cat sat under a red house", asked)
    results = Results()
    compare(engine, results, tasks=[OwnQuestions()], contexts=(0,), material=material)
    rows = list(results)
    assert [row.key.policy for row in rows if row.key.question == 0] == [
        "full", NO_CONTEXT, "sketch", "streaming-llm", "h2o",
    ]  # fmt: skip
    alone = [row for row in rows if row.key.policy == NO_CONTEXT]
    assert {row.treatment for row in alone} == {NO_CONTEXT}
    with_text = [row for row in rows if row.key.policy == "full"]
    for ours, theirs in zip(alone, with_text, strict=True):
        assert ours.cost is not None
        assert theirs.cost is not None
        assert ours.cost.prompt_tokens < theirs.cost.prompt_tokens
    assert rows[-1].outcome is not None
    assert rows[-1].outcome.score is None  # no answer was given


def test_distances_see_what_a_policy_reads(engine: Engine) -> None:
    results = Results()
    compare(
        engine,
        results,
        policies=("topk-oracle", "sketch", "streaming-llm", "h2o", "lsh-tables:num_tables=20"),
        budgets=(30, 200, 5000),
        tasks=[DistancesTask(following_tokens=4)],
        samples=1,
    )
    found: dict[tuple[str, float | None], dict[str, Any]] = {}
    for row in results:
        assert row.outcome is not None
        found[row.key.policy, row.key.budget] = row.outcome.details
    model = engine.model_config
    for details in found.values():
        assert np.shape(details["error"]) == (model.geometry.layers, model.geometry.query_heads)
        assert np.all(np.asarray(details["mass"]) <= 1 + 1e-5)
    for policy in ("topk-oracle", "sketch", "streaming-llm", "h2o"):
        few, many, all_ = (found[policy, float(budget)] for budget in (30, 200, 5000))
        assert np.mean(few["mass"]) < np.mean(many["mass"]) < np.mean(all_["mass"])
        assert np.mean(all_["mass"]) == pytest.approx(1, abs=1e-5)
        assert np.mean(few["error"]) > np.mean(many["error"]) > np.mean(all_["error"])
        assert np.max(all_["error"]) < 1e-4
        assert abs(all_["kl"]) < 1e-6
        assert all_["top1"] == 1
    best = np.asarray(found["topk-oracle", 30.0]["mass"]).mean()
    assert best > np.asarray(found["streaming-llm", 30.0]["mass"]).mean()


def test_throughput_of_batches(engine: Engine) -> None:
    results = Results()
    tasks = [Throughput(batches=(1, 3), following_tokens=4)]
    compare(engine, results, tasks=tasks, samples=1)
    for row in results:
        assert row.cost is not None
        assert row.outcome is not None
        assert set(row.cost.tokens_per_second) == {"1", "3"}
        assert min(row.cost.tokens_per_second.values()) > 0
        assert row.outcome.score is None


def test_treatments_come_from_traits_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.BUILT_IN, "once", f"{__name__}:HeavyOnce")
    wanted = {"full": EXACT, "full-far": EXACT, "sketch": SELECTS, "h2o": BOUNDED, "once": ONCE}
    assert {name: Variation(name, 8).treatment for name in wanted} == wanted
    policy: Policy = HeavyOnce()
    assert treatment_of(policy.traits) == ONCE


def test_variations() -> None:
    made = make_variations(["sketch", "full-far", "sketch"], [64, 0.5])
    assert made == [
        Variation("full-far", None),
        Variation("sketch", 64),
        Variation("sketch", 0.5),
    ]
    assert make_variations(["h2o"], [8])[0] == Variation("full", None)


def test_time_left() -> None:
    left = TimeLeft()
    left.expect("a", 100, 3)
    left.expect("b", 200, 2)
    assert left.seconds is None
    left.done("a", 100, 1.0)
    assert left.seconds == pytest.approx(2 * 1.0 + 2 * 2.0)  # b is taken for as slow per token
    left.done("b", 200, 5.0)
    left.done("a", 100, None)
    assert left.seconds == pytest.approx(1.0 + 5.0)

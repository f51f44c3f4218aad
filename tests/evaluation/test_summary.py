from __future__ import annotations

from dataclasses import replace

import pytest
from sample_rows import many_rows, row

from nearfar.evaluation import summary
from nearfar.evaluation.harness.plan import BOUNDED, EXACT, NO_CONTEXT, SELECTS


def test_exact_attention_is_first_then_no_context() -> None:
    rows = [
        row(policy="h2o"),
        row(policy="sketch"),
        row("qa_1", NO_CONTEXT),
        row(policy="full"),
    ]
    cells = summary.summarise(rows)
    assert [cell.treatment for cell in cells] == [EXACT, NO_CONTEXT, SELECTS, BOUNDED]


def test_a_cell_is_one_variation_on_one_task_at_one_length() -> None:
    rows = [row(score=score, case=case) for case, score in enumerate((100.0, 0.0, 50.0))]
    rows += [row(context_tokens=8192), row(budget=64), row("vt"), row(case=9, error="No.")]
    cells = summary.summarise(rows)
    assert len(cells) == 4
    first = cells[0]
    assert first.estimate is not None
    assert (first.estimate.value, first.estimate.samples) == (50, 3)
    assert first.errors == ("No.",)
    assert first.name == "sketch · 1,024"
    assert [cell.name for cell in cells if cell.key.budget == 64] == ["sketch · 64"]


def test_settings_that_differ_are_in_the_name() -> None:
    cells = summary.summarise([row(window=64), row(window=128), row(budget=0.02)])
    names = [cell.name for cell in cells]
    assert names == [
        "sketch · 1,024 · window 64",
        "sketch · 1,024 · window 128",
        "sketch · 0.02 of keys · window 64",
    ]


def test_relative_to_exact_attention_over_the_tasks_that_it_solves() -> None:
    rows = []
    for case in range(4):
        rows += [row("niah_single_1", "full", 100.0, case=case)]
        rows += [row("vt", "full", 100.0 if case == 0 else 0.0, case=case)]  # 25 %: left out
        rows += [row("needles", "full", 100.0, case=case)]  # not RULER's
        rows += [row("niah_single_1", "sketch", 100.0 * (case > 0), case=case)]
        rows += [row("vt", "sketch", 0.0, case=case), row("needles", "sketch", 0.0, case=case)]
    found = summary.relative_to_exact(summary.summarise(rows))
    assert [each.name for each in found] == ["full", "sketch · 1,024"]
    assert found[1].ratio.value == pytest.approx(0.75)
    assert found[1].tasks == ("niah_single_1",)


def test_means_need_shares() -> None:
    cells = summary.summarise(many_rows(samples=2))
    own = summary.select([c for c in cells if c.key.policy == "full"], context=4096)
    mean = summary.mean_over_tasks(own)
    assert mean is not None
    assert 0 < mean.value <= 100  # perplexities and distances are not in it
    assert summary.mean_over_tasks([c for c in own if c.key.task == "perplexity"]) is None


def test_costs_are_medians() -> None:
    cell = summary.summarise([row(case=case) for case in range(3)])[0]
    assert cell.costs is not None
    assert cell.costs.first_token_seconds == pytest.approx(2.75)
    assert cell.costs.step_ms == (9, 10, 12)
    read = cell.costs.near_bytes + cell.costs.far_bytes_read_per_token
    assert cell.costs.bytes_read_per_token == read


def test_costs_of_several_tasks_are_medians_over_all_their_samples() -> None:
    slow, fast, quiet = row("vt"), row("cwe"), row("perplexity")
    assert slow.cost is not None
    costs = [
        replace(slow.cost, step_ms=(ms - 1, ms, ms + 1), peak_rss_bytes=peak)
        for ms, peak in ((30.0, 0), (31.0, 700), (90.0, 900))
    ]
    rows = [replace(slow, cost=costs[0]), replace(fast, cost=costs[1])]
    rows += [replace(row("cwe", case=1), cost=costs[2])]
    untimed = replace(
        slow.cost, step_ms=None, first_token_seconds=0.0, near_bytes=1, peak_rss_bytes=0
    )
    rows += [replace(row("cwe", case=case), cost=untimed) for case in (2, 3, 4, 5)]
    rows += [replace(quiet, cost=replace(slow.cost, step_ms=None, near_bytes=10**12))]
    found = summary.costs_over(summary.summarise(rows))
    assert found is not None
    assert found.step_ms == (30, 31, 32)
    assert found.peak_rss_bytes == 800  # 0 was not measured
    assert found.near_bytes == 1  # of all that was asked, timed or not
    assert found.first_token_seconds == pytest.approx(2.75)
    alone = summary.costs_over(summary.summarise(rows[-1:]))
    assert alone is not None
    assert (alone.step_ms, alone.near_bytes) == (None, 10**12)
    assert summary.costs_over([]) is None

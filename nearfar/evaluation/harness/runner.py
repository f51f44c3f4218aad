"""Runs a plan: every case under every policy, exact attention first, a row for every question.

Cases go round: the first of every task and length, then the second. A run that ends early is thus
still a fair comparison. The failure of a policy becomes the error of its rows; others go on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import count
from typing import TypeVar

from nearfar.config import DEFAULT_CONFIG
from nearfar.evaluation.harness.case_run import CaseRun, Finding, Unit
from nearfar.evaluation.harness.machine import machine_name
from nearfar.evaluation.harness.plan import NO_CONTEXT, Plan, Variation
from nearfar.evaluation.harness.results import Key, Results, Row
from nearfar.evaluation.harness.timing import TimeLeft
from nearfar.evaluation.scores import agreement
from nearfar.evaluation.tasks.base import Material, Task
from nearfar.runtime.engine.engine import Engine
from nearfar.runtime.memory.hardware import default_threads

OnRow = Callable[[Row, TimeLeft], None]
T = TypeVar("T")


class Runner:
    """A plan on an engine; `run` makes the missing results."""

    def __init__(
        self, engine: Engine, plan: Plan, material: Material, results: Results, on_row: OnRow
    ) -> None:
        self._engine, self._plan, self._material = engine, plan, material
        self._results, self._on_row = results, on_row
        self._left = TimeLeft()
        self._sources = {task.name: task.source(material) for task in plan.tasks}
        self._current: tuple[Variation, Engine] | None = None
        self._questions_of = {
            (row.key.task, row.key.context_tokens, row.key.case): row.of for row in results
        }
        self._machine = machine_name(
            engine.decoder.device, engine.config.threads or default_threads()
        )

    def run(self, stop: Callable[[], bool] = lambda: False) -> bool:
        """Make all missing rows; False if ``stop`` ended the run early."""
        return self._engine.hands.run(self._run, stop)

    def _run(self, stop: Callable[[], bool]) -> bool:
        for task in self._plan.tasks:
            for tokens in self._plan.context_tokens:
                for each in self._variations(task):
                    self._left.expect(each, tokens, self._samples(task))
        return all(self._run_unit(unit, stop) for unit in _one_ahead(self._units()))

    def _samples(self, task: Task) -> int:
        return task.samples(self._material) or self._plan.samples

    def _units(self) -> Iterator[Unit]:
        """Cases round by round, until each task and length has its samples."""
        lacking = {
            (task.name, tokens): self._samples(task)
            for tokens in self._plan.context_tokens
            for task in self._plan.tasks
        }
        for number in count():
            if not any(lacking.values()):
                return
            for tokens in self._plan.context_tokens:
                for task in self._plan.tasks:
                    if not (wanted := lacking[task.name, tokens]):
                        continue
                    of = self._questions_of.get((task.name, tokens, number))
                    if of is not None and self._is_done(task, tokens, number, min(wanted, of)):
                        lacking[task.name, tokens] -= min(wanted, of)
                        continue
                    case = task.case(number, tokens, self._material)
                    wanted = min(wanted, len(case.questions))
                    lacking[task.name, tokens] -= wanted
                    yield Unit(task, tokens, number, case, wanted)

    def _is_done(self, task: Task, tokens: int, number: int, wanted: int) -> bool:
        """Whether all results of a case exist, so that it need not be made."""
        keys = [
            (each, self._key(task, tokens, number, each, i))
            for each in self._variations(task)
            for i in range(wanted)
        ]
        if not all(key in self._results for _, key in keys):
            return False
        for each, _ in keys:
            self._left.done(each, tokens, None)
        return True

    def _variations(self, task: Task) -> list[Variation]:
        """Exact attention, no context where that is meaningful, then all others."""
        extra = [Variation(NO_CONTEXT, None)] if task.without_context else []
        return [self._plan.reference, *extra, *self._plan.variations[1:]]

    def _run_unit(self, unit: Unit, stop: Callable[[], bool]) -> bool:
        """Rows that the unit lacks; False if stopped."""
        case_run = CaseRun(
            unit,
            self._material,
            self._plan.query,
            self._plan.reference,
            self._engine,
            self._engine_of,
            self._machine,
        )
        variations = self._variations(unit.task)
        for scored in (False, True):  # the two kinds of reading, one in memory at a time
            todo: dict[Variation, list[int]] = {}
            for each in variations:
                if each.needs_sums != scored:
                    continue
                lacking = [
                    i
                    for i in range(unit.wanted)
                    if self._key_in(unit, each, i) not in self._results
                ]
                for _ in range(unit.wanted - len(lacking)):
                    self._left.done(each, unit.context_tokens, None)
                if lacking:
                    todo[each] = lacking
            for finding in case_run.run(todo) if todo else ():
                self._add(unit, finding)
                if stop():
                    return False
        return True

    def _engine_of(self, variation: Variation) -> Engine:
        """The same weights under a variation, one at a time: each may hold threads and graphs."""
        if self._current is None or self._current[0] != variation:
            self._current = None
            policy = variation.policy
            if policy == NO_CONTEXT:
                policy = self._plan.reference.policy
            budget = DEFAULT_CONFIG.budget if variation.budget is None else variation.budget
            config = self._engine.config.replace(policy=policy, budget=budget)
            self._current = variation, self._engine.with_config(config)
        return self._current[1]

    def _key_in(self, unit: Unit, variation: Variation, question: int) -> Key:
        return self._key(unit.task, unit.context_tokens, unit.number, variation, question)

    def _key(
        self, task: Task, tokens: int, number: int, variation: Variation, question: int
    ) -> Key:
        config = self._engine.config
        return Key(
            self._engine.model_name,
            task.name,
            tokens,
            number,
            question,
            variation.policy,
            variation.budget,
            self._plan.query,
            self._material.seed,
            self._sources[task.name],
            self._engine.dtype,
            config.far_dtype,
            config.sinks,
            config.window,
        )

    def _add(self, unit: Unit, finding: Finding) -> None:
        """Make the row of a finding, beside the answer of exact attention."""
        variation, question, result, seconds = finding
        geometry = self._engine.model_config.geometry
        outcome, cost, error = (None, None, result) if isinstance(result, str) else (*result, None)
        if outcome is not None and outcome.prediction is not None:
            exact = self._results.get(self._key_in(unit, self._plan.reference, question))
            if variation == self._plan.reference:
                outcome = replace(outcome, agreement=1.0)
            elif exact is not None and exact.outcome is not None:
                share = agreement(outcome.token_ids, exact.outcome.token_ids)
                outcome = replace(outcome, agreement=share)
        row = Row(
            self._key_in(unit, variation, question),
            variation.treatment,
            variation.budget_bytes(geometry, self._engine.config.far_dtype),
            len(unit.case.questions),
            outcome,
            cost,
            error,
        )
        self._results.add(row)
        self._left.done(variation, unit.context_tokens, None if error else seconds)
        self._on_row(row, self._left)


def _one_ahead(items: Iterator[T]) -> Iterator[T]:
    """``items``, each made while the one before is used: encoding long contexts takes seconds."""
    with ThreadPoolExecutor(1) as maker:
        coming = maker.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = maker.submit(next, items, None)
            yield item

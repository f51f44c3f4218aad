"""One case under several policies that can share a reading."""

from __future__ import annotations

import time
from collections import abc
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from nearfar.errors import NearfarError
from nearfar.evaluation.distances import ExactRun, exact_run
from nearfar.evaluation.harness.answering import answer
from nearfar.evaluation.harness.contexts import SharedContext, Taken
from nearfar.evaluation.harness.plan import NO_CONTEXT, Query, Variation
from nearfar.evaluation.harness.results import Cost, Outcome
from nearfar.evaluation.tasks.base import AskTask, Case, Material, Question, Task
from nearfar.evaluation.tasks.text import TextTask, Trial
from nearfar.runtime.engine.accounting import peak_gpu_bytes, peak_rss_bytes
from nearfar.runtime.engine.engine import Engine
from nearfar.runtime.memory.sequence import Sequence
from nearfar.runtime.text.thoughts import answer_of

Prompt = tuple[list[int], list[int]]  # read with exact attention; through the policy one by one


@dataclass(frozen=True)
class Unit:
    """One case of one task at one length, and how many of its questions are wanted."""

    task: Task
    context_tokens: int
    number: int
    case: Case
    wanted: int


class Finding(NamedTuple):
    """The result of a question, or the reason why it has none."""

    variation: Variation
    question: int
    result: tuple[Outcome, Cost] | str
    seconds: float


class Part(NamedTuple):
    """A context, and the prompts of the questions that follow it."""

    ids: list[int]
    prompts: dict[int, Prompt]


@dataclass
class CaseRun:
    """Runs one case; the result of exact attention is kept for all groups of policies."""

    unit: Unit
    material: Material
    query: Query
    reference: Variation
    engine: Engine  # that reads
    engine_of: Callable[[Variation], Engine]
    machine: str
    _exact: list[ExactRun | str] = field(default_factory=list)
    _attentive: bool = False

    def run(self, todo: Mapping[Variation, abc.Sequence[int]]) -> Iterator[Finding]:
        """Findings of the questions in ``todo``, policy by policy."""
        self._attentive = any(each.needs_sums for each in todo)
        if isinstance(self.unit.task, AskTask):
            yield from self._ask(todo)
        else:
            assert isinstance(self.unit.task, TextTask)
            yield from self._measure(self.unit.task, todo)

    def _ask(self, todo: Mapping[Variation, abc.Sequence[int]]) -> Iterator[Finding]:
        without = [each for each in todo if each.policy == NO_CONTEXT]
        readers = [each for each in todo if each.policy != NO_CONTEXT]
        wanted = sorted({i for each in readers for i in todo[each]})
        first = True
        for part in self._parts(self.unit.case, wanted) if readers else ():
            shared = self._shared(part.ids, len(readers) > 1)
            for each in readers:
                indices = [i for i in part.prompts if i in todo[each]]
                yield from self._answers(each, part, indices, shared.take)
                if first and each == self.reference:
                    for other in without:
                        yield from self._without_context(other, todo[other])
            shared.close()
            first = False
        if self.reference not in readers:
            for other in without:
                yield from self._without_context(other, todo[other])

    def _without_context(
        self, variation: Variation, wanted: abc.Sequence[int]
    ) -> Iterator[Finding]:
        case = Case("", self.unit.case.questions)
        for part in self._parts(case, wanted):
            alone = self._shared(part.ids, False)
            yield from self._answers(variation, part, list(part.prompts), alone.take)

    def _shared(self, ids: list[int], shared: bool) -> SharedContext:
        with_attention = self._attentive and shared
        return SharedContext(self.engine, ids, with_attention=with_attention, shared=shared)

    def _parts(self, case: Case, wanted: abc.Sequence[int]) -> Iterator[Part]:
        """The case's prompts, cut at the place where the question is known."""
        prompt = case.prompt(self.material.tokenizer)
        ids = {
            i: prompt.question_ids(question.text, question.opening)
            for i, question in enumerate(case.questions)
            if i in wanted
        }
        if self.query == "aware":
            for i, question_ids in ids.items():
                whole = prompt.prefix_ids + question_ids
                yield Part(whole[:-1], {i: ([], whole[-1:])})
        elif self.query == "strict":
            yield Part(prompt.prefix_ids, {i: ([], each) for i, each in ids.items()})
        else:
            yield Part(prompt.prefix_ids, {i: (each[:-1], each[-1:]) for i, each in ids.items()})

    def _answers(
        self,
        variation: Variation,
        part: Part,
        indices: abc.Sequence[int],
        take: Callable[[Engine], Taken],
    ) -> Iterator[Finding]:
        engine = self.engine_of(variation)
        started = time.perf_counter()
        try:
            taken = take(engine)
        except Exception as error:
            for i in indices:
                yield Finding(variation, i, _reason(error), 0.0)
            return
        start = taken.sequence.mark()
        if engine.traces:  # a GPU captures what it will replay, once
            engine.step([taken.sequence], part.ids[-1:] or [0])
        for i in indices:
            question = self.unit.case.questions[i]
            try:
                taken.sequence.rewind(start)
                result: tuple[Outcome, Cost] | str = self._answer(
                    engine, taken, question, part.prompts[i], len(part.ids)
                )
            except Exception as error:  # a policy may come from anywhere
                result = _reason(error)
            now = time.perf_counter()
            yield Finding(variation, i, result, now - started)
            started = time.perf_counter()
        taken.sequence.close()

    def _answer(
        self, engine: Engine, taken: Taken, question: Question, prompt: Prompt, context: int
    ) -> tuple[Outcome, Cost]:
        task = self.unit.task
        assert isinstance(task, AskTask)
        got = answer(engine, taken.sequence, prompt, question.max_new_tokens)
        tokenizer = engine.tokenizer
        text = answer_of(tokenizer.decode(got.token_ids), tokenizer.thought_of_prompt())
        outcome = Outcome(
            task.metric.name,
            task.score(text, question.references) if question.references else None,
            text,
            question.references,
            question.text.strip(),
            got.token_ids,
            depth=question.depth,
        )
        cost = self._cost(engine, taken, context + len(prompt[0]) + len(prompt[1]))
        return outcome, replace(
            cost,
            first_token_seconds=got.first_token_seconds,
            step_ms=got.step_ms,
            far_bytes_read_per_token=got.far_bytes_read_per_token,
        )

    def _measure(
        self, task: TextTask, todo: Mapping[Variation, abc.Sequence[int]]
    ) -> Iterator[Finding]:
        read, following = task.ids(self.unit.case, self.unit.context_tokens, self.material)
        several = len(todo) > 1 or task.needs_exact
        shared = self._shared(read, several)
        if task.needs_exact and not self._exact:
            self._exact.append(self._exact_run(shared, following))
        for variation in todo:
            started = time.perf_counter()
            try:
                result: tuple[Outcome, Cost] | str = self._measured(
                    task, variation, shared, following
                )
            except Exception as error:
                result = _reason(error)
            yield Finding(variation, 0, result, time.perf_counter() - started)
        shared.close()

    def _measured(
        self, task: TextTask, variation: Variation, shared: SharedContext, following: list[int]
    ) -> tuple[Outcome, Cost]:
        engine = self.engine_of(variation)
        taken = shared.take(engine)

        def another(observed: bool) -> Sequence:
            return shared.take(engine, observed=observed).sequence

        trial = Trial(engine, taken.sequence, following, another)
        found = task.measure(trial, self._exact[0] if self._exact else None)
        cost = replace(
            self._cost(engine, taken, shared.tokens),
            far_bytes_read_per_token=taken.sequence.far.bytes_read / found.steps,
            tokens_per_second={str(b): rate for b, rate in found.tokens_per_second.items()},
        )
        taken.sequence.close()
        return Outcome(task.metric.name, found.score, details=found.details), cost

    def _exact_run(self, shared: SharedContext, following: list[int]) -> ExactRun | str:
        """The result of the exact reference, or the reason why it fails."""
        engine = self.engine_of(self.reference)
        try:
            taken = shared.take(engine, observed=True)
            found = exact_run(engine, taken.sequence, following)
        except Exception as error:
            return _reason(error)
        taken.sequence.close()
        return found

    def _cost(self, engine: Engine, taken: Taken, prompt_tokens: int) -> Cost:
        sequence = taken.sequence
        return Cost(
            self.machine,
            prompt_tokens,
            taken.read_seconds,
            taken.shared,
            taken.take_in_seconds,
            near_bytes=sequence.near_bytes,
            far_bytes=sequence.far.store.num_bytes,
            index_bytes=sequence.far.index_bytes,
            peak_rss_bytes=peak_rss_bytes(),
            peak_gpu_bytes=peak_gpu_bytes(engine.decoder.device),
        )


def _reason(error: Exception) -> str:
    """The reason of a failure: the text of a known error; with its type, a defect."""
    return str(error) if isinstance(error, NearfarError) else f"{type(error).__name__}: {error}"

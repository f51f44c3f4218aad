"""Facts at even depths of a text, asked one by one: a row of the usual grid of depth and length."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from nearfar.evaluation.needles import Needle, make_needles
from nearfar.evaluation.scores import any_found
from nearfar.evaluation.tasks.base import (
    AskTask,
    Case,
    Material,
    Metric,
    Question,
    about,
    largest_case,
)

FOUND = Metric("facts found", "%", higher_is_better=True)


@dataclass(frozen=True)
class NeedleGrid(AskTask):
    """`questions_per_case` facts, the i-th of n at depth (i + 1/2) / n, each the answer of one."""

    name: str = "needles"
    questions_per_case: int = 10
    max_new_tokens: int = 24

    metric = FOUND

    def case(self, number: int, context_tokens: int, material: Material) -> Case:
        """Facts between the sentences of as much text as fits."""
        seed = material.draws(self.name, context_tokens, number).random()

        def make(sentences: int) -> Case:
            rng = random.Random(seed)
            needles = make_needles(self.questions_per_case, rng)
            text = material.haystack.sentences(sentences, rng)
            parts, start = [], 0
            for i, needle in enumerate(needles):
                stop = round((i + 0.5) / len(needles) * len(text))
                parts += [*text[start:stop], needle.sentence]
                start = stop
            return Case(about(" ".join(parts + text[start:])), self._questions(needles))

        return largest_case(make, material.tokenizer, context_tokens, context_tokens // 20)

    def score(self, prediction: str, references: Sequence[str]) -> float:
        """100 if the code is in the prediction."""
        return any_found(prediction, references)

    def _questions(self, needles: Sequence[Needle]) -> tuple[Question, ...]:
        return tuple(
            Question(
                f"\n\n{needle.question}",
                (needle.value,),
                self.max_new_tokens,
                depth=(i + 0.5) / len(needles),
            )
            for i, needle in enumerate(needles)
        )


TASKS = (NeedleGrid(),)

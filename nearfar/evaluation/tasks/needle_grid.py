"""Facts at even depths of a text, asked one by one: a row of the usual grid of depth and length."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from nearfar.evaluation.scores import any_found
from nearfar.evaluation.tasks.base import AskTask, Case, Material, Metric, Question, largest_case
from nearfar.evaluation.tasks.questions import about

FOUND = Metric("facts found", "%", higher_is_better=True)
PLACES = (
    "Aldergate Ambrook Brindle Calloway Dunmere Eastholt Fernhill Garrick Hollin Ingleby Jarrow "
    "Kestle Larkford Merrow Northam Oakhanger Pelham Quenby Rushmere Stanwick Thornby Ulverley "
    "Varley Wexcombe Yarrow Zeal"
)
THINGS = "gate vault tower bridge mill chapel library harbour archive museum"


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
            facts = make_facts(self.questions_per_case, rng)
            text = material.haystack.sentences(sentences, rng)
            parts, start = [], 0
            for i, (subject, value) in enumerate(facts):
                stop = round((i + 0.5) / len(facts) * len(text))
                parts += [*text[start:stop], f"The secret code of the {subject} is {value}."]
                start = stop
            return Case(about(" ".join(parts + text[start:])), self._questions(facts))

        return largest_case(make, material.tokenizer, context_tokens, context_tokens // 20)

    def score(self, prediction: str, references: Sequence[str]) -> float:
        """100 if the code is in the prediction."""
        return any_found(prediction, references)

    def _questions(self, facts: Sequence[tuple[str, str]]) -> tuple[Question, ...]:
        return tuple(
            Question(
                f"\n\nWhat is the secret code of the {subject}?",
                (value,),
                self.max_new_tokens,
                depth=(i + 0.5) / len(facts),
            )
            for i, (subject, value) in enumerate(facts)
        )


def make_facts(count: int, rng: random.Random) -> list[tuple[str, str]]:
    """``count`` different subjects with different codes of five digits."""
    subjects = [f"{place} {thing}" for place in PLACES.split() for thing in THINGS.split()]
    codes = rng.sample(range(10_000, 100_000), count)
    return [
        (subject, str(code))
        for subject, code in zip(rng.sample(subjects, count), codes, strict=True)
    ]


TASKS = (NeedleGrid(),)

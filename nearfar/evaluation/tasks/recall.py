"""Next-sentence recall in the user's own text: quote the sentence after a given one.

A model must find one of thousands of sentences and copy the next; it cannot guess it. Files of such
questions, with offsets into a book, are read by `questions`.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from nearfar.evaluation.scores import share_recalled, words
from nearfar.evaluation.tasks.base import AskTask, Case, Material, Question, about, largest_case
from nearfar.evaluation.tasks.questions import RECALLED

FEWEST_WORDS, MOST_WORDS = 6, 40  # of a sentence that is asked for


@dataclass(frozen=True)
class Recall(AskTask):
    """`questions_per_case` places at even depths, near which sentences are long enough."""

    name: str = "recall"
    questions_per_case: int = 8
    max_new_tokens: int = 64

    metric = RECALLED

    def case(self, number: int, context_tokens: int, material: Material) -> Case:
        """Consecutive sentences, as many as fit."""
        seed = material.draws(self.name, context_tokens, number).random()

        def make(count: int) -> Case:
            sentences = material.haystack.sentences(max(count, 8), random.Random(seed))
            return Case(about(" ".join(sentences)), self._questions(sentences))

        return largest_case(make, material.tokenizer, context_tokens, context_tokens // 20)

    def score(self, prediction: str, references: Sequence[str]) -> float:
        """Share of the sentence's words, in order."""
        return share_recalled(prediction, references)

    def _questions(self, sentences: Sequence[str]) -> tuple[Question, ...]:
        """About pairs of sentences that occur once and are neither short nor long."""
        once = {each for each, count in Counter(sentences).items() if count == 1}
        usable = [
            i
            for i in range(len(sentences) - 1)
            if sentences[i] in once
            and all(FEWEST_WORDS <= len(words(sentences[j])) <= MOST_WORDS for j in (i, i + 1))
        ] or [len(sentences) // 2]
        count = min(self.questions_per_case, len(usable))
        chosen = [usable[int((k + 0.5) / count * len(usable))] for k in range(count)]
        return tuple(
            Question(
                "\n\nWhich sentence of the text comes immediately after this one? Quote it "
                f'exactly.\n"{sentences[i]}"',
                (sentences[i + 1],),
                self.max_new_tokens,
                depth=(i + 1) / len(sentences),
            )
            for i in chosen
        )


TASKS = (Recall(),)

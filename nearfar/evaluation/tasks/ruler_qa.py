"""RULER's `qa_1` and `qa_2`: questions over paragraphs, over rows that the user names.

RULER uses SQuAD and HotpotQA; any file works that names the paragraph (`qa_1`) or the titles
(`qa_2`) with the answer.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nearfar.errors import InvalidOptionError
from nearfar.evaluation.haystack import digest
from nearfar.evaluation.question_files import DatasetQuestion, Source, read_questions
from nearfar.evaluation.scores import any_found
from nearfar.evaluation.tasks.base import AskTask, Case, Material, Metric, Question
from nearfar.evaluation.tasks.questions import paragraphs_case

ANY_FOUND = Metric("any answer found", "%", higher_is_better=True)
_INSTRUCTION = (
    "Answer the question based on the given documents. Only give me the answer and do not output "
    "any other words."
)


@dataclass(frozen=True)
class RulerQa(AskTask):
    """One of the two: whether several paragraphs have the answer together."""

    name: str
    several: bool
    max_new_tokens: int = 32

    metric = ANY_FOUND
    without_context = True

    def check(self, material: Material) -> None:
        """A file with the right form must be given."""
        self._sources(material)

    def source(self, material: Material) -> str:
        """The file, and the haystack that fills the rest."""
        return digest(self._sources(material), material.haystack.name)

    def case(self, number: int, context_tokens: int, material: Material) -> Case:
        """One question, its paragraphs and as many others as fit."""
        sources = self._sources(material)
        asked = [(source, each) for source in sources for each in source.questions]
        random.Random(f"{material.seed} {self.name}").shuffle(asked)
        source, question = asked[number % len(asked)]
        rng = material.draws(self.name, context_tokens, number)
        room = (material, context_tokens)
        return paragraphs_case(source, question, sources, room, rng, self._frame)

    def score(self, prediction: str, references: Sequence[str]) -> float:
        """100 if one of the answers is in the prediction."""
        return any_found(prediction, references)

    def _frame(self, text: str, question: DatasetQuestion) -> Case:
        asked = Question(
            f"\n\n{_INSTRUCTION}\n\nQuestion: {question.text}",
            question.answers,
            self.max_new_tokens,
            opening=" Answer:",
        )
        before = f"{_INSTRUCTION}\n\nThe following are given documents.\n\n"
        return Case(before + text, (asked,))

    def sources(self, data: Sequence[Path]) -> tuple[Source, ...] | None:
        """The first of the files that says which paragraphs have the answer."""
        for path in data:
            found = read_questions(path)
            if all(each.knows_gold and bool(each.supporting) == self.several for each in found):
                return found
        return None

    def _sources(self, material: Material) -> tuple[Source, ...]:
        found = self.sources(material.data)
        if found is None:
            field = "supporting_titles" if self.several else "the index paragraph in each question"
            raise InvalidOptionError(
                f"{self.name} needs a file of questions with paragraphs and {field}. "
                "Name one with --data, or leave the task out."
            )
        return found


TASKS = (RulerQa("qa_1", several=False), RulerQa("qa_2", several=True))

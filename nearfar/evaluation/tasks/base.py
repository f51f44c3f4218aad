"""The contract of a task, and the material of tasks.

A task turns a number into a case: a context of about so many tokens, and the questions that follow
it. The same number, length and seed always give the same case. Tasks know the tokenizer through
`Material` and nothing of policies. Lengths include the prompt's own words and the tokens to be
generated, as RULER's do.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Literal

from nearfar.errors import InvalidOptionError
from nearfar.evaluation.haystack import Haystack
from nearfar.runtime.text.chat import INSTRUCTION, ContextPrompt
from nearfar.runtime.text.tokenizer import Tokenizer

FULL_ENOUGH = 0.98  # of the wanted length
AIM = 0.993


@dataclass(frozen=True)
class Metric:
    """Describes a score."""

    name: str
    unit: Literal["%", ""]
    higher_is_better: bool
    mean_of_logs: bool = False  # scores are logarithms; their mean is shown as its exponential


@dataclass(frozen=True)
class Question:
    """A question after a context, and its right answers."""

    text: str
    references: tuple[str, ...]
    max_new_tokens: int
    opening: str = ""  # how the answer begins; the model goes on from there
    depth: float | None = None  # where in the context the answer is, 0 its start, 1 its end


@dataclass(frozen=True)
class Case:
    """One context and its questions."""

    context: str
    questions: tuple[Question, ...]
    _prompts: dict[Tokenizer, ContextPrompt] = field(
        default_factory=dict, compare=False, repr=False
    )

    def prompt(self, tokenizer: Tokenizer) -> ContextPrompt:
        """The context in the model's chat template, tokenized once."""
        if tokenizer not in self._prompts:
            following = self.questions[0].text[:8]
            self._prompts[tokenizer] = ContextPrompt(tokenizer, self.context, following)
        return self._prompts[tokenizer]

    def tokens(self, tokenizer: Tokenizer) -> int:
        """The longest prompt and its answer."""
        prompt = self.prompt(tokenizer)
        return len(prompt.prefix_ids) + max(
            len(prompt.question_ids(each.text, each.opening)) + each.max_new_tokens
            for each in self.questions
        )


def about(text: str) -> str:
    """A context with an announcement of questions, as the product asks about documents."""
    return f"{INSTRUCTION}\n\n{text}"


@dataclass(frozen=True)
class Material:
    """The material of cases."""

    tokenizer: Tokenizer
    haystack: Haystack
    seed: int
    data: tuple[Path, ...] = ()  # JSONL files of questions
    document: str = ""  # the user's own text and questions
    asked: tuple[Question, ...] = field(default=())

    @cached_property
    def own(self) -> Case:
        """The user's own questions about the user's own text, whole."""
        return Case(about(self.document.strip()), self.asked)

    def draws(self, task: str, context_tokens: int, number: int) -> random.Random:
        """The random numbers of one case."""
        return random.Random(f"{self.seed} {task} {context_tokens} {number}")


class Task(ABC):
    """A measure of policies."""

    name: str
    metric: Metric
    questions_per_case: int = 1
    without_context: ClassVar[bool] = False  # whether asking without the context says something

    def check(self, material: Material) -> None:  # noqa: B027  most tasks lack nothing
        """Raise InvalidOptionError where ``material`` lacks what the task needs."""

    def samples(self, material: Material) -> int | None:  # noqa: ARG002
        """The number of questions, if the plan does not decide it."""
        return None

    def source(self, material: Material) -> str:
        """A name of the content of cases: other content gives other samples."""
        return material.haystack.name

    @abstractmethod
    def case(self, number: int, context_tokens: int, material: Material) -> Case:
        """The case with that number, of at most ``context_tokens``."""


class AskTask(Task):
    """A task whose answers are generated and compared with references."""

    @abstractmethod
    def score(self, prediction: str, references: Sequence[str]) -> float:
        """The score of a prediction, in the metric's unit."""


def largest_case(
    make: Callable[[int], Case], tokenizer: Tokenizer, limit: int, guess: int, highest: int = 2**31
) -> Case:
    """The case with the largest number of units that has at most ``limit`` tokens, or nearly.

    ``make`` is given a number of units of text (lines, sentences, words) from 0 to ``highest``;
    more units are more tokens. Stops at 98 % of the limit: encoding is what this costs.
    """
    best, low, high = None, -1, highest + 1
    units = max(1, min(guess, highest))
    before = (0, 0)  # units and their tokens, one step ago
    while high - low > 1:
        units = min(max(units, low + 1), high - 1)
        case = make(units)
        tokens = case.tokens(tokenizer)
        if tokens <= limit:
            best, low = case, units
            if tokens >= FULL_ENOUGH * limit:
                break
        else:
            high = units
        slope = (tokens - before[1]) / (units - before[0]) if units != before[0] else 0.0
        before = (units, tokens)
        # aimed a little below the limit, so that the next step mostly is the last
        aim = (limit * AIM - tokens) / slope if slope > 0 else (high - low) // 2
        units = int(units + min(aim, 8 * units + 1))
    if best is None:
        raise InvalidOptionError(
            f"A context of {limit:,} tokens has no room for the question and its answer. "
            "Give a longer --contexts."
        )
    return best

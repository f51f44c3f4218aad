"""Needles in a haystack: RULER's eight retrieval tasks (Hsieh et al., arXiv 2404.06654).

Facts "One of the special magic numbers for KEY is: VALUE." are hidden in noise, in prose or among
facts of the same form, and the values of some keys are asked for.
"""

from __future__ import annotations

import random
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from nearfar.evaluation.haystack import Haystack, word_list
from nearfar.evaluation.scores import share_found
from nearfar.evaluation.tasks.base import AskTask, Case, Material, Metric, Question, largest_case

FOUND = Metric("values found", "%", higher_is_better=True)
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
DEPTHS = [round(i * 100 / 39) for i in range(40)]  # percent of a haystack of prose

HaystackKind = Literal["noise", "essay", "needles"]
WordKind = Literal["words", "numbers", "uuids"]


@dataclass(frozen=True)
class Niah(AskTask):
    """One of the eight: kind of haystack, kind and number of keys and values."""

    name: str
    haystack: HaystackKind
    key_kind: WordKind = "words"
    value_kind: WordKind = "numbers"
    keys: int = 1
    values: int = 1  # of each key
    queries: int = 1
    max_new_tokens: int = 128

    metric = FOUND

    def case(self, number: int, context_tokens: int, material: Material) -> Case:
        """Needles at drawn places, in as much haystack as fits."""
        seed = material.draws(self.name, context_tokens, number).random()
        guess = context_tokens // {"noise": 24, "essay": 18, "needles": 26}[self.haystack]

        def make(units: int) -> Case:
            return self._case(units, material.haystack, random.Random(seed))

        return largest_case(make, material.tokenizer, context_tokens, guess)

    def score(self, prediction: str, references: Sequence[str]) -> float:
        """Share of the values that are in the prediction."""
        return share_found(prediction, references)

    def _case(self, units: int, haystack: Haystack, rng: random.Random) -> Case:
        keys = [_draw(self.key_kind, rng) for _ in range(max(self.keys, self.queries))]
        facts = [(key, _draw(self.value_kind, rng)) for key in keys for _ in range(self.values)]
        asked = rng.sample(keys, self.queries)
        needles = [self._needle(*fact) for fact in facts]
        rng.shuffle(needles)
        if self.haystack == "essay":
            context = _in_prose(haystack.sentences(units, rng), needles, rng)
        else:
            lines = [self._distraction(rng) for _ in range(units)]
            context = "\n".join(_at_random(lines, needles, rng))
        answers = tuple(value for key, value in facts if key in asked)
        return self._ask(context, asked, answers)

    def _distraction(self, rng: random.Random) -> str:
        if self.haystack == "noise":
            return NOISE
        return self._needle(_draw(self.key_kind, rng), _draw(self.value_kind, rng))

    def _needle(self, key: str, value: str) -> str:
        return f"One of the special magic {self.value_kind} for {key} is: {value}."

    def _ask(self, context: str, asked: Sequence[str], answers: tuple[str, ...]) -> Case:
        query = asked[0]
        if len(asked) > 1:
            query = ", ".join(asked[:-1]) + f", and {asked[-1]}"
        some, verb, kind = "Some", "are", str(self.value_kind)
        everything = " all"
        if len(answers) == 1:
            some, verb, kind, everything = "A", "is", kind.removesuffix("s"), ""
        before = (
            f"{some} special magic {kind} {verb} hidden within the following text. Make sure to "
            f"memorize it. I will quiz you about the {kind} afterwards.\n"
        )
        subject = f"the special magic {kind} for {query} mentioned in the provided text"
        question = Question(
            f"\nWhat {verb}{everything} {subject}?",
            answers,
            self.max_new_tokens,
            opening=f" T{subject[1:]} {verb}",
        )
        return Case(before + context, (question,))


def _draw(kind: WordKind, rng: random.Random) -> str:
    if kind == "numbers":
        return str(rng.randint(10**6, 10**7 - 1))
    if kind == "uuids":
        return str(uuid.UUID(int=rng.getrandbits(128), version=4))
    return f"{rng.choice(word_list('adjective'))}-{rng.choice(word_list('noun'))}"


def _in_prose(sentences: list[str], needles: list[str], rng: random.Random) -> str:
    """Needles at the ends of sentences, at depths drawn without repeat."""
    depths = sorted(rng.sample(DEPTHS, len(needles)))
    parts: list[str] = []
    start = 0
    for depth, needle in zip(depths, needles, strict=True):
        stop = round(len(sentences) * depth / 100)
        parts += [*sentences[start:stop], needle]
        start = stop
    return " ".join(parts + sentences[start:])


def _at_random(lines: list[str], needles: list[str], rng: random.Random) -> list[str]:
    """Needles between lines at drawn places."""
    places = sorted(rng.randint(0, len(lines)) for _ in needles)
    for place, needle in reversed(list(zip(places, needles, strict=True))):
        lines.insert(place, needle)
    return lines


TASKS = (
    Niah("niah_single_1", "noise"),
    Niah("niah_single_2", "essay"),
    Niah("niah_single_3", "essay", value_kind="uuids"),
    Niah("niah_multikey_1", "essay", keys=4),
    Niah("niah_multikey_2", "needles"),
    Niah("niah_multikey_3", "needles", key_kind="uuids", value_kind="uuids"),
    Niah("niah_multivalue", "essay", values=4),
    Niah("niah_multiquery", "essay", queries=4),
)

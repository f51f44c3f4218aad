"""Counting words: RULER's `cwe` (common among listed words) and `fwe` (frequent among coded ones).

No single place of the context has the answer; it is in all of it.
"""

from __future__ import annotations

import random
import string
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

from nearfar.evaluation.haystack import word_list
from nearfar.evaluation.scores import share_found
from nearfar.evaluation.tasks.base import AskTask, Case, Material, Metric, Question, largest_case

COUNTED = Metric("words found", "%", higher_is_better=True)
SHORT_TOKENS = 4096  # below it, fewer repetitions
ASKED_WORDS = 10
ZETA_2 = 1.6449340668482264  # the sum of 1 / k^2


@dataclass(frozen=True)
class CommonWords(AskTask):
    """A numbered list in which ten words are ten times as frequent as the others."""

    name: str = "cwe"
    max_new_tokens: int = 120

    metric = COUNTED

    def case(self, number: int, context_tokens: int, material: Material) -> Case:
        """A solved example, then as many uncommon words as fit."""
        rng = material.draws(self.name, context_tokens, number)
        pool = sorted({*word_list("noun"), *word_list("adjective"), *word_list("verb")})
        rng.shuffle(pool)
        short = context_tokens < SHORT_TOKENS
        often, seldom = (6, 1) if short else (30, 3)
        example_words, example_often, example_seldom = (20, 3, 1) if short else (40, 10, 3)
        example = pool[:example_words]
        listed = pool[example_words:]
        seed = rng.random()

        def make(words: int) -> Case:
            inner = random.Random(seed)
            solved = _numbered(example, example_often, example_seldom, inner)
            shown = solved + self._question(()).text + self._question(()).opening
            answers = tuple(listed[:ASKED_WORDS])
            shown += _enumerated(example[:ASKED_WORDS]) + "\n\n"
            asked = _numbered(listed[: ASKED_WORDS + words], often, seldom, inner)
            return Case(shown + asked, (self._question(answers),))

        guess = context_tokens // (6 * seldom)
        highest = len(listed) - ASKED_WORDS
        return largest_case(make, material.tokenizer, context_tokens, guess, highest)

    def score(self, prediction: str, references: Sequence[str]) -> float:
        """Share of the ten words that are in the prediction."""
        return share_found(prediction, references)

    def _question(self, answers: tuple[str, ...]) -> Question:
        return Question(
            "\nQuestion: What are the 10 most common words in the above list?",
            answers,
            self.max_new_tokens,
            opening=" Answer: The top 10 words that appear most often in the list are:",
        )


def _enumerated(words: Sequence[str]) -> str:
    return " " + " ".join(f"{i}. {word}" for i, word in enumerate(words, start=1))


def _numbered(words: Sequence[str], often: int, seldom: int, rng: random.Random) -> str:
    """The first ten of ``words`` ``often`` times, the others ``seldom``, in random order."""
    entries = [*words[:ASKED_WORDS]] * often + [*words[ASKED_WORDS:]] * seldom
    rng.shuffle(entries)
    return (
        "Below is a numbered list of words. In these words, some appear more often than others. "
        "Memorize the ones that appear most often.\n" + _enumerated(entries).strip()
    )


@dataclass(frozen=True)
class FrequentWords(AskTask):
    """Coded words whose frequencies fall as a zeta law; the three most frequent are asked for."""

    name: str = "fwe"
    max_new_tokens: int = 50

    metric = COUNTED

    def case(self, number: int, context_tokens: int, material: Material) -> Case:
        """As many words as fit."""
        rng = material.draws(self.name, context_tokens, number)
        vocabulary = _coded_words(max(20, context_tokens // 50), rng)
        seed = rng.random()

        def make(words: int) -> Case:
            text = coded_text(vocabulary, words, random.Random(seed))
            question = Question(
                "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What "
                "are the three most frequently appeared words in the above coded text?",
                tuple(vocabulary[1:4]),
                self.max_new_tokens,
                opening=(
                    " Answer: According to the coded text above, the three most frequently "
                    "appeared words are:"
                ),
            )
            before = (
                "Read the following coded text and track the frequency of each coded word. Find "
                "the three most frequently appeared coded words. "
            )
            return Case(before + text, (question,))

        return largest_case(make, material.tokenizer, context_tokens, context_tokens // 3)

    def score(self, prediction: str, references: Sequence[str]) -> float:
        """Share of the three words that are in the prediction."""
        return share_found(prediction, references)


def _coded_words(size: int, rng: random.Random) -> list[str]:
    """The dots, which are noise, and different words of six letters."""
    words = {"...."}
    ordered = ["...."]
    while len(ordered) < size:
        word = "".join(rng.choices(string.ascii_lowercase, k=6))
        ordered += [word] * (word not in words)
        words.add(word)
    return ordered


def coded_text(vocabulary: Sequence[str], words: int, rng: random.Random) -> str:
    """About ``words`` words; that of rank k appears floor(words / (k^2 zeta(2))) times."""
    text: list[str] = []
    for rank, word in zip(count(1), vocabulary, strict=False):
        text += [word] * int(words / (rank**2 * ZETA_2))
    rng.shuffle(text)
    return " ".join(text)


TASKS = (CommonWords(), FrequentWords())

"""Text to hide facts in: the user's, or prose generated here from lists of words.

Generated prose is grammatical and meaningless, which suffices for a haystack; its perplexity means
little. Words come from `wonderwords`.
"""

from __future__ import annotations

import hashlib
import random
import re
from functools import cache

from wonderwords import RandomWord

_WIDE_ENDS = "\u3002\uff01\uff1f"  # of sentences in scripts without spaces
_SENTENCE_END = re.compile(rf"(?<=[.!?])\s+|(?<=[{_WIDE_ENDS}])\s*")
_NAMES = "Ada Bram Cleo Dora Emil Fay Gil Hana Ivo June Karl Lena Milo Nora Otto Pia Rosa Tom"
_TEMPLATES = (
    "{name} put the {adjective} {noun} beside the {noun2} and said nothing about it.",
    "In the {noun} there was a {adjective} {noun2} that nobody had seen since {month}.",
    "The {noun} was {adjective}, and {name} thought of the {noun2} for the rest of the day.",
    "When {month} came, {name} and {name2} carried the {noun} past the {adjective} {noun2}.",
    "It is said that a {adjective} {noun} keeps longer than any {noun2}.",
    "{name} asked {name2} whether the {noun} was still {adjective}.",
    "Nobody in the town wanted the {noun}, though it was more {adjective} than the {noun2}.",
    "They left the {noun} where it was, because the {noun2} had become {adjective}.",
    "A letter about the {adjective} {noun} arrived in {month}, addressed to {name}.",
    "Between the {noun} and the {noun2} stood a {adjective} wall.",
)
_MONTHS = "January February March April May June July August September October November December"


@cache
def word_list(category: str) -> tuple[str, ...]:
    """Plain lower-case words: ``noun``, ``adjective`` or ``verb``."""
    known = RandomWord().filter(include_categories=[category])
    return tuple(sorted({word for word in known if re.fullmatch(r"[a-z]{3,12}", word)}))


def generated_sentence(rng: random.Random) -> str:
    """One sentence about nothing."""
    nouns = rng.sample(word_list("noun"), 2)
    names = rng.sample(_NAMES.split(), 2)
    return rng.choice(_TEMPLATES).format(
        noun=nouns[0],
        noun2=nouns[1],
        adjective=rng.choice(word_list("adjective")),
        name=names[0],
        name2=names[1],
        month=rng.choice(_MONTHS.split()),
    )


def split_sentences(text: str) -> list[str]:
    """Sentences of ``text`` with single spaces in them."""
    return [" ".join(part.split()) for part in _SENTENCE_END.split(text) if part.strip()]


def digest(*parts: object) -> str:
    """A short name of the content of ``parts``: different for different content."""
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:8]


class Haystack:
    """Endless sentences: those of a text, which starts again after its last sentence.

    Without a text they are generated, a different stretch for every seed.
    """

    def __init__(self, text: str | None = None) -> None:
        self.generated = text is None
        self.own = split_sentences(text) if text is not None else []
        self.name = "generated" if text is None else digest(text)

    def sentences(self, count: int, rng: random.Random) -> list[str]:
        """``count`` consecutive sentences from a random place."""
        if self.generated:
            return [generated_sentence(rng) for _ in range(count)]
        start = rng.randrange(len(self.own))
        return [self.own[(start + i) % len(self.own)] for i in range(count)]

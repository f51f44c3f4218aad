"""Facts planted in a text at even depths, and the questions that ask for them."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass

PLACES = (
    "Aldergate Ambrook Brindle Calloway Dunmere Eastholt Fernhill Garrick Hollin Ingleby Jarrow "
    "Kestle Larkford Merrow Northam Oakhanger Pelham Quenby Rushmere Stanwick Thornby Ulverley "
    "Varley Wexcombe Yarrow Zeal"
)
THINGS = "gate vault tower bridge mill chapel library harbour archive museum"


@dataclass(frozen=True)
class Needle:
    """One planted fact."""

    sentence: str
    question: str
    value: str


def make_needles(count: int, seed: int | random.Random = 0) -> list[Needle]:
    """``count`` facts with different subjects and different 5-digit values."""
    rng = seed if isinstance(seed, random.Random) else random.Random(seed)
    subjects = [f"{place} {thing}" for place in PLACES.split() for thing in THINGS.split()]
    values = rng.sample(range(10_000, 100_000), count)
    return [
        Needle(
            f"The secret code of the {subject} is {value}.",
            f"What is the secret code of the {subject}?",
            str(value),
        )
        for subject, value in zip(rng.sample(subjects, count), values, strict=True)
    ]


def needle_document(
    text: str, count_tokens: Callable[[str], int], context_tokens: int, facts: int, seed: int = 0
) -> tuple[str, list[Needle]]:
    """``text``, repeated or cut to about ``context_tokens``, with facts after even depths of it.

    Each fact is between two sentences; the i-th of n is at depth (i + 1/2) / n.
    """
    needles = make_needles(facts, seed)
    room = context_tokens - sum(count_tokens(" " + needle.sentence) for needle in needles)
    sentences: list[str] = []
    lengths: list[int] = []
    pool = re.split(r"(?<=[.!?])\s+", text.strip())
    sizes = [count_tokens(" " + sentence) for sentence in pool]
    while sum(lengths) + sizes[len(sentences) % len(pool)] <= room:
        lengths.append(sizes[len(sentences) % len(pool)])
        sentences.append(pool[len(sentences) % len(pool)])
    parts: list[str] = []
    seen, planted = 0, 0
    for sentence, length in zip(sentences, lengths, strict=True):
        while planted < facts and seen >= (planted + 0.5) / facts * room:
            parts.append(needles[planted].sentence)
            planted += 1
        parts.append(sentence)
        seen += length
    parts += [needle.sentence for needle in needles[planted:]]
    return " ".join(parts), needles

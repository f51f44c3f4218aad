"""Scores of answers, from 0 to 100.

The first two are RULER's (Hsieh et al., arXiv 2404.06654); F1 is SQuAD's (Rajpurkar et al., arXiv
1606.05250), which for scripts without spaces compares characters, as LongBench does.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

_NO_SPACES = re.compile(r"([\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uac00-\ud7af])")


def normalise(text: str) -> str:
    """``text`` without case, punctuation and surplus space; ``1,000`` becomes ``1000``."""
    text = unicodedata.normalize("NFKC", text).casefold()
    text = re.sub(r"(?<=\d),(?=\d{3})", "", text)
    kept = (" " if unicodedata.category(char)[0] in "PZC" else char for char in text)
    return " ".join("".join(kept).split())


def clean(prediction: str) -> str:
    """``prediction`` with line breaks in place of control characters, as RULER compares it."""
    return re.sub(r"[\x00-\x1f]", "\n", prediction).strip()


def share_found(prediction: str, references: Sequence[str]) -> float:
    """Share of ``references`` that are in ``prediction``, ignoring case."""
    text = clean(prediction).casefold()
    return 100.0 * sum(each.casefold() in text for each in references) / len(references)


def any_found(prediction: str, references: Sequence[str]) -> float:
    """100 if one of ``references`` is in ``prediction``, ignoring case."""
    text = clean(prediction).casefold()
    return 100.0 * any(each.casefold() in text for each in references)


def contains(prediction: str, references: Sequence[str]) -> float:
    """100 if ``prediction`` holds one of ``references`` as whole words, after `normalise`."""
    ours = f" {normalise(prediction)} "
    return 100.0 * any(f" {normalise(each)} " in ours for each in references)


def words(text: str) -> list[str]:
    """Words after `normalise`, and characters of scripts without spaces."""
    return _NO_SPACES.sub(r" \1 ", normalise(text)).split()


def best_f1(prediction: str, references: Sequence[str]) -> float:
    """Harmonic mean of precision and recall of words, with the nearest of ``references``."""
    return max(_f1(words(prediction), words(each)) for each in references)


def _f1(ours: Sequence[str], theirs: Sequence[str]) -> float:
    common = sum((Counter(ours) & Counter(theirs)).values())
    if common == 0:
        return 100.0 * (len(ours) == len(theirs) == 0)
    return 200.0 * common / (len(ours) + len(theirs))


def share_recalled(prediction: str, references: Sequence[str]) -> float:
    """Share of a reference's words that ``prediction`` has in their order: ROUGE-L's recall."""
    ours = words(prediction)
    return max(_recall(ours, words(each)) for each in references)


def _recall(ours: Sequence[str], theirs: Sequence[str]) -> float:
    if not theirs:
        return 100.0
    row = [0] * (len(theirs) + 1)  # longest common subsequence with each beginning of theirs
    for word in ours:
        diagonal = 0
        for i, other in enumerate(theirs, start=1):
            above = row[i]
            row[i] = diagonal + 1 if word == other else max(above, row[i - 1])
            diagonal = above
    return 100.0 * row[-1] / len(theirs)


def agreement(tokens: Sequence[int], reference: Sequence[int]) -> float:
    """Length of the common start of two answers, as a share of the longer one.

    Only tokens before the first difference count: after it the two answers continue different
    texts, so that equal tokens at equal positions would be chance. 1 means equal, end included.
    """
    longest = max(len(tokens), len(reference))
    if longest == 0:
        return 1.0
    common = 0
    for ours, theirs in zip(tokens, reference, strict=False):
        if ours != theirs:
            break
        common += 1
    return common / longest

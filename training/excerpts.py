"""What a layer is trained on: the end of a text asks its beginning, which was compressed.

A text is cut at a drawn place. What is before is the prompt, compressed once as the policy does it
after reading; queries behind the cut attend to what is left and to all tokens from the cut to their
own. Their exact attention over everything is what they should have got.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from recording import Record
from torch import Tensor

from nearfar.policies.base import NearState

SINKS, WINDOW = 4, 64


@dataclass(frozen=True)
class Excerpt:
    """One text: tokens before the cut, and how many of them may stay."""

    text: int
    cut: int
    budget: int  # beside sinks and window

    @property
    def limit(self) -> int:
        """Rows that may stay of the prompt."""
        return SINKS + WINDOW + self.budget


def prompt_of(record: Record, excerpt: Excerpt, scores: Tensor | None = None) -> NearState:
    """The rows of a prompt before it is compressed, float32, as a policy sees them."""
    _, keys, values = record.prompt(excerpt.text, excerpt.cut)
    positions = torch.arange(excerpt.cut, device=keys.device).expand(len(keys), -1)
    rows = (keys.float(), values.float())
    return NearState(positions, scores, SINKS, WINDOW, excerpt.limit, *rows)


def draw_excerpts(texts: int, length: int, budgets: tuple[int, ...], seed: int) -> list[Excerpt]:
    """One of each text, the cut in the second half of it."""
    generator = torch.Generator().manual_seed(seed)
    cuts = torch.randint(length // 2, length - length // 8, (texts,), generator=generator)
    picks = torch.randint(len(budgets), (texts,), generator=generator)
    return [
        Excerpt(text, int(cut), budgets[int(pick)])
        for text, (cut, pick) in enumerate(zip(cuts, picks, strict=True))
    ]


@dataclass(frozen=True)
class ExcerptQueries:
    """Queries behind the cut of one excerpt, and what they should get."""

    queries: Tensor  # [Hq, n, D] float32
    own: Tensor  # logits [Hq, n, T - cut] float32 of tokens from the cut on, -inf behind the query
    own_values: Tensor  # [Hkv, T - cut, D] float32
    target: Tensor  # [Hq, n, D] float32


def ask(record: Record, excerpt: Excerpt, count: int, generator: torch.Generator) -> ExcerptQueries:
    """``count`` drawn queries of an excerpt."""
    keys, values = record.keys[excerpt.text].float(), record.values[excerpt.text].float()
    T, cut = keys.shape[1], excerpt.cut
    places = torch.randint(cut, T, (count,), generator=generator).to(keys.device)
    queries = record.queries[excerpt.text][:, places].float()
    logits = grouped_logits(queries, keys)
    later = torch.arange(T, device=keys.device) > places[:, None]
    logits = logits.masked_fill(later, -torch.inf)
    target = grouped_values(logits.softmax(-1), values)
    return ExcerptQueries(queries, logits[..., cut:], values[:, cut:], target)


def grouped_logits(queries: Tensor, keys: Tensor) -> Tensor:
    """Logits [Hq, n, N] of ``queries`` [Hq, n, D] with ``keys`` [Hkv, N, D]."""
    Hq, n, D = queries.shape
    return (queries.reshape(len(keys), -1, D) @ keys.mT).view(Hq, n, -1)


def grouped_values(weights: Tensor, values: Tensor) -> Tensor:
    """Mixtures [Hq, n, D] of ``values`` [Hkv, N, D] by ``weights`` [Hq, n, N]."""
    Hq, n, N = weights.shape
    return (weights.reshape(len(values), -1, N) @ values).view(Hq, n, -1)


def error_of(record: Record, found: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Squares of the error behind the output projection, and of what it should be; sums."""
    n = found.shape[1]
    both = torch.stack([found - target, target]).transpose(1, 2).reshape(2, n, -1)
    wrong, right = (both @ record.output.T).square().sum((1, 2))
    return wrong, right

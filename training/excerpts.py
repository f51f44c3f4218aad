"""Training data of a layer: queries at the end of a text attend to its compressed beginning.

A text is cut at a random place. The part before the cut is the prompt, which the policy compresses
once, as after prefill. Queries behind the cut attend to the remaining rows and to all tokens from
the cut to their own. The target is their exact attention over all tokens.
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
    """One text: the number of tokens before the cut, and of rows kept of them."""

    text: int
    cut: int
    budget: int  # in addition to sinks and window

    @property
    def limit(self) -> int:
        """Rows kept of the prompt."""
        return SINKS + WINDOW + self.budget


def prompt_of(record: Record, excerpt: Excerpt, scores: Tensor | None = None) -> NearState:
    """The rows of a prompt before compression, float32, as a policy gets them."""
    _, keys, values = record.prompt(excerpt.text, excerpt.cut)
    positions = torch.arange(excerpt.cut, device=keys.device).expand(len(keys), -1)
    rows = (keys.float(), values.float())
    return NearState(positions, scores, SINKS, WINDOW, excerpt.limit, *rows)


def draw_excerpts(texts: int, length: int, budgets: tuple[int, ...], seed: int) -> list[Excerpt]:
    """One excerpt of each text, cut in its second half."""
    generator = torch.Generator().manual_seed(seed)
    cuts = torch.randint(length // 2, length - length // 8, (texts,), generator=generator)
    picks = torch.randint(len(budgets), (texts,), generator=generator)
    return [
        Excerpt(text, int(cut), budgets[int(pick)])
        for text, (cut, pick) in enumerate(zip(cuts, picks, strict=True))
    ]


@dataclass(frozen=True)
class ExcerptQueries:
    """Queries behind the cut of one excerpt, and their targets."""

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
    """Sums of squares, after the output projection, of the error and of the target."""
    n = found.shape[1]
    both = torch.stack([found - target, target]).transpose(1, 2).reshape(2, n, -1)
    wrong, right = (both @ record.output.T).square().sum((1, 2))
    return wrong, right

"""The distance of a policy from exact attention, by token and by layer, without a task.

Both read the same tokens. First the policy runs on its own hidden states, errors included, and its
next-token distribution is compared with the exact one. Then every layer gets the exact hidden
state, and its attention is compared with exact attention at equal queries, without errors of other
layers.
"""

from __future__ import annotations

from collections import abc
from dataclasses import dataclass

import numpy as np
import torch

from nearfar.records import AllOrNone, Selection
from nearfar.runtime.engine.engine import Engine
from nearfar.runtime.memory.sequence import Sequence
from nearfar.runtime.steps.decode import Attended, decode_step

ATTENTION_STEPS = 8  # tokens whose attention is compared, if as much memory is there
WEIGHT_BYTES = 2**31  # of exact attention weights that are kept


@dataclass(frozen=True)
class ExactAttention:
    """The result of exact attention in one layer at one token."""

    out: torch.Tensor  # [Hq, D] float32
    weights: torch.Tensor  # [Hq, N] float32 on the CPU: the softmax over all tokens so far


@dataclass(frozen=True)
class ExactRun:
    """The exact run over some tokens."""

    log_probabilities: torch.Tensor  # [n, V] float32 after each token
    attention: list[list[ExactAttention]]  # of the first few tokens, of each layer


@dataclass(frozen=True)
class Distances:
    """The distances of a policy from the exact run."""

    kl: float  # mean over tokens of KL(exact || policy) of the next token, in nats
    top1: float  # share of tokens after which both find the same next token most likely
    error: list[list[float]]  # [layers][Hq]: relative error of the attention output
    mass: list[list[float]]  # [layers][Hq]: exact softmax weight of the keys that were read


def attention_steps(layers: int, query_heads: int, tokens: int) -> int:
    """Tokens whose exact attention weights fit the memory set aside for them."""
    return max(1, min(ATTENTION_STEPS, WEIGHT_BYTES // (layers * query_heads * tokens * 4)))


def follow(engine: Engine, sequence: Sequence, ids: abc.Sequence[int]) -> torch.Tensor:
    """Log-probabilities [n, V] float32 of the next token after each of ``ids``."""
    steps = [engine.step([sequence], [one]).clone() for one in ids]
    return torch.cat(steps).log_softmax(-1).cpu()


def exact_run(engine: Engine, sequence: Sequence, ids: abc.Sequence[int]) -> ExactRun:
    """The run of an exact policy; ``sequence`` is left at its end."""
    geometry = engine.model_config.geometry
    sizes = (geometry.layers, geometry.query_heads)
    watched = attention_steps(*sizes, sequence.tokens + len(ids))
    attention: list[list[ExactAttention]] = []

    def keep(attended: Attended) -> torch.Tensor:
        keys = _keys(attended.sequence, attended.layer)
        query = attended.query.view(keys.shape[0], -1, keys.shape[2])
        logits = (query @ keys.transpose(1, 2)).flatten(0, 1)
        attention[-1].append(ExactAttention(attended.partial.out.clone(), logits.softmax(-1).cpu()))
        return attended.partial.out

    tensor = torch.tensor(ids, device=engine.decoder.device)
    steps = []
    for i, token in enumerate(tensor[:, None]):
        if i < watched:
            attention.append([])
        observer = keep if i < watched else None
        steps.append(decode_step(engine.decoder, [sequence], token, observer))
    return ExactRun(torch.cat(steps).log_softmax(-1).cpu(), attention)


def _keys(sequence: Sequence, layer: int) -> torch.Tensor:
    """All keys [Hkv, N, D] float32 of an exact policy, in order."""
    near = sequence.near[layer].rows
    rows = near.new_empty(near.shape[0], sequence.layers[layer].held_tokens, near.shape[2])
    sequence.layers[layer].copy_past(rows)
    return rows[..., : near.shape[2] // 2].float()


def distances(
    engine: Engine, sequences: tuple[Sequence, Sequence], ids: abc.Sequence[int], exact: ExactRun
) -> Distances:
    """The distances of a policy whose sequences have read the context of the exact run.

    The first of ``sequences`` runs on its own states; the second, which may be the same, gets exact
    ones. Both are rewound.
    """
    sequence, observed = sequences
    start = sequence.mark()
    ours, theirs = follow(engine, sequence, ids), exact.log_probabilities
    sequence.rewind(start)
    kl = (theirs.exp() * (theirs - ours)).nansum(-1)  # 0 log 0 is 0
    top1 = (ours.argmax(-1) == theirs.argmax(-1)).float()
    start = observed.mark()
    error, mass = _attention(engine, observed, ids, exact)
    observed.rewind(start)
    return Distances(float(kl.mean()), float(top1.mean()), error.tolist(), mass.tolist())


def _attention(
    engine: Engine, sequence: Sequence, ids: abc.Sequence[int], exact: ExactRun
) -> tuple[np.ndarray, np.ndarray]:
    """Mean error and mass [layers, Hq] with exact states."""
    geometry = engine.model_config.geometry
    errors = np.zeros((geometry.layers, geometry.query_heads))
    masses = np.zeros_like(errors)
    tensor = torch.tensor(ids, device=engine.decoder.device)
    for token, layers in zip(tensor[:, None], exact.attention, strict=False):

        def compare(attended: Attended, layers: list[ExactAttention] = layers) -> torch.Tensor:
            want = layers[attended.layer]
            difference = (attended.partial.out - want.out).norm(dim=-1)
            errors[attended.layer] += (difference / want.out.norm(dim=-1)).cpu().numpy()
            masses[attended.layer] += read_mass(attended, want.weights)
            return want.out

        decode_step(engine.decoder, [sequence], token, compare)
    steps = len(exact.attention)
    return errors / steps, masses / steps


def read_mass(attended: Attended, weights: torch.Tensor) -> np.ndarray:
    """Exact weight [Hq] of the keys that a policy read, of exact ``weights`` [Hq, N]."""
    sequence, layer = attended.sequence, attended.layer
    near, settings = sequence.near[layer], sequence.settings
    far = sequence.far.store.length(layer)
    Hq = len(weights)
    if near.positions is not None:  # evicting: a set of its own for every KV head
        kept = sequence.layers[layer].positions
        group = Hq // len(kept)
        return np.concatenate(
            [
                weights[i * group : (i + 1) * group, positions.cpu()].sum(1).numpy()
                for i, positions in enumerate(kept)
            ]
        )
    sinks = min(settings.sinks, near.length)
    middle = weights[:, sinks : sinks + far]  # far tokens are those between sinks and window
    mass = weights[:, :sinks].sum(1) + weights[:, sinks + far :].sum(1)
    # the same draws again
    chosen = sequence.far.select(layer, attended.query.cpu(), sequence.tokens)
    if chosen is AllOrNone.ALL:
        mass += middle.sum(1)
    elif isinstance(chosen, Selection):
        bounds = zip(chosen.offsets[:-1], chosen.offsets[1:], strict=True)
        for row, (start, stop) in enumerate(bounds):
            heads = slice(row * chosen.heads_per_row, (row + 1) * chosen.heads_per_row)
            keys = torch.from_numpy(chosen.indices[start:stop].astype(np.int64))
            mass[heads] += middle[heads].index_select(1, keys).sum(1)
    return mass.numpy()

"""One decode step: the stages, in order, for one token of each of B sequences.

    project      hidden -> q, k, v; k and v into the window         (models/layers.Attention)
    select       q -> far keys to read                             (attention.attend_far)
    attend_far   host: q, selection -> Partial                     (attention.attend_far)
    attend_near  GPU, at the same time: q, sinks + window -> Partial
    merge        Partials -> attention output
    finish_layer output projection, feed-forward                    (models/layers.Layer)

Tokens that leave the window go to far memory and into the index between two steps.
"""

from __future__ import annotations

from collections import abc
from collections.abc import Callable
from typing import NamedTuple

import torch

from nearfar.records import Partial
from nearfar.runtime.memory.sequence import Sequence
from nearfar.runtime.models.decoder import Decoder
from nearfar.runtime.models.layers import Attention
from nearfar.runtime.models.rope import Angles, rotate
from nearfar.runtime.steps.attention import attend


class Attended(NamedTuple):
    """The attention of one layer of one sequence, as an observer gets it."""

    layer: int
    sequence: Sequence  # contains the newest token; nothing was evicted for it yet
    query: torch.Tensor  # [Hq, D] float32, rotated and scaled
    partial: Partial  # the result of attention


Observer = Callable[[Attended], torch.Tensor]  # the output [Hq, D] that the layer goes on with


def decode_step(
    decoder: Decoder,
    sequences: abc.Sequence[Sequence],
    token_ids: torch.Tensor,
    observer: Observer | None = None,
) -> torch.Tensor:
    """Logits [B, V] float32 after ``token_ids`` [B], the newest token of each sequence.

    An ``observer`` sees every attention and may replace the output. Measurements use it to compare
    a policy's attention with exact attention at equal queries.
    """
    hidden = decoder.embed(token_ids)
    turned_to = [sequence.next_position for sequence in sequences]
    positions = [sequence.tokens for sequence in sequences]
    turned_to_there = torch.tensor(turned_to, device=hidden.device)
    logits = run_layers(decoder, sequences, hidden, turned_to_there, positions, observer)
    for sequence in sequences:
        sequence.finish_step()
    return logits


def run_layers(
    decoder: Decoder,
    sequences: abc.Sequence[Sequence],
    hidden: torch.Tensor,
    turned_to: torch.Tensor,
    positions: list[int] | torch.Tensor,
    observer: Observer | None = None,
) -> torch.Tensor:
    """Logits [B, V] float32 of embedded tokens ``hidden`` [B, H], whose rows go near.

    Keys and queries are rotated to ``turned_to`` [B]; ``positions`` [B] are the tokens' places in
    their texts. If all sequences have a fixed size, only tensors change between two calls.
    """
    angles = decoder.angles(turned_to)

    def attend_all(mixer: Attention, qkv: torch.Tensor) -> torch.Tensor:
        layer = mixer.far_layer
        q, k, v = _heads(mixer, qkv, angles[layer], sequences[0])
        queries = q.float() * mixer.plan.scale
        mixed = torch.empty_like(queries)
        for b, sequence in enumerate(sequences):
            sequence.append(layer, k[b], v[b], positions[b])
            partial = attend(layer, queries[b], sequence, decoder)
            if observer is None:
                mixed[b] = partial.out
            else:
                mixed[b] = observer(Attended(layer, sequence, queries[b], partial))
            sequence.layers[layer].evict(sequence.tokens)
        return mixed.flatten(1).to(qkv.dtype)

    return decoder.logits(decoder.run(hidden, attend_all))


def _heads(
    mixer: Attention, qkv: torch.Tensor, angles: Angles | None, sequence: Sequence
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values in the form that ``sequence`` stores."""
    if angles is None or not sequence.settings.counts_cache_slots:
        return mixer.heads(qkv, angles)
    q, k, v = mixer.heads(qkv)  # keys at cache slots are rotated when used
    return rotate(q, angles), k, v

"""One decode step: the stages, in order, for one token of each of B sequences.

    project      hidden -> q, k, v; k and v into the window
    select       q -> far keys to read                             (attention.attend_far)
    attend_far   host: q, selection -> Partial                     (attention.attend_far)
    attend_near  near, at the same time: q, sinks + window -> Partial
    merge        Partials -> attention output
    finish_layer output projection, MLP

Tokens that leave the window go to far memory and into the index between two steps.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Several
from typing import NamedTuple

import torch

from nearfar.records import Partial
from nearfar.runtime.attention import attend
from nearfar.runtime.decoder import Decoder
from nearfar.runtime.rope import rotate
from nearfar.runtime.sequence import Sequence


class Attended(NamedTuple):
    """What an observer is told: one layer of one sequence has attended."""

    layer: int
    sequence: Sequence  # the newest token is in it, and nothing was evicted for it yet
    query: torch.Tensor  # [Hq, D] float32, rotated and scaled
    partial: Partial  # what attention returned


Observer = Callable[[Attended], torch.Tensor]  # the output [Hq, D] that the layer goes on with


def decode_step(
    decoder: Decoder,
    sequences: Several[Sequence],
    token_ids: torch.Tensor,
    observer: Observer | None = None,
) -> torch.Tensor:
    """Logits [B, V] float32 after ``token_ids`` [B], the newest token of each sequence.

    An ``observer`` sees every attention and may put another output in its place: measurements use
    it to hold a policy's attention against exact attention at equal queries.
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
    sequences: Several[Sequence],
    hidden: torch.Tensor,
    turned_to: torch.Tensor,
    positions: list[int] | torch.Tensor,
    observer: Observer | None = None,
) -> torch.Tensor:
    """Logits [B, V] float32 of embedded tokens ``hidden`` [B, hidden], whose rows go near.

    They are rotated to ``turned_to`` [B] and stand at ``positions`` [B] of their texts. Nothing but
    tensors changes from one call to the next where all sequences are steady.
    """
    angles = decoder.rotary.angles(turned_to)
    # near keys of a sequence that counts cache slots are rotated when they are used
    slots = sequences[0].counts_cache_slots
    for layer in range(decoder.config.layers):
        q, k, v = decoder.project(layer, hidden, None if slots else angles)
        if slots and decoder.uses_rope(layer):
            q = rotate(q, angles)
        queries = q.float() * decoder.softmax_scale
        mixed = torch.empty_like(queries)
        for b, sequence in enumerate(sequences):
            sequence.append(layer, k[b], v[b], positions[b])
            partial = attend(layer, queries[b], sequence, decoder)
            if observer is None:
                mixed[b] = partial.out
            else:
                mixed[b] = observer(Attended(layer, sequence, queries[b], partial))
            sequence.evict(layer)
        attention = mixed.flatten(1).to(hidden.dtype)
        hidden = decoder.finish_layer(layer, hidden, attention)
    return decoder.logits(hidden)

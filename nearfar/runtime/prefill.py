"""Reading a prompt: exact attention, layer by layer, in chunks.

All prompt tokens pass layer 0, then layer 1 and so on. At any moment there are the hidden states of
the prompt, the keys and values of one layer and the activations of one chunk; what a layer has read
goes to the sequence, near and far, before the next layer begins. Chunks are only a matter of
memory: the result does not depend on their size.
"""

from __future__ import annotations

import torch

from nearfar.runtime.attention import slot_angles
from nearfar.runtime.decoder import Decoder
from nearfar.runtime.progress import Progress, silent
from nearfar.runtime.prompt_attention import attend_chunk, attend_chunk_scored
from nearfar.runtime.rope import rotate
from nearfar.runtime.sequence import Sequence

PRODUCT_TOKENS = 1024


def prefill(
    decoder: Decoder,
    sequence: Sequence,
    token_ids: torch.Tensor,
    chunk_tokens: int,
    progress: Progress = silent,
) -> torch.Tensor:
    """Read ``token_ids`` [T] after what ``sequence`` has read; the last token's logits [V]."""
    hidden = decoder.embed(token_ids)
    layers = decoder.config.layers
    for layer in range(layers):
        read_layer(decoder, sequence, layer, hidden, chunk_tokens)
        progress(layer + 1, layers)
    sequence.finish_step(len(token_ids))
    return decoder.logits(hidden[-1:])[0]


def read_layer(
    decoder: Decoder, sequence: Sequence, layer: int, hidden: torch.Tensor, chunk_tokens: int
) -> None:
    """Pass ``hidden`` [T, hidden] through one layer, in place; the sequence takes its K and V."""
    config = decoder.config
    T, scored = len(hidden), sequence.policy.traits.needs_attention
    first_position = sequence.next_position
    stored_keys, stored_values = sequence.past(layer)
    past = stored_keys.shape[1]
    keys = hidden.new_empty(config.kv_heads, past + T, config.head_dim)
    values = torch.empty_like(keys)
    keys[:, :past], values[:, :past] = stored_keys, stored_values
    # what the sequence keeps: the same keys, or unrotated ones where positions count cache slots
    kept_keys = keys
    if sequence.counts_cache_slots and decoder.uses_rope(layer):
        kept_keys = keys.clone()
        keys[:, :past] = rotate(stored_keys, slot_angles(sequence, layer, decoder.rotary))
    received = hidden.new_zeros(config.query_heads, past + T, dtype=torch.float32)
    for start in range(0, T, chunk_tokens):
        stop = min(T, start + chunk_tokens)
        queries = hidden.new_empty(stop - start, config.query_heads, config.head_dim)
        for rows in pieces(start, stop):
            span = slice(past + rows.start, past + rows.stop)
            positions = torch.arange(rows.start, rows.stop, device=hidden.device) + first_position
            angles = decoder.rotary.angles(positions)
            if kept_keys is keys:
                q, k, v = decoder.project(layer, hidden[rows], angles)
            else:
                q, k, v = decoder.project(layer, hidden[rows])
                kept_keys[:, span] = k.transpose(0, 1)
                q, k = rotate(q, angles), rotate(k, angles)
            queries[rows.start - start : rows.stop - start] = q
            keys[:, span], values[:, span] = k.transpose(0, 1), v.transpose(0, 1)
        # of the last layer only the last token's output is used
        first = T - 1 if layer + 1 == config.layers and not scored else start
        if first >= stop:
            continue
        seen = past + stop
        asking = queries[first - start :].transpose(0, 1)
        arguments = (asking, keys[:, :seen], values[:, :seen])
        if scored:
            out, chunk_received = attend_chunk_scored(*arguments, decoder.softmax_scale)
            received[:, :seen] += chunk_received
        else:
            out = attend_chunk(*arguments, decoder.softmax_scale)
        mixed = out.transpose(0, 1).reshape(stop - first, -1)
        for rows in pieces(first, stop):
            own = mixed[rows.start - first : rows.stop - first]
            hidden[rows] = decoder.finish_layer(layer, hidden[rows], own)
    sequence.absorb_prompt(layer, kept_keys, values, received if scored else None)


def pieces(start: int, stop: int) -> list[slice]:
    """A chunk's rows in pieces: matrix products are fastest on fewer rows than attention is."""
    return [slice(i, min(i + PRODUCT_TOKENS, stop)) for i in range(start, stop, PRODUCT_TOKENS)]

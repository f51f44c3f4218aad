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
        span, seen = slice(past + start, past + stop), past + stop
        positions = torch.arange(start, stop, device=hidden.device) + first_position
        angles = decoder.rotary.angles(positions)
        if kept_keys is keys:
            q, k, v = decoder.project(layer, hidden[start:stop], angles)
        else:
            q, k, v = decoder.project(layer, hidden[start:stop])
            kept_keys[:, span] = k.transpose(0, 1)
            q, k = rotate(q, angles), rotate(k, angles)
        keys[:, span], values[:, span] = k.transpose(0, 1), v.transpose(0, 1)
        arguments = (q.transpose(0, 1), keys[:, :seen], values[:, :seen], decoder.softmax_scale)
        if scored:
            out, chunk_received = attend_chunk_scored(*arguments)
            received[:, :seen] += chunk_received
        else:
            out = attend_chunk(*arguments)
        mixed = out.transpose(0, 1).reshape(stop - start, -1)
        hidden[start:stop] = decoder.finish_layer(layer, hidden[start:stop], mixed)
    sequence.absorb_prompt(layer, kept_keys, values, received if scored else None)

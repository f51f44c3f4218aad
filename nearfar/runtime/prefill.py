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

PRODUCT_TOKENS = 1024  # matrix products are fastest on fewer rows than attention is


def prefill(
    decoder: Decoder,
    sequence: Sequence,
    token_ids: torch.Tensor,
    chunk_tokens: int,
    progress: Progress = silent,
) -> torch.Tensor:
    """Read ``token_ids`` [T] after what ``sequence`` has read; the last token's logits [V].

    ``progress`` is told how many layers have read them.
    """
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
    prompt = LayerPrompt(decoder, sequence, layer, len(hidden))
    for chunk in pieces(slice(0, len(hidden)), chunk_tokens):
        queries = prompt.project(hidden, chunk)
        # of the last layer only the last token's output is used
        first = len(hidden) - 1 if prompt.only_last_output else chunk.start
        if first >= chunk.stop:
            continue
        attention = prompt.attend(queries[first - chunk.start :], chunk.stop)
        for rows in pieces(slice(first, chunk.stop), PRODUCT_TOKENS):
            own = attention[rows.start - first : rows.stop - first]
            hidden[rows] = decoder.finish_layer(layer, hidden[rows], own)
    prompt.hand_over()


def pieces(span: slice, size: int) -> list[slice]:
    """``span`` in consecutive pieces of ``size``, the last one shorter."""
    return [slice(i, min(i + size, span.stop)) for i in range(span.start, span.stop, size)]


class LayerPrompt:
    """Keys and values of one layer while a prompt of T tokens passes it."""

    def __init__(self, decoder: Decoder, sequence: Sequence, layer: int, T: int) -> None:
        self._decoder, self._sequence, self._layer = decoder, sequence, layer
        config = decoder.config
        self._scored = sequence.policy.traits.needs_attention
        self._first_position = sequence.next_position
        self.only_last_output = layer + 1 == config.layers and not self._scored
        past_keys, past_values = sequence.past(layer)
        self._past = past_keys.shape[1]
        self._keys = past_keys.new_empty(config.kv_heads, self._past + T, config.head_dim)
        self._values = torch.empty_like(self._keys)
        self._keys[:, : self._past], self._values[:, : self._past] = past_keys, past_values
        # what the sequence keeps: these keys, or unrotated ones where positions are cache slots
        self._kept_keys = self._keys
        if sequence.counts_cache_slots and decoder.uses_rope(layer):
            self._kept_keys = self._keys.clone()
            angles = slot_angles(sequence, layer, decoder.rotary)
            self._keys[:, : self._past] = rotate(past_keys, angles)
        self._received = torch.zeros(
            config.query_heads, self._past + T if self._scored else 0, device=self._keys.device
        )

    def project(self, hidden: torch.Tensor, chunk: slice) -> torch.Tensor:
        """Take in keys and values of the chunk's tokens; their queries [n, Hq, D], rotated."""
        config = self._decoder.config
        size = chunk.stop - chunk.start
        queries = hidden.new_empty(size, config.query_heads, config.head_dim)
        for rows in pieces(chunk, PRODUCT_TOKENS):
            span = slice(self._past + rows.start, self._past + rows.stop)
            positions = torch.arange(rows.start, rows.stop, device=hidden.device)
            angles = self._decoder.rotary.angles(positions + self._first_position)
            if self._kept_keys is self._keys:
                q, k, v = self._decoder.project(self._layer, hidden[rows], angles)
            else:
                q, k, v = self._decoder.project(self._layer, hidden[rows])
                self._kept_keys[:, span] = k.transpose(0, 1)
                q, k = rotate(q, angles), rotate(k, angles)
            queries[rows.start - chunk.start : rows.stop - chunk.start] = q
            self._keys[:, span], self._values[:, span] = k.transpose(0, 1), v.transpose(0, 1)
        return queries

    def attend(self, queries: torch.Tensor, stop: int) -> torch.Tensor:
        """Attention [n, Hq D] of ``queries`` [n, Hq, D], those of the n tokens before ``stop``."""
        seen = self._past + stop
        keys, values = self._keys[:, :seen], self._values[:, :seen]
        asking, scale = queries.transpose(0, 1), self._decoder.softmax_scale
        if self._scored:
            out, received = attend_chunk_scored(asking, keys, values, scale)
            self._received[:, :seen] += received
        else:
            out = attend_chunk(asking, keys, values, scale)
        return out.transpose(0, 1).reshape(len(queries), -1)

    def hand_over(self) -> None:
        """Give the sequence what the layer has read."""
        received = self._received if self._scored else None
        self._sequence.absorb_prompt(self._layer, self._kept_keys, self._values, received)

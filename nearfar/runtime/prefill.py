"""Reading a prompt: exact attention, layer by layer, in chunks.

All prompt tokens pass layer 0, then layer 1 and so on. At any moment there are the hidden states of
the prompt, the keys and values of one layer and the activations of one chunk; what a layer has read
goes to the sequence, near and far, before the next layer begins. Chunks are only a matter of
memory: the result does not depend on their size.
"""

from __future__ import annotations

import torch

from nearfar.records import Partial
from nearfar.runtime.attention import slot_angles
from nearfar.runtime.decoder import Decoder
from nearfar.runtime.near_kernels import embed_prompt, finish_prompt, place_prompt
from nearfar.runtime.progress import Progress, silent
from nearfar.runtime.prompt_attention import attend_chunk, attend_heads, merge_parts
from nearfar.runtime.rope import Angles, rotate
from nearfar.runtime.sequence import Sequence
from nearfar.runtime.token_range import check_token_ids
from nearfar.runtime.watching import Watch

CHUNK_TOKENS = 4096  # of attention on a CPU; a matter of memory and, a little, of speed
PRODUCT_TOKENS = 1024  # of a matrix product on a CPU, which is fastest on fewer than attention is
GPU_PRODUCT_TOKENS = 8192


def chunk_tokens_of(wanted: int | None, device: torch.device) -> int:
    """Prompt tokens that are read together where ``wanted`` leaves it open."""
    return wanted or (CHUNK_TOKENS if device.type == "cpu" else GPU_PRODUCT_TOKENS)


def product_tokens(device: torch.device) -> int:
    """Tokens that are multiplied with the weights together."""
    return PRODUCT_TOKENS if device.type == "cpu" else GPU_PRODUCT_TOKENS


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
    check_token_ids([int(i) for i in token_ids.aminmax()], decoder.config.vocab_size)
    sequence.announce_prompt(len(token_ids))
    hidden = embed_prompt(decoder, token_ids)
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
        for rows in pieces(slice(first, chunk.stop), product_tokens(hidden.device)):
            own = attention[rows.start - first : rows.stop - first]
            finish_prompt(decoder, layer, hidden[rows], own)
    prompt.hand_over()


def pieces(span: slice, size: int) -> list[slice]:
    """``span`` in consecutive pieces of ``size``, the last one shorter."""
    return [slice(i, min(i + size, span.stop)) for i in range(span.start, span.stop, size)]


class LayerPrompt:
    """Keys and values of one layer while a prompt of T tokens passes it."""

    def __init__(self, decoder: Decoder, sequence: Sequence, layer: int, T: int) -> None:
        self._decoder, self._sequence, self._layer = decoder, sequence, layer
        config = decoder.config
        self._first_position = sequence.next_position
        self._past, D = sequence.held_tokens(layer), config.head_dim
        self._watch = Watch(decoder, layer, self._past, T, sequence.watched)
        self.only_last_output = layer + 1 == config.layers and not self._watch.needs_all_attention
        # whole eights: a GPU kernel reads heads that start on multiples of 16 numbers
        capacity = -(-(self._past + T) // 8) * 8
        weights = decoder.weights.norm
        self._rows = weights.new_empty(config.kv_heads, capacity, 2 * D)[:, : self._past + T]
        sequence.copy_past(layer, self._rows)
        self._keys, self._values = self._rows[..., :D], self._rows[..., D:]
        # what the sequence keeps: these keys, or unrotated ones where positions are cache slots
        self._kept_keys = self._keys
        if sequence.counts_cache_slots and decoder.uses_rope(layer):
            self._kept_keys = self._keys.clone()
            angles = slot_angles(sequence, layer, decoder.rotary)
            self._keys[:, : self._past] = rotate(self._kept_keys[:, : self._past], angles)

    def project(self, hidden: torch.Tensor, chunk: slice) -> torch.Tensor:
        """Take in keys and values of the chunk's tokens; their queries [n, Hq, D], rotated."""
        queries = []
        for rows in pieces(chunk, product_tokens(hidden.device)):
            positions = torch.arange(rows.start, rows.stop, device=hidden.device)
            angles = self._decoder.rotary.angles(positions + self._first_position)
            place = self._place if self._kept_keys is self._keys else self._place_unrotated
            queries.append(place(hidden[rows], angles, self._past + rows.start))
            self._watch.see(queries[-1], self._first_position + rows.start)
        return queries[0] if len(queries) == 1 else torch.cat(queries)

    def _place(self, hidden: torch.Tensor, angles: Angles, first: int) -> torch.Tensor:
        return place_prompt(self._decoder, self._layer, hidden, angles, self._rows, first)

    def _place_unrotated(self, hidden: torch.Tensor, angles: Angles, first: int) -> torch.Tensor:
        """Keep keys as they are before rotation; attention sees them rotated."""
        q, k, v = self._decoder.project(self._layer, hidden)
        span = slice(first, first + len(hidden))
        self._kept_keys[:, span] = k.transpose(0, 1)
        self._keys[:, span] = rotate(k, angles).transpose(0, 1)
        self._values[:, span] = v.transpose(0, 1)
        return rotate(q, angles)

    def attend(self, queries: torch.Tensor, stop: int) -> torch.Tensor:
        """Attention [n, Hq D] of ``queries`` [n, Hq, D], those of the n tokens before ``stop``."""
        seen = self._past + stop
        keys, values = self._keys[:, :seen], self._values[:, :seen]
        asking, scale = queries.transpose(0, 1), self._decoder.softmax_scale
        partial = attend_chunk(asking, keys, values, scale)
        self._watch.see_attention(asking, keys, partial)
        ragged = self._sequence.ragged[self._layer]
        if ragged is not None:
            partial = merge_parts(partial, attend_heads(asking, ragged.heads, scale))
        remnant = self._sequence.remnant
        if remnant is not None and self._sequence.tokens:
            part = remnant.attend(self._layer, asking.float() * scale)
            partial = merge_parts(partial, Partial(part.out.to(partial.out.dtype), part.lse))
        return partial.out.transpose(0, 1).reshape(len(queries), -1)

    def hand_over(self) -> None:
        """Give the sequence what the layer has read."""
        asked = self._watch.asked()
        self._sequence.absorb_prompt(self._layer, self._kept_keys, self._values, asked)

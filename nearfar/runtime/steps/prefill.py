"""Prefill: a prompt is read with exact attention, layer by layer, in chunks.

All prompt tokens pass layer 0, then layer 1 and so on. Near memory holds the hidden states of the
prompt, the keys and values of one layer and the activations of one chunk. The sequence takes the
keys and values of a layer, near and far, before the next layer begins. The chunk size changes the
memory that is needed and not the result.
"""

from __future__ import annotations

import torch

from nearfar.progress import Progress, silent
from nearfar.records import Partial
from nearfar.runtime.memory.near_store import rounded_tokens
from nearfar.runtime.memory.sequence import Sequence
from nearfar.runtime.models.decoder import Decoder
from nearfar.runtime.models.layers import Attention, Layer
from nearfar.runtime.models.linear import GPU_PRODUCT_TOKENS, pieces, product_tokens
from nearfar.runtime.models.rope import Angles, rotate
from nearfar.runtime.steps.attention import slot_angles
from nearfar.runtime.steps.gpu_prefill import place_prompt
from nearfar.runtime.steps.prompt_attention import attend_chunk, attend_heads, merge_prompt
from nearfar.runtime.steps.query_statistics import QueryStatistics
from nearfar.runtime.text.token_range import check_token_ids

CHUNK_TOKENS = 4096  # of attention on a CPU; changes memory and, a little, speed


def chunk_tokens_of(wanted: int | None, device: torch.device) -> int:
    """Prompt tokens that are read together: ``wanted``, or the default of ``device``."""
    return wanted or (CHUNK_TOKENS if device.type == "cpu" else GPU_PRODUCT_TOKENS)


def prefill(
    decoder: Decoder,
    sequence: Sequence,
    token_ids: torch.Tensor,
    chunk_tokens: int,
    progress: Progress = silent,
) -> torch.Tensor:
    """Read ``token_ids`` [T] behind the tokens of ``sequence``; return the last one's logits [V].

    ``progress`` gets the number of layers that have read them.
    """
    check_token_ids([int(i) for i in token_ids.aminmax()], decoder.plan.vocab_size)
    sequence.announce_prompt(len(token_ids))
    hidden = decoder.embed(token_ids)
    for number, layer in enumerate(decoder.layers):
        read_layer(decoder, sequence, layer, hidden, chunk_tokens)
        progress(number + 1, len(decoder.layers))
    sequence.finish_step(len(token_ids))
    return decoder.logits(hidden[-1:])[0]


def read_layer(
    decoder: Decoder, sequence: Sequence, layer: Layer, hidden: torch.Tensor, chunk_tokens: int
) -> None:
    """Pass ``hidden`` [T, H] through one layer, in place; the sequence takes its K and V."""
    prompt = None
    if layer.mixer is not None:
        prompt = LayerPrompt(decoder, sequence, layer.mixer, len(hidden))
    for chunk in pieces(slice(0, len(hidden)), chunk_tokens):
        context = PromptChunk(hidden, chunk, prompt)
        if layer.mixer is not None:
            layer.mixer.add_to(context)
        if layer.feed_forward is not None:
            for rows in context.products():
                layer.feed_forward.add_to(rows)
    if prompt is not None:
        prompt.hand_over()


class PromptChunk:
    """Consecutive tokens of a prompt in one layer: a `LayerContext`."""

    def __init__(self, hidden: torch.Tensor, chunk: slice, prompt: LayerPrompt | None) -> None:
        self.hidden = hidden[chunk]
        self._chunk, self._prompt = chunk, prompt

    def products(self) -> list[PromptChunk]:
        """The tokens whose output is used, in pieces of the size of one matrix product."""
        size = product_tokens(self.hidden.device)
        spans = pieces(slice(0, len(self.hidden)), size)
        return [PromptChunk(self.hidden, rows, None) for rows in spans]

    def scratch(self, name: str, width: int) -> torch.Tensor:  # noqa: ARG002  a GPU step's has names
        """A new tensor."""
        return self.hidden.new_empty(len(self.hidden), width)

    def attend(self, mixer: Attention, qkv: torch.Tensor) -> torch.Tensor:
        """Attention of the chunk's tokens; in the last layer, of the prompt's last token alone."""
        prompt, chunk = self._prompt, self._chunk
        assert prompt is not None
        queries = prompt.place(qkv, chunk)
        # in the last layer only the last token's output is used
        first = prompt.tokens - 1 if prompt.only_last_output else chunk.start
        self.hidden = self.hidden[max(0, first - chunk.start) :]
        if first >= chunk.stop:
            return qkv.new_empty(0, mixer.plan.query_width)
        return prompt.attend(queries[first - chunk.start :], chunk.stop)


class LayerPrompt:
    """Keys and values of one layer while a prompt of T tokens passes it."""

    def __init__(self, decoder: Decoder, sequence: Sequence, mixer: Attention, T: int) -> None:
        self._decoder, self._sequence, self._mixer = decoder, sequence, mixer
        self.tokens, layer, D = T, mixer.far_layer, mixer.plan.head_dim
        self._first_position = sequence.next_position
        self._past = sequence.layers[layer].held_tokens
        self._watch = QueryStatistics(decoder, layer, self._past, T, sequence.watched)
        is_last = decoder.layers[-1].mixer is mixer
        self.only_last_output = is_last and not self._watch.needs_all_attention
        # as near rows are made: an empty layer then takes the array itself
        capacity = rounded_tokens(self._past + T)
        like = decoder.norm
        self._rows = like.new_empty(mixer.plan.kv_heads, capacity, 2 * D)[:, : self._past + T]
        sequence.layers[layer].copy_past(self._rows)
        self._keys, self._values = self._rows[..., :D], self._rows[..., D:]
        # the sequence keeps these keys, or unrotated ones if positions are cache slots
        self._kept_keys = self._keys
        if sequence.settings.counts_cache_slots and decoder.uses_rope(layer):
            self._kept_keys = self._keys.clone()
            angles = slot_angles(sequence, layer, decoder.rotary(layer))
            self._keys[:, : self._past] = rotate(self._kept_keys[:, : self._past], angles)

    def place(self, qkv: torch.Tensor, chunk: slice) -> torch.Tensor:
        """Store keys and values of the chunk's tokens; return their rotated queries [n, Hq, D]."""
        queries = []
        for rows in pieces(chunk, product_tokens(qkv.device)):
            first = self._first_position + rows.start
            positions = torch.arange(first, first + rows.stop - rows.start, device=qkv.device)
            angles = self._decoder.layer_angles(self._mixer.far_layer, positions)
            own = qkv[rows.start - chunk.start : rows.stop - chunk.start]
            queries.append(self._place(own, angles, self._past + rows.start))
            self._watch.see(queries[-1], first)
        return queries[0] if len(queries) == 1 else torch.cat(queries)

    def _place(self, qkv: torch.Tensor, angles: Angles | None, first: int) -> torch.Tensor:
        if self._kept_keys is self._keys:
            return place_prompt(self._mixer, qkv, angles, self._rows, first)
        assert angles is not None
        q, k, v = self._mixer.heads(qkv)
        span = slice(first, first + len(qkv))
        self._kept_keys[:, span] = k.transpose(0, 1)  # before rotation; attention sees it after
        self._keys[:, span] = rotate(k, angles).transpose(0, 1)
        self._values[:, span] = v.transpose(0, 1)
        return rotate(q, angles)

    def attend(self, queries: torch.Tensor, stop: int) -> torch.Tensor:
        """Attention [n, Hq D] of ``queries`` [n, Hq, D] of the n tokens before ``stop``."""
        seen = self._past + stop
        keys, values = self._keys[:, :seen], self._values[:, :seen]
        asking, scale = queries.transpose(0, 1), self._mixer.plan.scale
        partial = attend_chunk(asking, keys, values, scale)
        self._watch.see_attention(asking, keys, partial)
        ragged = self._sequence.layers[self._mixer.far_layer].ragged
        if ragged is not None:
            partial = merge_prompt(partial, attend_heads(asking, ragged.heads, scale))
        evicted_summary = self._sequence.evicted_summary
        if evicted_summary is not None and self._sequence.tokens:
            part = evicted_summary.attend(self._mixer.far_layer, asking.float() * scale)
            partial = merge_prompt(partial, Partial(part.out.to(partial.out.dtype), part.lse))
        return partial.out.transpose(0, 1).reshape(len(queries), -1)

    def hand_over(self) -> None:
        """Give the sequence the layer's keys and values."""
        stats = self._watch.stats()
        self._sequence.absorb_prompt(self._mixer.far_layer, self._kept_keys, self._values, stats)

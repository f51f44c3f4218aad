"""Exact attention of a chunk of prompt tokens over everything before it and itself."""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

from nearfar.gpu_kernels.attend_near import merge_partials
from nearfar.records import Partial
from nearfar.runtime.near_kernels import attend_with_lse, merge_into

GPU_PIECE_TOKENS = 4096  # queries at a time: 640 TFLOP/s on an H200, where all at once are 560
SCORED_BYTES = 2**26  # of the attention matrix that is held at a time where a policy asks for it


def attend_chunk(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
) -> torch.Tensor:
    """Output [Hq, T, D] of ``queries`` [Hq, T, D] over ``keys`` and ``values`` [Hkv, N, D].

    The queries are the last T of the N tokens: query t sees keys 0 to N - T + t.
    """
    T, N = queries.shape[1], keys.shape[1]
    if queries.is_cuda:
        return _attend_on_gpu(queries, keys, values, scale)
    if T == N or T == 1:
        return _library(queries, keys, values, scale, causal=T > 1)
    past = _with_lse(queries, keys[:, : N - T], values[:, : N - T], scale, causal=False)
    own = _with_lse(queries, keys[:, N - T :], values[:, N - T :], scale, causal=True)
    return merge_partials(past, own).out.to(queries.dtype)


def _library(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    *,
    causal: bool,
) -> torch.Tensor:
    shared = queries.shape[0] != keys.shape[0]
    out: torch.Tensor = scaled_dot_product_attention(
        queries[None],
        keys[None],
        values[None],
        is_causal=causal,
        scale=scale,
        enable_gqa=shared,
    )
    return out[0]


def _attend_on_gpu(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
) -> torch.Tensor:
    """Pieces of queries over what is before them, then over themselves."""
    T, N = queries.shape[1], keys.shape[1]
    # token by token as queries lie, so that the next product needs no copy
    out = queries.new_empty(T, queries.shape[0], queries.shape[2]).transpose(0, 1)
    for start in range(0, T, GPU_PIECE_TOKENS):
        stop = min(start + GPU_PIECE_TOKENS, T)
        seen, own = N - T + start, slice(N - T + start, N - T + stop)
        asking = queries[:, start:stop]
        result, lse = attend_with_lse(asking, keys[:, own], values[:, own], scale, causal=True)
        if seen:
            past = (keys[:, :seen], values[:, :seen])
            merge_into(result, lse, *attend_with_lse(asking, *past, scale, causal=False))
        out[:, start:stop] = result
    return out


def _with_lse(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float, *, causal: bool
) -> Partial:
    # The public function hides the log-sum-exp. Without it a chunk needs a mask as long as the
    # context: a fifth slower here, and memory that grows with the context.
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        queries[None], keys[None], values[None], 0.0, causal, scale=scale
    )
    return Partial(out[0], lse[0])


def attend_chunk_scored(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`attend_chunk`, and the attention [Hq, N] float32 that each key got from all queries."""
    Hq, T, D = queries.shape
    Hkv, N, _ = keys.shape
    out = torch.empty_like(queries)
    received = torch.zeros(Hq, N, device=queries.device)
    keys32, values32 = keys.float().transpose(1, 2), values.float()
    step = max(1, SCORED_BYTES // (Hq * N * 4))
    for start in range(0, T, step):
        stop = min(T, start + step)
        seen = N - T + stop  # later keys are hidden from all of these queries
        grouped = queries[:, start:stop].float().reshape(Hkv, -1, D) * scale
        logits = (grouped @ keys32[:, :, :seen]).view(Hq, stop - start, seen)
        hidden = torch.ones(stop - start, stop - start, dtype=torch.bool, device=queries.device)
        logits[:, :, seen - len(hidden) :].masked_fill_(hidden.triu_(1), -torch.inf)
        attention = logits.softmax(-1)
        received[:, :seen] += attention.sum(1)
        mixed = attention.view(Hkv, -1, seen) @ values32[:, :seen]
        out[:, start:stop] = mixed.view(Hq, stop - start, D).to(out.dtype)
    return out, received

"""Exact attention of a chunk of prompt tokens over all earlier tokens and itself."""

from __future__ import annotations

import torch

from nearfar.gpu_kernels.attend_near import merge_partials
from nearfar.records import Partial
from nearfar.runtime.steps.gpu_prefill import attend_with_lse, merge_prompt_into

GPU_PIECE_TOKENS = 4096  # queries at a time: 640 TFLOP/s on an H200, 560 with all at once
# Queries and keys of a tile of the attention matrix. The matrix is made only for policies that need
# its column sums. A GPU takes larger tiles, so that it launches fewer.
SUMMED_QUERIES, SUMMED_KEYS = 256, 1024
GPU_SUMMED_QUERIES, GPU_SUMMED_KEYS = 1024, 8192


def attend_chunk(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
) -> Partial:
    """Output [Hq, T, D] and log-sum-exp [Hq, T] of ``queries`` [Hq, T, D] over [Hkv, N, D].

    The queries are the last T of the N tokens: query t sees keys 0 to N - T + t. The output is in
    the type of ``queries``.
    """
    T, N = queries.shape[1], keys.shape[1]
    if queries.is_cuda:
        return _attend_on_gpu(queries, keys, values, scale)
    if T == N or T == 1:
        return _with_lse(queries, keys, values, scale, causal=T > 1)
    past = _with_lse(queries, keys[:, : N - T], values[:, : N - T], scale, causal=False)
    own = _with_lse(queries, keys[:, N - T :], values[:, N - T :], scale, causal=True)
    return merge_prompt(past, own)


def _attend_on_gpu(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
) -> Partial:
    """Attention in pieces of queries: of each piece over itself, then over all earlier tokens."""
    T, N = queries.shape[1], keys.shape[1]
    # tokens are the outer axis, as for queries, so that the next product needs no copy
    out = queries.new_empty(T, queries.shape[0], queries.shape[2]).transpose(0, 1)
    lse = torch.empty(queries.shape[:2], device=queries.device)
    for start in range(0, T, GPU_PIECE_TOKENS):
        stop = min(start + GPU_PIECE_TOKENS, T)
        seen, own = N - T + start, slice(N - T + start, N - T + stop)
        asking = queries[:, start:stop]
        result, part = attend_with_lse(asking, keys[:, own], values[:, own], scale, causal=True)
        if seen:
            past = (keys[:, :seen], values[:, :seen])
            merge_prompt_into(result, part, *attend_with_lse(asking, *past, scale, causal=False))
        out[:, start:stop], lse[:, start:stop] = result, part
    return Partial(out, lse)


def attend_heads(queries: torch.Tensor, heads: list[torch.Tensor], scale: float) -> Partial:
    """Attention of ``queries`` [Hq, T, D] over all rows [M_h, 2 D] of their own KV head."""
    D = queries.shape[2]
    parts = []
    for own, rows in zip(queries.chunk(len(heads)), heads, strict=True):
        keys, values = rows[None, :, :D], rows[None, :, D:]
        if queries.is_cuda:
            parts.append(Partial(*attend_with_lse(own, keys, values, scale, causal=False)))
        else:
            parts.append(_with_lse(own, keys, values, scale, causal=False))
    return Partial(torch.cat([p.out for p in parts]), torch.cat([p.lse for p in parts]))


def merge_prompt(first: Partial, second: Partial) -> Partial:
    """Merge both parts, in the type of the ``first`` output."""
    if first.out.is_cuda:
        merge_prompt_into(first.out, first.lse, second.out, second.lse)
        return first
    merged = merge_partials(first, second)
    return Partial(merged.out.to(first.out.dtype), merged.lse)


def _with_lse(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float, *, causal: bool
) -> Partial:
    # The public function hides the log-sum-exp. Without it a chunk needs a mask as long as the
    # context: a fifth slower here, and memory that grows with the context.
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        queries[None], keys[None], values[None], 0.0, causal, scale=scale
    )
    return Partial(out[0], lse[0])


def column_sums(
    queries: torch.Tensor, keys: torch.Tensor, lse: torch.Tensor, scale: float
) -> torch.Tensor:
    """The attention [Hq, N] float32 that each key gets from the queries of a chunk, summed.

    Arguments are those of `attend_chunk`. With its ``lse`` [Hq, T] no second softmax is needed: a
    weight is exp(logit - lse). The attention matrix is made tile by tile, in float32.
    """
    Hq, T, _ = queries.shape
    N, past = keys.shape[1], keys.shape[1] - T
    sums = torch.zeros(Hq, N, device=queries.device)
    query_step, key_step = summed_tile(queries.device)
    for first_key in range(0, N, key_step):
        last_key = min(first_key + key_step, N)
        tile_keys = keys[:, first_key:last_key].float().transpose(1, 2)
        # earlier queries see none of these keys
        for start in range(max(0, first_key - past), T, query_step):
            stop = min(start + query_step, T)
            weights = _weights(queries[:, start:stop], tile_keys, lse[:, start:stop], scale)
            if last_key - 1 > past + start:
                weights.tril_(past + start - first_key)
            sums[:, first_key:last_key] += weights.sum(1)
            del weights  # otherwise two tiles are in memory at once
    return sums


def summed_tile(device: torch.device) -> tuple[int, int]:
    """Queries and keys of a tile of the attention matrix that `column_sums` makes."""
    if device.type == "cuda":
        return GPU_SUMMED_QUERIES, GPU_SUMMED_KEYS
    return SUMMED_QUERIES, SUMMED_KEYS


def _weights(
    queries: torch.Tensor, keys: torch.Tensor, lse: torch.Tensor, scale: float
) -> torch.Tensor:
    """exp(logit - lse) [Hq, n, m] of ``queries`` [Hq, n, D] with ``keys`` [Hkv, D, m]."""
    Hq, n, D = queries.shape
    Hkv, _, m = keys.shape
    grouped = queries.float().reshape(Hkv, -1, D)
    logits = torch.baddbmm(-lse.reshape(Hkv, -1, 1), grouped, keys, alpha=scale)
    return logits.exp_().view(Hq, n, m)

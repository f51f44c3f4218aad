"""What differs where near is a GPU, found without importing Triton where it is not.

Kernels of `gpu_kernels` are written in Triton, which only machines with a GPU need. This is the one
place that imports them, when tensors on a GPU arrive.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812  its usual name
from torch import Tensor

from nearfar.runtime.decoder import Decoder
from nearfar.runtime.rope import Angles, rotate

# what is shorter, or has fewer pairs of a query and a key, is done before cuDNN has a plan for it
SHORT_TOKENS, FEW_PAIRS = 256, 2**24


def embed_prompt(decoder: Decoder, token_ids: Tensor) -> Tensor:
    """Hidden states [T, hidden] of ``token_ids`` [T], a new tensor."""
    if not token_ids.is_cuda:
        return decoder.embed(token_ids)
    from nearfar.gpu_kernels.embed import embed

    # rows of a table in host memory come over the bus, and only those
    hidden = torch.empty(
        len(token_ids), decoder.config.hidden_size, dtype=decoder.dtype, device=decoder.device
    )
    embed(decoder.weights.embedding, token_ids.int(), hidden)
    return hidden


def place_prompt(
    decoder: Decoder, layer: int, hidden: Tensor, angles: Angles, rows: Tensor, first: int
) -> Tensor:
    """Project ``hidden`` [T, hidden] into ``rows`` [Hkv, N, 2 D] from slot ``first`` on.

    Returns the rotated queries [T, Hq, D].
    """
    if hidden.is_cuda:
        return _place_by_kernel(decoder, layer, hidden, angles, rows, first)
    q, k, v = decoder.project(layer, hidden)
    if decoder.uses_rope(layer):
        q, k = rotate(q, angles), rotate(k, angles)
    span, D = slice(first, first + len(hidden)), decoder.config.head_dim
    rows[:, span, :D], rows[:, span, D:] = k.transpose(0, 1), v.transpose(0, 1)
    return q


def _place_by_kernel(
    decoder: Decoder, layer: int, hidden: Tensor, angles: Angles, rows: Tensor, first: int
) -> Tensor:
    from nearfar.gpu_kernels.place_tokens import place_tokens
    from nearfar.gpu_kernels.rows import RowTable

    config, weights = decoder.config, decoder.weights.layers[layer]
    eps = config.rms_norm_eps
    normed = F.rms_norm(hidden, weights.input_norm.shape, weights.input_norm, eps)
    qkv = F.linear(normed, weights.qkv, weights.qkv_bias)
    query = hidden.new_empty(len(hidden), config.query_heads, config.head_dim)
    slots = torch.arange(first, first + len(hidden), dtype=torch.int32, device=hidden.device)
    norms = None
    if weights.q_norm is not None and weights.k_norm is not None:
        norms = (weights.q_norm, weights.k_norm)
    if not decoder.uses_rope(layer):
        angles = Angles(torch.ones_like(angles.cos), torch.zeros_like(angles.sin))
    place_tokens(qkv, angles, norms, eps, RowTable.of([rows]), slots, query, 1.0)
    return query


def finish_prompt(decoder: Decoder, layer: int, hidden: Tensor, attention: Tensor) -> None:
    """`Decoder.finish_layer` in place."""
    if not hidden.is_cuda:
        hidden.copy_(decoder.finish_layer(layer, hidden, attention))
        return
    from nearfar.gpu_kernels.matvec import silu_gate

    weights, eps = decoder.weights.layers[layer], decoder.config.rms_norm_eps
    _add_product(hidden, attention, weights.output, weights.output_bias)
    normed = F.rms_norm(hidden, weights.post_norm.shape, weights.post_norm, eps)
    inner = silu_gate(F.linear(normed, weights.gate_up, weights.gate_up_bias))
    _add_product(hidden, inner, weights.down, weights.down_bias)


def _add_product(hidden: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Add ``x`` times ``weight`` transposed to ``hidden``, within the product."""
    hidden.addmm_(x, weight.T)
    if bias is not None:
        hidden += bias


def attend_with_lse(
    queries: Tensor, keys: Tensor, values: Tensor, scale: float, *, causal: bool
) -> tuple[Tensor, Tensor]:
    """Attention [Hq, T, D] and log-sum-exp [Hq, T] on a GPU; with ``causal``, T and N are equal.

    cuDNN where it can, which on an H200 takes 0.6 of the time of our own kernel
    (`benchmarks/gpu_kernels.py`); else that, and for questions: cuDNN plans each new shape for
    40 ms, more than all layers of a question save by it.
    """
    (_, T, D), N = queries.shape, keys.shape[1]
    worth_a_plan = T > SHORT_TOKENS and T * N >= FEW_PAIRS
    if worth_a_plan and queries.dtype != torch.float32 and D % 8 == 0 and D <= 128:
        return _attend_by_plan(queries, keys, values, scale, causal=causal)
    from nearfar.gpu_kernels.prefill_attention import attend_prompt

    out = torch.empty_like(queries)
    lse = torch.empty(queries.shape[:2], device=queries.device)
    attend_prompt(queries, keys, values, scale, out, lse, causal=causal)
    return out, lse


def _attend_by_plan(
    queries: Tensor, keys: Tensor, values: Tensor, scale: float, *, causal: bool
) -> tuple[Tensor, Tensor]:
    result = torch.ops.aten._scaled_dot_product_cudnn_attention(
        queries[None], keys[None], values[None], None, True, 0.0, causal, False, scale=scale
    )
    return result[0][0], result[1][0, :, :, 0]


def merge_into(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> None:
    """Merge the attention over other keys into ``out`` [Hq, T, D], ``lse`` [Hq, T], on a GPU."""
    from nearfar.gpu_kernels.merge import merge_pair

    merge_pair(out, lse, other, other_lse)

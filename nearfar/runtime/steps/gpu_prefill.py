"""The parts of prefill that use GPU kernels, without importing Triton on a machine without a GPU.

Kernels of `gpu_kernels` are written in Triton, which only machines with a GPU need; they are
imported when tensors on a GPU arrive.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nearfar.runtime.models.layers import Attention
from nearfar.runtime.models.rope import Angles, rotate

# Below these numbers of queries and of query-key pairs, our kernel ends before cuDNN has planned.
SHORT_TOKENS, FEW_PAIRS = 256, 2**24


def place_prompt(
    mixer: Attention, qkv: Tensor, angles: Angles | None, rows: Tensor, first: int
) -> Tensor:
    """Write rotated keys, and values, to ``rows`` [Hkv, N, 2 D] from slot ``first`` on.

    Takes them from ``qkv`` [T, (Hq + 2 Hkv) D]. Returns its rotated queries [T, Hq, D].
    """
    if qkv.is_cuda:
        return _place_by_kernel(mixer, qkv, angles, rows, first)
    q, k, v = mixer.heads(qkv)
    if angles is not None:
        q, k = rotate(q, angles), rotate(k, angles)
    span, D = slice(first, first + len(qkv)), mixer.plan.head_dim
    rows[:, span, :D], rows[:, span, D:] = k.transpose(0, 1), v.transpose(0, 1)
    return q


def _place_by_kernel(
    mixer: Attention, qkv: Tensor, angles: Angles | None, rows: Tensor, first: int
) -> Tensor:
    from nearfar.gpu_kernels.place_tokens import place_tokens
    from nearfar.gpu_kernels.rows import RowTable

    T, plan = len(qkv), mixer.plan
    query = qkv.new_empty(T, plan.query_heads, plan.head_dim)
    slots = torch.arange(first, first + T, dtype=torch.int32, device=qkv.device)
    if angles is None:
        angles = no_rotation(qkv.new_empty(T, plan.head_dim, dtype=torch.float32))
    place_tokens(qkv, angles, mixer.norms, mixer.norm.eps, RowTable.of([rows]), slots, query, 1.0)
    return query


def no_rotation(like: Tensor) -> Angles:
    """Angles of the shape of ``like`` that rotate nothing."""
    return Angles(torch.ones_like(like), torch.zeros_like(like))


def attend_with_lse(
    queries: Tensor, keys: Tensor, values: Tensor, scale: float, *, causal: bool
) -> tuple[Tensor, Tensor]:
    """Attention [Hq, T, D] and log-sum-exp [Hq, T] on a GPU; with ``causal``, T and N are equal.

    On an H200 cuDNN takes 0.6 of the time of our own kernel (`benchmarks/gpu_kernels.py`). Our
    kernel serves shapes that cuDNN does not support, and questions: cuDNN plans each new shape for
    40 ms, more than it saves in all layers of a question.
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


def merge_prompt_into(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> None:
    """Merge the attention over other keys into ``out`` [Hq, T, D], ``lse`` [Hq, T], on a GPU."""
    from nearfar.gpu_kernels.merge import merge_pair

    merge_pair(out, lse, other, other_lse)

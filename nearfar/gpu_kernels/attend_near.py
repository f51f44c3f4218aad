"""Attention over the near set, and the merge of partial results, in plain tensor code.

Runs on the device of its arguments. Logits, softmax and sums are float32 for every storage type.
Queries must be scaled.
"""

from __future__ import annotations

import torch

from nearfar.records import Partial


def near_logits(query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Logits [Hkv, G, N] float32 of ``query`` [Hq, D] float32 with ``keys`` [Hkv, N, D]."""
    Hkv = keys.shape[0]
    grouped = query.view(Hkv, -1, query.shape[-1])
    return torch.matmul(grouped, keys.float().transpose(1, 2))


def attend_near(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> Partial:
    """Attention of ``query`` [Hq, D] float32 over ``keys`` and ``values`` [Hkv, N, D]."""
    return attend_near_scored(query, keys, values)[0]


def attend_near_scored(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
) -> tuple[Partial, torch.Tensor]:
    """`attend_near` and the attention [Hq, N] that every key received."""
    logits = near_logits(query, keys)
    lse = torch.logsumexp(logits, dim=-1)
    attention = torch.exp(logits - lse[..., None])
    out = torch.matmul(attention, values.float())
    return Partial(out.view(query.shape), lse.view(-1)), attention.view(query.shape[0], -1)


def merge_partials(first: Partial, second: Partial) -> Partial:
    """Attention over the union of two disjoint sets of keys, exactly.

    With L = logaddexp(L1, L2), out = exp(L1 - L) out1 + exp(L2 - L) out2. Empty sets have lse -inf
    and weigh nothing; the union of two empty sets is empty.
    """
    lse = torch.logaddexp(first.lse, second.lse)
    # -inf - -inf is NaN: any finite reference gives both empty sets the weight 0
    safe = torch.where(torch.isneginf(lse), torch.zeros_like(lse), lse)
    weight_1 = torch.exp(first.lse - safe)[..., None]
    weight_2 = torch.exp(second.lse - safe)[..., None]
    return Partial(weight_1 * first.out + weight_2 * second.out, lse)

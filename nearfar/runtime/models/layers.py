"""A decoder layer, written once: a mixer and a feed-forward, each adding to the hidden states.

A step on the host, a prompt and a step on a GPU differ in where tensors are and how tokens attend.
Each implements that as a `LayerContext`; the mathematics is in this file.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F  # noqa: N812  its usual name
from torch import Tensor

from nearfar.runtime.models.linear import ADDED, Fused, Linear
from nearfar.runtime.models.plan import AttentionPlan
from nearfar.runtime.models.rope import Angles, rotate


class LayerContext(Protocol):
    """The place of a layer's computation: T tokens of any sequences."""

    hidden: Tensor  # [T, H], changed in place

    def scratch(self, name: str, width: int) -> Tensor:
        """Scratch memory [T, width] in the type of the activations, with any content."""

    def attend(self, mixer: Attention, qkv: Tensor) -> Tensor:
        """Attention [n, Hq D] of the tokens whose product ``qkv`` [T, (Hq + 2 Hkv) D] is.

        Keys and values join what the tokens' sequences hold. Where only the last n tokens' output
        is wanted, ``hidden`` is theirs from here on.
        """


@dataclass(frozen=True, eq=False)
class Attention:
    """The mixer of an `AttentionPlan`."""

    plan: AttentionPlan
    far_layer: int  # its rank among the layers that keep rows far
    norm: Fused  # RMSNorm before the product
    qkv: Linear  # all queries, all keys, all values
    output: Linear
    q_norm: Tensor | None  # [D], shared by heads
    k_norm: Tensor | None

    def add_to(self, context: LayerContext) -> None:
        """Let the tokens attend."""
        qkv = context.scratch("qkv", self.qkv.out_features)
        self.qkv.into(context.hidden, qkv, self.norm)
        self.output.into(context.attend(self, qkv), context.hidden, ADDED)

    @property
    def norms(self) -> tuple[Tensor, Tensor] | None:
        """Of queries and keys."""
        return None if self.q_norm is None or self.k_norm is None else (self.q_norm, self.k_norm)

    def heads(self, qkv: Tensor, angles: Angles | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [T, Hq, D], keys and values [T, Hkv, D] of ``qkv`` [T, (Hq + 2 Hkv) D].

        With ``angles`` of the T positions, queries and keys are rotated, both at once. Queries are
        not scaled. Tokens of the three are strided, heads of a token are contiguous.
        """
        plan = self.plan
        first_key, first_value = plan.query_heads, plan.query_heads + plan.kv_heads
        heads = qkv.view(len(qkv), first_value + plan.kv_heads, plan.head_dim)
        qk, v = heads[:, :first_value], heads[:, first_value:]
        if self.norms is not None:
            both = zip((qk[:, :first_key], qk[:, first_key:]), self.norms, strict=True)
            eps = self.norm.eps
            qk = torch.cat([F.rms_norm(x, weight.shape, weight, eps) for x, weight in both], dim=1)
        if angles is not None:
            qk = rotate(qk, angles)
        return qk[:, :first_key], qk[:, first_key:], v


@dataclass(frozen=True, eq=False)
class GatedMLP:
    """The feed-forward of a `DensePlan`."""

    gated: Fused  # RMSNorm before the first product, the gate behind it
    gate_up: Linear  # gate, then up
    down: Linear

    def add_to(self, context: LayerContext) -> None:
        """Pass every token through the network."""
        inner = context.scratch("inner", self.gate_up.out_features // 2)
        self.gate_up.into(context.hidden, inner, self.gated)
        self.down.into(inner, context.hidden, ADDED)


@dataclass(frozen=True, eq=False)
class Layer:
    """The layer of a `LayerPlan`."""

    mixer: Attention | None
    feed_forward: GatedMLP | None

    def add_to(self, context: LayerContext) -> None:
        """One layer of all tokens of ``context``."""
        if self.mixer is not None:
            self.mixer.add_to(context)
        if self.feed_forward is not None:
            self.feed_forward.add_to(context)


class TensorContext:
    """New tensors and attention by a function: ``attend(mixer, qkv)`` gives [T, Hq D]."""

    def __init__(self, hidden: Tensor, attend: Callable[[Attention, Tensor], Tensor]) -> None:
        self.hidden = hidden
        self._attend = attend

    def scratch(self, name: str, width: int) -> Tensor:  # noqa: ARG002  others keep theirs by name
        """A new tensor."""
        return self.hidden.new_empty(len(self.hidden), width)

    def attend(self, mixer: Attention, qkv: Tensor) -> Tensor:
        """The result of the function."""
        return self._attend(mixer, qkv)

"""A product with a weight, and the operations of the same pass.

A layer names the weight (`Linear`) and the operations beside the product (`Fused`): a norm before,
a gate after, adding to the output. The weight decides how; today all weights are dense.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F  # noqa: N812  its usual name
from torch import Tensor

PRODUCT_TOKENS = 1024  # of one product on a CPU: the fastest size
GPU_PRODUCT_TOKENS = 8192


def product_tokens(device: torch.device) -> int:
    """Tokens that are multiplied with the weights together."""
    return PRODUCT_TOKENS if device.type == "cpu" else GPU_PRODUCT_TOKENS


def pieces(span: slice, size: int) -> list[slice]:
    """``span`` in consecutive pieces of ``size``, the last one shorter."""
    return [slice(i, min(i + size, span.stop)) for i in range(span.start, span.stop, size)]


@dataclass(frozen=True, eq=False)
class Fused:
    """The operations of a product besides multiplying."""

    norm: Tensor | None = None  # [in]: RMSNorm of the input, with ``eps``
    eps: float = 0.0
    gated: bool = False  # the weight gives gates, then values: the output is silu(gate) * value
    add: bool = False  # to what the output holds; not where gated


PLAIN = Fused()
ADDED = Fused(add=True)


class Linear(Protocol):
    """A weight as a function of tokens."""

    @property
    def out_features(self) -> int:
        """Rows of the weight; a gated product has half as many outputs."""

    @property
    def num_bytes(self) -> int:
        """Of the weight and its bias."""

    def into(self, x: Tensor, out: Tensor, fused: Fused = PLAIN) -> None:
        """Write the product of ``x`` [T, in] to ``out`` [T, out], which does not overlap it."""


class DenseLinear:
    """A weight [out, in] in the type of the activations, as in torch.nn.functional.linear."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight, self.bias = weight, bias
        self._one_token_kernel = weight.is_cuda  # of Triton, which machines without a GPU lack

    @property
    def out_features(self) -> int:
        """Rows of the weight."""
        return self.weight.shape[0]

    @property
    def num_bytes(self) -> int:
        """Of the weight and its bias."""
        return self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def into(self, x: Tensor, out: Tensor, fused: Fused = PLAIN) -> None:
        """Write the product of ``x`` [T, in] to ``out`` [T, out]. Sums are float32 or better."""
        if len(x) == 1 and self._one_token_kernel:
            from nearfar.gpu_kernels.matvec import matvec

            matvec(
                x,
                self.weight,
                self.bias,
                out,
                norm=fused.norm,
                eps=fused.eps,
                gated=fused.gated,
                add=fused.add,
            )
            return
        for rows in pieces(slice(0, len(x)), product_tokens(x.device)):
            self._multiply(x[rows], out[rows], fused)

    def _multiply(self, x: Tensor, out: Tensor, fused: Fused) -> None:
        weight, bias = self.weight, self.bias
        if fused.norm is not None:
            x = F.rms_norm(x, fused.norm.shape, fused.norm, fused.eps)
        if fused.gated:
            _gate(F.linear(x, weight, bias), out)
        elif fused.add and out.is_cuda:
            out.addmm_(x, weight.T)  # within the product
            if bias is not None:
                out += bias
        elif fused.add:
            out += F.linear(x, weight, bias)
        elif out.dtype != x.dtype:
            out.copy_(F.linear(x, weight, bias))
        elif bias is None:
            torch.mm(x, weight.T, out=out)
        else:
            torch.addmm(bias, x, weight.T, out=out)


def _gate(gates_and_values: Tensor, out: Tensor) -> None:
    """silu(gate) * value [T, N] of both side by side [T, 2 N]."""
    if out.is_cuda:
        from nearfar.gpu_kernels.matvec import silu_gate

        silu_gate(gates_and_values, out)
        return
    gates, values = gates_and_values.chunk(2, dim=-1)
    torch.mul(F.silu(gates), values, out=out)

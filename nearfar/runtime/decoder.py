"""The decoder around attention: embedding, projections, MLP, logits.

A layer is `project`, attention by the caller, `finish_layer`; the decoder holds no cache and knows
no sequence, so near and far memory, chunks and policies are the caller's alone. Activations are in
the type of the weights, norms and rotation compute in float32. T tokens may be of any sequences.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812  its usual name
from torch import Tensor

from nearfar.runtime.model_config import ModelConfig
from nearfar.runtime.rope import Angles, Rotary, rotate
from nearfar.runtime.weights import DecoderWeights


class Decoder:
    """A model's layers as functions of tensors."""

    def __init__(self, config: ModelConfig, weights: DecoderWeights) -> None:
        self.config = config
        self.weights = weights
        self.rotary = Rotary(config.rope, config.head_dim, weights.norm.device)
        self.softmax_scale: float = config.head_dim**-0.5

    @property
    def device(self) -> torch.device:
        """Where the layers are; a table of embeddings may be elsewhere."""
        return self.weights.norm.device

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and activations."""
        return self.weights.norm.dtype

    def uses_rope(self, layer: int) -> bool:
        """Whether queries and keys of ``layer`` are rotated to their positions."""
        return self.config.rope_layers[layer]

    def embed(self, token_ids: Tensor) -> Tensor:
        """Hidden states [T, hidden] of ``token_ids`` [T]."""
        table = self.weights.embedding
        return F.embedding(token_ids.to(table.device), table).to(self.device)

    def project(
        self, layer: int, hidden: Tensor, angles: Angles | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [T, Hq, D], keys and values [T, Hkv, D] of ``hidden`` [T, hidden].

        With ``angles`` of the T positions, queries and keys are rotated, both at once, where the
        layer uses rotary embedding; without, never. Queries are not scaled. Tokens of the three are
        strided, heads of a token are contiguous.
        """
        weights, config = self.weights.layers[layer], self.config
        normed = self._norm(hidden, weights.input_norm)
        qkv = F.linear(normed, weights.qkv, weights.qkv_bias)
        first_key, first_value = config.query_heads, config.query_heads + config.kv_heads
        heads = qkv.view(len(hidden), first_value + config.kv_heads, config.head_dim)
        qk, v = heads[:, :first_value], heads[:, first_value:]
        if weights.q_norm is not None and weights.k_norm is not None:
            q, k = qk[:, :first_key], qk[:, first_key:]
            qk = torch.cat((self._norm(q, weights.q_norm), self._norm(k, weights.k_norm)), dim=1)
        if angles is not None and config.rope_layers[layer]:
            qk = rotate(qk, angles)
        return qk[:, :first_key], qk[:, first_key:], v

    def finish_layer(self, layer: int, hidden: Tensor, attention: Tensor) -> Tensor:
        """The layer's output [T, hidden] from its input and ``attention`` [T, Hq D]."""
        weights = self.weights.layers[layer]
        hidden = F.linear(attention, weights.output, weights.output_bias).add_(hidden)
        normed = self._norm(hidden, weights.post_norm)
        gate, up = F.linear(normed, weights.gate_up, weights.gate_up_bias).chunk(2, dim=-1)
        return F.linear(F.silu(gate).mul_(up), weights.down, weights.down_bias).add_(hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [T, vocabulary] float32 of the last layer's output [T, hidden]."""
        return F.linear(self._norm(hidden, self.weights.norm), self.weights.head).float()

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, self.config.rms_norm_eps)

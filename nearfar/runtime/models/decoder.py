"""A decoder: embedding, layers, logits, as functions of tensors.

It has no cache and uses no sequence: near and far memory, chunks and policies belong to the
caller. Activations are in the type of the norms; norms and rotation compute in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F  # noqa: N812  its usual name
from torch import Tensor

from nearfar.runtime.models.layers import Attention, GatedMLP, Layer, TensorContext
from nearfar.runtime.models.linear import DenseLinear, Fused
from nearfar.runtime.models.plan import ModelPlan
from nearfar.runtime.models.rope import Angles, Rotary
from nearfar.runtime.models.weights import Weights


class Decoder:
    """A model's layers, made of its plan and its weights by name (`weights.model_layout`)."""

    def __init__(self, plan: ModelPlan, weights: Weights) -> None:
        self.plan = plan
        self.weights = weights
        self.embedding, self.norm = weights.embedding, weights["norm"]
        self.head = DenseLinear(weights.head)
        self.layers = tuple(_layer(plan, weights, i) for i in range(len(plan.layers)))
        mixers = (layer.mixer for layer in self.layers)
        self.attentions = tuple(mixer for mixer in mixers if mixer is not None)  # by far layer
        self._rotaries = {
            mixer.plan.rope: Rotary(mixer.plan.rope, mixer.plan.head_dim, self.device)
            for mixer in self.attentions
            if mixer.plan.rope is not None
        }

    @property
    def device(self) -> torch.device:
        """Where the layers are; a table of embeddings may be elsewhere."""
        return self.norm.device

    @property
    def dtype(self) -> torch.dtype:
        """Of activations."""
        return self.norm.dtype

    @property
    def softmax_scale(self) -> float:
        """The factor of attention logits, in every layer."""
        return self.plan.attention.scale

    def uses_rope(self, far_layer: int) -> bool:
        """Whether queries and keys of a layer are rotated to their positions."""
        return self.attentions[far_layer].plan.rope is not None

    def rotary(self, far_layer: int) -> Rotary:
        """The rotation of a layer that `uses_rope`."""
        rope = self.attentions[far_layer].plan.rope
        assert rope is not None
        return self._rotaries[rope]

    def layer_angles(self, far_layer: int, positions: Tensor) -> Angles | None:
        """Angles of ``positions`` in one layer; None where it does not rotate."""
        return self.rotary(far_layer).angles(positions) if self.uses_rope(far_layer) else None

    def angles(self, positions: Tensor) -> tuple[Angles | None, ...]:
        """Angles of ``positions`` for each far layer; None where it does not rotate.

        Layers that rotate alike share theirs.
        """
        found = {rope: rotary.angles(positions) for rope, rotary in self._rotaries.items()}
        ropes = (mixer.plan.rope for mixer in self.attentions)
        return tuple(None if rope is None else found[rope] for rope in ropes)

    def embed(self, token_ids: Tensor) -> Tensor:
        """Hidden states [T, H] of ``token_ids`` [T], a new tensor."""
        table = self.embedding
        if not token_ids.is_cuda:
            return F.embedding(token_ids.to(table.device), table).to(self.device)
        from nearfar.gpu_kernels.embed import embed

        # rows of a table in host memory come over the bus, and only those
        hidden = self.norm.new_empty(len(token_ids), self.plan.hidden_size)
        embed(table, token_ids.int(), hidden)
        return hidden

    def run(self, hidden: Tensor, attend: Callable[[Attention, Tensor], Tensor]) -> Tensor:
        """Pass ``hidden`` [T, H] through all layers, in place; returns it.

        Tokens attend by ``attend(mixer, qkv)``, which gives [T, Hq D].
        """
        context = TensorContext(hidden, attend)
        for layer in self.layers:
            layer.add_to(context)
        return context.hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [T, V] float32 of the last layer's output [T, H]."""
        logits = hidden.new_empty(len(hidden), self.plan.vocab_size, dtype=torch.float32)
        self.write_logits(hidden, logits)
        return logits

    def write_logits(self, hidden: Tensor, logits: Tensor) -> None:
        """`logits` into an existing tensor."""
        self.head.into(hidden, logits, Fused(self.norm, self.plan.norm_eps))


class _LayerWeights:
    """Weights of one layer by their names in it."""

    def __init__(self, weights: Mapping[str, Tensor], number: int) -> None:
        self._weights, self._prefix = weights, f"layers.{number}."

    def get(self, name: str) -> Tensor | None:
        return self._weights.get(self._prefix + name)

    def norm(self, name: str, eps: float, *, gated: bool = False) -> Fused:
        return Fused(self._weights[self._prefix + name], eps, gated)

    def linear(self, name: str) -> DenseLinear:
        return DenseLinear(self._weights[self._prefix + name], self.get(f"{name}_bias"))


def _layer(plan: ModelPlan, weights: Mapping[str, Tensor], number: int) -> Layer:
    own, of = plan.layers[number], _LayerWeights(weights, number)
    mixer = feed_forward = None
    if own.mixer is not None:
        mixer = Attention(
            own.mixer,
            plan.far_layers.index(number),
            of.norm("input_norm", plan.norm_eps),
            of.linear("qkv"),
            of.linear("output"),
            of.get("q_norm"),
            of.get("k_norm"),
        )
    if own.feed_forward is not None:
        gated = of.norm("post_norm", plan.norm_eps, gated=True)
        feed_forward = GatedMLP(gated, of.linear("gate_up"), of.linear("down"))
    return Layer(mixer, feed_forward)

"""The parts of a model as data: one plan a model, one a layer.

A layer is a mixer, which lets tokens see each other, and a feed-forward, which does not; each adds
its output to the hidden states, and a layer may lack either. Plans are frozen and compare by value.
Sizes are counts, H is the hidden size. This module knows no tensors and no files.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from nearfar.records import Geometry
from nearfar.runtime.models.rope import RopeConfig


@dataclass(frozen=True)
class AttentionPlan:
    """Grouped-query attention to every earlier token, after an RMSNorm (Ainslie et al. 2023)."""

    query_heads: int  # Hq
    kv_heads: int  # Hkv
    head_dim: int  # D
    rope: RopeConfig | None  # None: queries and keys are not rotated
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: bool = False  # an RMSNorm over each head's query and key, before rotation

    @property
    def scale(self) -> float:
        """The factor of logits."""
        return float(self.head_dim**-0.5)

    @property
    def query_width(self) -> int:
        """Numbers of a token's queries."""
        return self.query_heads * self.head_dim

    @property
    def qkv_width(self) -> int:
        """Numbers of a token's queries, keys and values."""
        return (self.query_heads + 2 * self.kv_heads) * self.head_dim

    def parameter_count(self, hidden_size: int) -> int:
        """Numbers in the weights, the norm included."""
        weights = hidden_size * (self.qkv_width + self.query_width + 1)
        biases = self.qkv_bias * self.qkv_width + self.output_bias * hidden_size
        return weights + biases + self.qk_norm * 2 * self.head_dim


@dataclass(frozen=True)
class DensePlan:
    """down(silu(gate(x)) * up(x)) after an RMSNorm: SwiGLU (Shazeer 2020)."""

    inner_size: int
    bias: bool = False  # of all three

    def parameter_count(self, hidden_size: int) -> int:
        """Numbers in the weights, the norm included."""
        biases = self.bias * (2 * self.inner_size + hidden_size)
        return hidden_size * (3 * self.inner_size + 1) + biases


@dataclass(frozen=True)
class LayerPlan:
    """One layer. Without a mixer it keeps no state of tokens."""

    mixer: AttentionPlan | None
    feed_forward: DensePlan | None

    def parameter_count(self, hidden_size: int) -> int:
        """Numbers in the weights of both."""
        parts = (part for part in (self.mixer, self.feed_forward) if part is not None)
        return sum(part.parameter_count(hidden_size) for part in parts)


@dataclass(frozen=True)
class ModelPlan:
    """A decoder: embedding, layers, a last RMSNorm, the output projection.

    ``max_context_tokens`` is the longest context with the attention computed here, which is over
    all earlier tokens. That equals sliding-window attention only up to the window, so the context
    of a model with sliding windows ends there.
    """

    family: str  # a name of `nearfar.runtime.models.families`
    vocab_size: int
    hidden_size: int
    norm_eps: float
    max_context_tokens: int
    layers: tuple[LayerPlan, ...]
    tied_embeddings: bool = False
    eos_token_ids: tuple[int, ...] = ()

    @cached_property
    def far_layers(self) -> tuple[int, ...]:
        """Numbers of the layers that keep rows far; stores and policies count only these."""
        return tuple(i for i, layer in enumerate(self.layers) if layer.mixer is not None)

    @cached_property
    def attention(self) -> AttentionPlan:
        """Sizes that all layers with far rows share."""
        mixers = [layer.mixer for layer in self.layers if layer.mixer is not None]
        return mixers[0]

    @cached_property
    def geometry(self) -> Geometry:
        """The sizes that policies and stores are built for: ``layers`` are those with far rows."""
        plan = self.attention
        return Geometry(len(self.far_layers), plan.query_heads, plan.kv_heads, plan.head_dim)

    @property
    def rope(self) -> RopeConfig | None:
        """Rotary embedding of the first layer that has one."""
        ropes = (layer.mixer.rope for layer in self.layers if layer.mixer is not None)
        return next((rope for rope in ropes if rope is not None), None)

    @property
    def widest_inner_size(self) -> int:
        """Of the feed-forward that needs the most room."""
        return max((f.inner_size for layer in self.layers if (f := layer.feed_forward)), default=0)

    def parameter_count(self) -> int:
        """Numbers in all weights; tied embeddings count once."""
        vocabulary = self.vocab_size * self.hidden_size * (1 if self.tied_embeddings else 2)
        layers = sum(layer.parameter_count(self.hidden_size) for layer in self.layers)
        return vocabulary + layers + self.hidden_size

    def weight_bytes(self, bytes_per_parameter: int) -> int:
        """Bytes of all weights in one storage type."""
        return self.parameter_count() * bytes_per_parameter

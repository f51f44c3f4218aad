"""A decoder's weights: which tensors there are, fused for few large matrix products.

The layout below is the one statement of names and shapes; reading a checkpoint, caching and random
weights follow it. Matrices are [out, in] as in torch.nn.functional.linear. This module opens no
files and multiplies nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from nearfar.errors import CheckpointError
from nearfar.runtime.model_config import ModelConfig
from nearfar.runtime.tensor_files import missing_tensor, other_shape

Shape = tuple[int, ...]
Parts = tuple[tuple[str, Shape], ...]  # Hugging Face names and shapes, stacked along axis 0
Read = Callable[[str], Tensor]  # a tensor by its name; KeyError where there is none


@dataclass(frozen=True)
class LayerWeights:
    """One layer. ``inter`` is the MLP's inner size; None: the model has no such weight."""

    input_norm: Tensor  # [hidden]
    qkv: Tensor  # [(Hq + 2 Hkv) D, hidden]: all queries, all keys, all values
    qkv_bias: Tensor | None
    q_norm: Tensor | None  # [D], shared by heads
    k_norm: Tensor | None
    output: Tensor  # [hidden, Hq D]
    output_bias: Tensor | None
    post_norm: Tensor  # [hidden]
    gate_up: Tensor  # [2 inter, hidden]: gate, then up
    gate_up_bias: Tensor | None
    down: Tensor  # [hidden, inter]
    down_bias: Tensor | None


@dataclass(frozen=True)
class DecoderWeights:
    """A whole model; ``head`` is the same tensor as ``embedding`` where they are tied."""

    embedding: Tensor  # [vocabulary, hidden]
    layers: tuple[LayerWeights, ...]
    norm: Tensor  # [hidden]
    head: Tensor  # [vocabulary, hidden]


def _layer_layout(config: ModelConfig) -> dict[str, Parts]:
    """Fields of LayerWeights that this model has; names follow ``model.layers.{i}.``."""
    hidden, inter, head_dim = config.hidden_size, config.intermediate_size, config.head_dim
    query, key = config.query_heads * head_dim, config.kv_heads * head_dim
    projections = (("q", query), ("k", key), ("v", key))

    def qkv(kind: str, *tail: int) -> Parts:
        return tuple((f"self_attn.{name}_proj.{kind}", (rows, *tail)) for name, rows in projections)

    def gate_up(kind: str, *tail: int) -> Parts:
        return tuple((f"mlp.{name}_proj.{kind}", (inter, *tail)) for name in ("gate", "up"))

    layout: dict[str, Parts] = {
        "input_norm": (("input_layernorm.weight", (hidden,)),),
        "qkv": qkv("weight", hidden),
        "output": (("self_attn.o_proj.weight", (hidden, query)),),
        "post_norm": (("post_attention_layernorm.weight", (hidden,)),),
        "gate_up": gate_up("weight", hidden),
        "down": (("mlp.down_proj.weight", (hidden, inter)),),
    }
    if config.qkv_bias:
        layout["qkv_bias"] = qkv("bias")
    if config.qk_norm:
        layout["q_norm"] = (("self_attn.q_norm.weight", (head_dim,)),)
        layout["k_norm"] = (("self_attn.k_norm.weight", (head_dim,)),)
    if config.output_bias:
        layout["output_bias"] = (("self_attn.o_proj.bias", (hidden,)),)
    if config.mlp_bias:
        layout["gate_up_bias"] = gate_up("bias")
        layout["down_bias"] = (("mlp.down_proj.bias", (hidden,)),)
    return layout


def _outer_layout(config: ModelConfig) -> dict[str, Parts]:
    """Fields of DecoderWeights outside the layers."""
    vocabulary = (config.vocab_size, config.hidden_size)
    layout: dict[str, Parts] = {
        "embedding": (("model.embed_tokens.weight", vocabulary),),
        "norm": (("model.norm.weight", (config.hidden_size,)),),
    }
    if not config.tied_embeddings:
        layout["head"] = (("lm_head.weight", vocabulary),)
    return layout


def _fused_shape(parts: Parts) -> Shape:
    return (sum(shape[0] for _, shape in parts), *parts[0][1][1:])


def _build(config: ModelConfig, make: Callable[[str, str, Parts], Tensor]) -> DecoderWeights:
    """Weights whose tensors are ``make(prefix of Hugging Face names, own name, parts)``."""
    absent = dict.fromkeys(field.name for field in fields(LayerWeights))
    layout = _layer_layout(config)
    outer = {name: make("", name, parts) for name, parts in _outer_layout(config).items()}
    layers = []
    for i in range(config.layers):
        made = {
            name: make(f"model.layers.{i}.", f"layers.{i}.{name}", parts)
            for name, parts in layout.items()
        }
        layers.append(LayerWeights(**absent | made))  # type: ignore[arg-type]
    head = outer.get("head", outer["embedding"])
    return DecoderWeights(outer["embedding"], tuple(layers), outer["norm"], head)


def _home(
    config: ModelConfig, name: str, parts: Parts, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Memory for a tensor: on ``device``, but for a table of which a token reads one row.

    A table that is the output projection too is read whole. Any other stays in host memory, pinned,
    where kernels read rows of it: a GPU has better uses for a gibibyte.
    """
    shape = _fused_shape(parts)
    if name == "embedding" and device.type == "cuda" and not config.tied_embeddings:
        return torch.empty(shape, dtype=dtype, pin_memory=True)
    return torch.empty(shape, dtype=dtype, device=device)


def _checked(read: Read, name: str, shape: Shape) -> Tensor:
    try:
        tensor = read(name)
    except KeyError:
        raise missing_tensor(name, shape) from None
    if tuple(tensor.shape) != shape:
        raise other_shape(name, shape, tuple(tensor.shape))
    return tensor


def _check_finite(tensor: Tensor, name: str) -> None:
    """Raise for a weight that is no number: every answer would be nonsense."""
    if tensor.device.type != "meta" and not tensor.sum(dtype=torch.float32).isfinite():
        raise CheckpointError(
            f"The tensor {name!r} has NaN or infinite numbers in {str(tensor.dtype)[6:]}. Load it "
            "in another type (--dtype); if that does not help, the weights are damaged: download "
            "the model again."
        )


def layout_of(config: ModelConfig) -> dict[str, Shape]:
    """Shapes of all tensors of a checkpoint by their Hugging Face names."""
    prefixes = [f"model.layers.{i}." for i in range(config.layers)]
    layers = [part for parts in _layer_layout(config).values() for part in parts]
    outer = [part for parts in _outer_layout(config).values() for part in parts]
    return dict(outer) | {prefix + name: shape for prefix in prefixes for name, shape in layers}


def assemble(
    state: Read | Mapping[str, Tensor],
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
) -> DecoderWeights:
    """Weights from tensors with Hugging Face names, copied into memory of their own.

    Each tensor is asked for once and converted straight into its place, so that beside the result
    only one exists at a time. Raises CheckpointError for a missing tensor, another shape, or
    numbers that are none.
    """
    read = state.__getitem__ if isinstance(state, Mapping) else state

    def make(prefix: str, name: str, parts: Parts) -> Tensor:
        fused = _home(config, name, parts, dtype, device)
        start = 0
        for name, shape in parts:
            part = fused[start : start + shape[0]]
            part.copy_(_checked(read, prefix + name, shape))
            _check_finite(part, prefix + name)
            start += shape[0]
        return fused

    with torch.no_grad():
        return _build(config, make)


def to_tensors(weights: DecoderWeights) -> dict[str, Tensor]:
    """Tensors by name (``embedding``, ``layers.0.qkv``), shared; a tied head is left out."""
    tensors = {"embedding": weights.embedding, "norm": weights.norm}
    if weights.head is not weights.embedding:
        tensors["head"] = weights.head
    for i, layer in enumerate(weights.layers):
        named = ((field.name, getattr(layer, field.name)) for field in fields(layer))
        tensors |= {f"layers.{i}.{name}": value for name, value in named if value is not None}
    return tensors


def from_tensors(tensors: Mapping[str, Tensor], config: ModelConfig) -> DecoderWeights:
    """The reverse of `to_tensors`; nothing is copied. Raises CheckpointError as `assemble` does."""
    return _build(
        config,
        lambda _, name, parts: _checked(tensors.__getitem__, name, _fused_shape(parts)),
    )


def to_hugging_face(weights: DecoderWeights, config: ModelConfig) -> dict[str, Tensor]:
    """Tensors by their Hugging Face names, views of ours; a tied head is left out."""
    named = to_tensors(weights)
    layout = {name: ("", parts) for name, parts in _outer_layout(config).items()}
    for i in range(config.layers):
        for name, parts in _layer_layout(config).items():
            layout[f"layers.{i}.{name}"] = (f"model.layers.{i}.", parts)
    tensors: dict[str, Tensor] = {}
    for name, (prefix, parts) in layout.items():
        pieces = torch.split(named[name], [shape[0] for _, shape in parts])
        tensors |= {prefix + own: piece for (own, _), piece in zip(parts, pieces, strict=True)}
    return tensors


def random_weights(
    config: ModelConfig, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> DecoderWeights:
    """Weights for measuring speed: every product keeps the size of what it is given."""
    generator = torch.Generator(device).manual_seed(seed)

    def make(_: str, name: str, parts: Parts) -> Tensor:
        tensor = _home(config, name, parts, dtype, device)
        if name.endswith("norm"):
            return tensor.fill_(1.0)
        numbers = tensor.to(device).normal_(0.0, tensor.shape[-1] ** -0.5, generator=generator)
        return tensor.copy_(numbers)

    return _build(config, make)


def total_bytes(weights: DecoderWeights) -> int:
    """Bytes of all tensors; a tied head counts once."""
    return sum(tensor.nbytes for tensor in to_tensors(weights).values())


def identity_of(config: ModelConfig, weights: DecoderWeights) -> str:
    """A sha256 in hex over a configuration and all of the weights' bytes."""
    digest = hashlib.sha256(repr(config).encode())
    for name, tensor in sorted(to_tensors(weights).items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()

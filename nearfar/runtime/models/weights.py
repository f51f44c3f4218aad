"""A decoder's weights: which tensors there are, fused for few large matrix products.

The layout below is the one statement of names and shapes; reading a checkpoint, caching and random
weights follow it. Matrices are [out, in] as in torch.nn.functional.linear. Weights are a mapping
from our names (``embedding``, ``layers.0.qkv``) to tensors. This module opens no files and
multiplies nothing.

    embedding            [V, H]
    norm                 [H]
    head                 [V, H]; absent where it is the embedding
    layers.N.input_norm  [H]
    layers.N.qkv         [(Hq + 2 Hkv) D, H]: all queries, all keys, all values; _bias
    layers.N.q_norm      [D], shared by heads; k_norm
    layers.N.output      [H, Hq D]; _bias
    layers.N.post_norm   [H]
    layers.N.gate_up     [2 inner, H]: gate, then up; _bias
    layers.N.down        [H, inner]; _bias
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from nearfar.errors import CheckpointError
from nearfar.runtime.models.families.base import Names, TensorNames
from nearfar.runtime.models.families.registry import family_named
from nearfar.runtime.models.plan import AttentionPlan, DensePlan, ModelPlan

Shape = tuple[int, ...]
Parts = tuple[tuple[str, Shape], ...]  # Hugging Face names and shapes, stacked along axis 0
Read = Callable[[str], Tensor]  # a tensor by its name; KeyError where there is none


class Weights(dict[str, Tensor]):
    """Tensors by our names."""

    @property
    def embedding(self) -> Tensor:
        """The table of embeddings [V, H]."""
        return self["embedding"]

    @property
    def head(self) -> Tensor:
        """The output projection [V, H]: the same tensor as the embedding where they are tied."""
        return self.get("head", self.embedding)


def model_layout(plan: ModelPlan) -> dict[str, Parts]:
    """Every tensor of a model by our name, and what of a checkpoint it is made of."""
    names = family_named(plan.family).names
    vocabulary, hidden = (plan.vocab_size, plan.hidden_size), plan.hidden_size
    layout: dict[str, Parts] = {
        "embedding": ((f"{names.embedding}.weight", vocabulary),),
        "norm": ((f"{names.norm}.weight", (hidden,)),),
    }
    if not plan.tied_embeddings:
        layout["head"] = ((f"{names.head}.weight", vocabulary),)
    for i, layer in enumerate(plan.layers):
        own: dict[str, Parts] = {}
        if layer.mixer is not None:
            own |= _attention_layout(layer.mixer, hidden, names)
        if layer.feed_forward is not None:
            own |= _dense_layout(layer.feed_forward, hidden, names)
        prefix = names.layer.format(i)
        layout |= {
            f"layers.{i}.{name}": tuple((prefix + part, shape) for part, shape in parts)
            for name, parts in own.items()
        }
    return layout


def _attention_layout(plan: AttentionPlan, hidden: int, names: TensorNames) -> dict[str, Parts]:
    key = plan.kv_heads * plan.head_dim
    rows = _stacked(names.qkv, (plan.query_width, key, key))
    layout: dict[str, Parts] = {
        "input_norm": ((f"{names.input_norm}.weight", (hidden,)),),
        "qkv": tuple((f"{name}.weight", (n, hidden)) for name, n in rows),
        "output": ((f"{names.output}.weight", (hidden, plan.query_width)),),
    }
    if plan.qkv_bias:
        layout["qkv_bias"] = tuple((f"{name}.bias", (n,)) for name, n in rows)
    if plan.qk_norm:
        layout["q_norm"] = ((f"{names.q_norm}.weight", (plan.head_dim,)),)
        layout["k_norm"] = ((f"{names.k_norm}.weight", (plan.head_dim,)),)
    if plan.output_bias:
        layout["output_bias"] = ((f"{names.output}.bias", (hidden,)),)
    return layout


def _dense_layout(plan: DensePlan, hidden: int, names: TensorNames) -> dict[str, Parts]:
    rows = _stacked(names.gate_up, (plan.inner_size, plan.inner_size))
    layout: dict[str, Parts] = {
        "post_norm": ((f"{names.post_norm}.weight", (hidden,)),),
        "gate_up": tuple((f"{name}.weight", (n, hidden)) for name, n in rows),
        "down": ((f"{names.down}.weight", (hidden, plan.inner_size)),),
    }
    if plan.bias:
        layout["gate_up_bias"] = tuple((f"{name}.bias", (n,)) for name, n in rows)
        layout["down_bias"] = ((f"{names.down}.bias", (hidden,)),)
    return layout


def _stacked(names: Names, rows: tuple[int, ...]) -> list[tuple[str, int]]:
    """Each name with its rows; one name alone has all of them."""
    return [(names[0], sum(rows))] if len(names) == 1 else list(zip(names, rows, strict=True))


def fused_shape(parts: Parts) -> Shape:
    """Of what ``parts`` are stacked to."""
    return (sum(shape[0] for _, shape in parts), *parts[0][1][1:])


def missing_tensor(name: str, shape: Shape) -> CheckpointError:
    """The error that no file has the tensor ``name``."""
    return CheckpointError(
        f"The checkpoint has no tensor {name!r}; its config asks for one of shape {shape}. "
        "Config and weights must come from the same model."
    )


def other_shape(name: str, shape: Shape, seen: Shape) -> CheckpointError:
    """The error that the tensor ``name`` has another shape."""
    return CheckpointError(
        f"The tensor {name!r} must have shape {shape} by the checkpoint's config. Got "
        f"{seen}. Config and weights must come from the same model."
    )


def _home(
    plan: ModelPlan, name: str, shape: Shape, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Memory for a tensor: on ``device``, except for a table of which a token reads one row.

    A table that is the output projection too is read whole. Any other stays in host memory, pinned,
    where kernels read rows of it: a GPU has better uses for a gibibyte.
    """
    if name == "embedding" and device.type == "cuda" and not plan.tied_embeddings:
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


def checkpoint_shapes(plan: ModelPlan) -> dict[str, Shape]:
    """Shapes of all tensors of a checkpoint by their Hugging Face names."""
    return {name: shape for parts in model_layout(plan).values() for name, shape in parts}


def assemble(
    state: Read | Mapping[str, Tensor],
    plan: ModelPlan,
    dtype: torch.dtype,
    device: torch.device,
) -> Weights:
    """Weights from tensors with Hugging Face names, copied into memory of their own.

    Each tensor is read once and converted straight into its place, so that beside the result only
    one exists at a time. Raises CheckpointError for a missing tensor, a wrong shape, or values that
    are not finite.
    """
    read = state.__getitem__ if isinstance(state, Mapping) else state
    weights = Weights()
    with torch.no_grad():
        for name, parts in model_layout(plan).items():
            fused = weights[name] = _home(plan, name, fused_shape(parts), dtype, device)
            start = 0
            for part, shape in parts:
                own = fused[start : start + shape[0]]
                own.copy_(_checked(read, part, shape))
                _check_finite(own, part)
                start += shape[0]
    return weights


def checked_weights(tensors: Mapping[str, Tensor], plan: ModelPlan) -> Weights:
    """``tensors`` by our names, nothing copied. Raises CheckpointError as `assemble` does."""
    return Weights(
        (name, _checked(tensors.__getitem__, name, fused_shape(parts)))
        for name, parts in model_layout(plan).items()
    )


def to_hugging_face(weights: Weights, plan: ModelPlan) -> dict[str, Tensor]:
    """Tensors by their Hugging Face names, views of ours; a tied head is left out."""
    tensors: dict[str, Tensor] = {}
    for name, parts in model_layout(plan).items():
        pieces = torch.split(weights[name], [shape[0] for _, shape in parts])
        tensors |= {part: piece for (part, _), piece in zip(parts, pieces, strict=True)}
    return tensors


def random_weights(
    plan: ModelPlan, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> Weights:
    """Weights for speed measurements: every product keeps the magnitude of its input."""
    generator = torch.Generator(device).manual_seed(seed)
    weights = Weights()
    for name, parts in model_layout(plan).items():
        tensor = _home(plan, name, fused_shape(parts), dtype, device)
        if name.endswith("norm"):
            weights[name] = tensor.fill_(1.0)
            continue
        numbers = tensor.to(device).normal_(0.0, tensor.shape[-1] ** -0.5, generator=generator)
        weights[name] = tensor.copy_(numbers)
    return weights


def total_bytes(weights: Weights) -> int:
    """Bytes of all tensors; a tied head is not among them."""
    return sum(tensor.nbytes for tensor in weights.values())


def identity_of(plan: ModelPlan, weights: Weights) -> str:
    """A sha256 in hex over a plan and all of the weights' bytes."""
    digest = hashlib.sha256(repr(plan).encode())
    for name, tensor in sorted(weights.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()

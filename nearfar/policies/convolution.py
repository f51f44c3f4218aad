"""Merging rows by a learned convolution over tokens: the compression of LoCoCo.

Of the rows of a KV head the best-scoring stay as they are. Of the others, in token order, `slots`
are made:

    C = relu(conv1d([K; V]))        over tokens, one channel for each slot, shared by the heads
    W = (1 - a) E + a softmax(C)    E: one-hot rows of the best of them; a is learned, 0 to 1
    K' = W K,  V' = W V

Outside of 0 to 1 rows would be differences of others and grow from segment to segment.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812  its usual name
from torch import Tensor

from nearfar.policies.merged_rows import MergedRows
from nearfar.records import Geometry

SLOTS, KERNEL = 64, 11
FIRST_BLEND = 0.5  # of the published code; from less, layers that mixtures help end with more error


@dataclass(frozen=True)
class LayerConv:
    """The convolution of one layer."""

    weight: Tensor  # [slots, 2 D, kernel]
    bias: Tensor  # [slots]
    blend: Tensor  # []: a

    @property
    def slots(self) -> int:
        """Rows that it makes."""
        return len(self.bias)

    def mixtures(self, rows: Tensor, scores: Tensor, slots: int) -> Tensor:
        """W [Hkv, slots, n] for ``rows`` [Hkv, n, 2 D] float32 in token order."""
        channels = F.conv1d(rows.mT, self.weight[:slots], self.bias[:slots], padding="same")
        best = scores.topk(slots, dim=-1).indices.sort(-1).values
        ones = F.one_hot(best, rows.shape[1]).to(rows.dtype)
        return torch.lerp(ones, F.relu(channels).softmax(-1), self.blend.clamp(0, 1))


def merge_rows(some: MergedRows, count: int, conv: LayerConv) -> MergedRows:
    """``some`` float32 rows brought down to ``count`` for each KV head.

    Up to half of them are made by the convolution, the others stay as they are.
    """
    n = some.scores.shape[1]
    if n <= count:
        return some
    slots = min(conv.slots, count // 2)
    kept = some.scores.topk(count - slots, dim=-1).indices
    if slots == 0:
        return some.pick(kept)
    others = torch.ones_like(some.scores, dtype=torch.bool).scatter_(1, kept, value=False)
    rest = some.pick(others.nonzero()[:, 1].view(len(others), -1))
    rest = rest.pick(rest.positions.argsort(dim=-1, stable=True))
    mixtures = conv.mixtures(rest.rows, rest.scores, slots)
    made = MergedRows(
        mixtures @ rest.rows,
        (mixtures @ rest.scores[..., None])[..., 0].detach(),
        (mixtures.detach().double() @ rest.positions[..., None].double())[..., 0].round().long(),
    )
    return some.pick(kept).join(made)


def merge_in_segments(some: MergedRows, count: int, conv: LayerConv, segment: int) -> MergedRows:
    """A prompt's rows in token order brought down to ``count``, ``segment`` more at a time.

    Only what is being merged is widened to float32: a prompt may be long. Gradients reach the
    convolution of the last segment alone.
    """
    n = some.scores.shape[1]
    first = min(n, count)
    memory = some.span(0, first).widened()
    for start in range(first, n, segment):
        more = some.span(start, min(start + segment, n)).widened()
        memory = merge_rows(memory.detached().join(more), count, conv)
    return memory


def convolutions(tensors: dict[str, Tensor]) -> list[LayerConv]:
    """Of all layers, ``tensors`` as in `random_convolutions`; without slots where a is 0.

    With a at 0 a mixture is a single row, so the best rows need no convolution.
    """
    slots = [tensors["bias"].shape[1] if share > 0 else 0 for share in tensors["blend"].tolist()]
    layers = zip(slots, tensors["weight"], tensors["bias"], tensors["blend"], strict=True)
    return [LayerConv(weight[:n], bias[:n], blend) for n, weight, bias, blend in layers]


def random_convolutions(geometry: Geometry, seed: int, slots: int = SLOTS) -> dict[str, Tensor]:
    """Untrained convolutions of all layers, float32, by name and [layers, ...]."""
    generator = torch.Generator().manual_seed(seed)
    wide = 2 * geometry.head_dim
    spread = float(wide * KERNEL) ** -0.5
    sizes = (geometry.layers, slots, wide, KERNEL)
    return {
        "weight": torch.randn(sizes, generator=generator) * spread,
        "bias": torch.zeros(geometry.layers, slots),
        "blend": torch.full((geometry.layers,), FIRST_BLEND),
    }

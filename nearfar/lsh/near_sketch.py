"""The sketch of far keys on a GPU: codes in its memory, selection by its kernels.

The same codes, estimates and sampling law as `sketch` and `sampling`, in another layout and for
several sequences at once. The scratch memory of a selection is kept here and used again in every
layer and step, so that a captured step finds it at the same address.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nearfar.gpu_kernels.code_scores import score_codes
from nearfar.gpu_kernels.coded_keys import ALIGNED_KEYS, bytes_per_key, write_codes
from nearfar.gpu_kernels.key_weights import CURVE_POINTS, weigh_keys
from nearfar.gpu_kernels.rotated_query_planes import plane_shape, quantise_queries
from nearfar.gpu_kernels.rows import RowTable
from nearfar.gpu_kernels.weighted_draw import draw_keys
from nearfar.lsh.rotation import rotation
from nearfar.lsh.sketch import LEVEL_WIDTH, RECENTRE_GROWTH
from nearfar.records import DrawnKeys, FarView, Geometry

LEAST_SEGMENT_KEYS = 1024  # keys that one program scores, weighs or draws
MOST_SEGMENT_KEYS = 4096
MOST_SEGMENTS = 160
ROOM_TOKENS = 2048  # keys beyond a prompt for which the first arrays have room
ENCODE_TOKENS = 65_536  # far keys that are copied to the GPU at a time when all are encoded again


@dataclass(frozen=True)
class NearSketchMark:
    """A point in a sketch to which it can return."""

    length: int
    centred_over: int
    mean: Tensor | None
    codes: Tensor
    factors: Tensor


class NearLayerSketch:
    """Codes of all far keys of one layer of one sequence, on ``device``."""

    def __init__(self, kv_heads: int, head_dim: int, bits: int, device: torch.device) -> None:
        self.bits = bits
        self.length = 0
        self._centred_over = 0
        self._mean: Tensor | None = None  # [Hkv, D]
        self._rotation = rotation(head_dim).to(device).contiguous()
        shape = (kv_heads, ALIGNED_KEYS)  # kernels need arrays with an address
        width = bytes_per_key(head_dim, bits)
        self.codes = torch.zeros(*shape, width, dtype=torch.uint8, device=device)
        self.factors = torch.zeros(shape, dtype=torch.float16, device=device)

    @property
    def capacity_tokens(self) -> int:
        """Capacity in keys."""
        return self.codes.shape[1]

    @property
    def num_bytes(self) -> int:
        """Bytes of codes and factors."""
        return self.codes.nbytes + self.factors.nbytes

    def extend(self, far: FarView, arrived: Tensor | None) -> None:
        """Encode the keys at the end of ``far`` that are new; see `LayerSketch.extend`."""
        if arrived is None or arrived.shape[1] != far.length - self.length:
            arrived = far.keys(self.length)
        arrived = arrived.to(self.codes.device)
        if self._mean is None:
            self._mean = arrived.mean(1, dtype=torch.float32)
            self._centred_over = far.length
        elif far.length > RECENTRE_GROWTH * self._centred_over:
            self._encode_anew(far)
            return
        self._reserve(far.length)
        self._encode(arrived, self.length)
        self.length = far.length

    def reserve(self, length: int) -> None:
        """Make room for ``length`` keys at once, instead of growing to it."""
        self._reserve(length)

    def mark(self) -> NearSketchMark:
        """A point for `rewind`."""
        return NearSketchMark(self.length, self._centred_over, self._mean, self.codes, self.factors)

    def rewind(self, mark: NearSketchMark) -> None:
        """Forget the keys encoded since ``mark``."""
        self.length, self._centred_over = mark.length, mark.centred_over
        self._mean, self.codes, self.factors = mark.mean, mark.codes, mark.factors

    def _encode(self, keys: Tensor, first: int) -> None:
        assert self._mean is not None
        levels = (self.bits, LEVEL_WIDTH[self.bits], first)
        write_codes(keys, self._mean, self._rotation, *levels, self.codes, self.factors)

    def _encode_anew(self, far: FarView) -> None:
        """Take the mean of all keys and encode all of them by it, in arrays of their own."""
        total = torch.zeros(far.rows.shape[0], far.head_dim, device=self.codes.device)
        spans = [
            (start, min(start + ENCODE_TOKENS, far.length))
            for start in range(0, far.length, ENCODE_TOKENS)
        ]
        for start, stop in spans:
            total += far.keys(start, stop).to(total.device).float().sum(1)
        self._mean, self._centred_over = total / far.length, far.length
        # fresh arrays: a mark may still hold the old ones
        expected = max(far.length, self.capacity_tokens - ROOM_TOKENS)
        self.codes, self.factors = self.codes[:, :0], self.factors[:, :0]
        self.length = 0
        self._reserve(expected)
        for start, stop in spans:
            self._encode(far.keys(start, stop).to(total.device), start)
        self.length = far.length

    def _reserve(self, length: int) -> None:
        if length <= self.capacity_tokens:
            return
        capacity = _capacity(length)
        if self.length:  # growing by an eighth keeps copying below one key in eight
            capacity = max(capacity, _capacity(self.capacity_tokens * 9 // 8))
        heads, used, width = self.codes.shape
        codes = self.codes.new_zeros(heads, capacity, width)
        factors = self.factors.new_zeros(heads, capacity)
        codes[:, :used], factors[:, :used] = self.codes, self.factors
        self.codes, self.factors = codes, factors


def _capacity(length: int) -> int:
    """Keys to make room for: ``length`` and some more, in whole tiles of a kernel."""
    return -(-(length + ROOM_TOKENS) // ALIGNED_KEYS) * ALIGNED_KEYS


def near_sketch_bytes(kv_heads: int, head_dim: int, bits: int, num_keys: int) -> int:
    """Bytes of one layer's sketch of ``num_keys`` keys."""
    return kv_heads * _capacity(num_keys) * (bytes_per_key(head_dim, bits) + 2)


@dataclass(frozen=True)
class SketchLaw:
    """By which law keys are drawn from codes."""

    bits: int  # per dimension of a key
    temper: float  # exponent of the weight in the sampling law
    per_head: bool  # whether each query head draws for itself, and not each KV group
    seed: int


def _segment_keys(capacity_tokens: int) -> int:
    """Far keys of a segment: larger ones for a long context, so that programs stay as many."""
    keys = LEAST_SEGMENT_KEYS
    while capacity_tokens > MOST_SEGMENTS * keys < MOST_SEGMENT_KEYS:
        keys *= 2
    return keys


class NearSketchSelection:
    """Draws keys by weight for B sequences from their sketches."""

    def __init__(
        self,
        geometry: Geometry,
        law: SketchLaw,
        batch: int,
        capacity_tokens: int,
        device: torch.device,
    ) -> None:
        self._law = law
        self._share = geometry.group if law.per_head else 1
        self._rotation = rotation(geometry.head_dim).to(device).contiguous()
        B, Hkv, G = batch, geometry.kv_heads, geometry.group
        self.rows_per_sequence = geometry.query_heads if law.per_head else Hkv
        R, heads = B * self.rows_per_sequence, 1 if law.per_head else G
        self.segment_keys = _segment_keys(capacity_tokens)
        segments = -(-capacity_tokens // self.segment_keys)
        capacity = segments * self.segment_keys
        self._tables = [
            (RowTable.empty(B, torch.uint8, device), RowTable.empty(B, torch.float16, device))
            for _ in range(geometry.layers)
        ]
        shape = plane_shape(geometry.head_dim, law.bits, G)
        self._planes = torch.zeros(B, Hkv, *shape, dtype=torch.int8, device=device)
        self._sums = torch.zeros(B, Hkv * G, 2, device=device)
        # half precision moves a weight by a thousandth, and the law is made from what is stored
        scores = torch.zeros(B, Hkv, G, capacity, dtype=torch.float16, device=device)
        self._scores = scores
        self._peaks = torch.zeros(B, Hkv, G, segments, 2, device=device)
        self._row_scores = self._scores.view(R, heads, capacity)
        self._row_peaks = self._peaks.view(R, heads, segments, 2)
        self._weights = torch.zeros(R, capacity, device=device)
        # one for each layer, so that a step zeroes all of them at once
        self._budget_curves = torch.zeros(
            geometry.layers, R, CURVE_POINTS, dtype=torch.int64, device=device
        )

    def bind(self, sequences: list[list[NearLayerSketch]]) -> None:
        """Read the sketches of these sequences, each a list of its layers, from now on."""
        for layer, (codes, factors) in enumerate(self._tables):
            # not held: codes go when their sequence does
            codes.point([sequence[layer].codes for sequence in sequences], hold=False)
            factors.point([sequence[layer].factors for sequence in sequences], hold=False)

    def start_step(self) -> None:
        """Empty the budget curves of all layers."""
        self._budget_curves.zero_()

    def select(
        self,
        layer: int,
        queries: Tensor,
        lengths: Tensor,
        wanted: Tensor,
        steps: Tensor,
        drawn: DrawnKeys,
    ) -> None:
        """Launch the kernels of one layer; see `policies.index.NearSelector.select`."""
        law, size, share = self._law, self.segment_keys, self._share
        planes, sums, curve = self._planes, self._sums, self._budget_curves[layer]
        codes, factors = self._tables[layer]
        scores, peaks = self._scores, self._peaks
        quantise_queries(queries, self._rotation, law.bits, planes, sums)
        score_codes(planes, sums, codes, factors, lengths, law.temper, size, scores, peaks)
        rows, row_peaks, weights = self._row_scores, self._row_peaks, self._weights
        weigh_keys(rows, row_peaks, size, lengths, wanted, share, law.temper, weights, curve)
        draw_keys(weights, curve, lengths, wanted, share, steps, law.seed, layer, drawn)

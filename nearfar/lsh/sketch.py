"""A sketch of the far keys of one layer: centred, rotated, quantised to a few bits a dimension.

One bit is sign hashing: a dimension's sign is the key's side of a random hyperplane. More bits are
uniform levels whose width is the best for Gaussian coordinates (Max, "Quantizing for minimum
distortion", 1960, table II), relative to each key's own size. A key's factor makes the estimate of
q . (key - mean) right for parallel vectors; see `cpu_kernels.sketch_codes`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nearfar.cpu_kernels.sketch_codes import (
    round_queries,
    score_codes,
    words_per_key,
    write_codes,
)
from nearfar.cpu_kernels.sketch_scan import BLOCK_KEYS
from nearfar.cpu_kernels.weigh import weigh_codes
from nearfar.lsh.rotation import rotation
from nearfar.lsh.sampling import Weighing
from nearfar.records import FarView
from nearfar.storage import decoding_bytes

LEVEL_WIDTH = {1: 1.596, 2: 0.9957, 3: 0.5860, 4: 0.3352}  # in standard deviations
ENCODE_TOKENS = 8192  # keys that are held as float32 at a time
RECENTRE_GROWTH = 4  # times the keys that the mean was taken over
LAYOUT = 1  # of the arrays below; another one where codes, their order or the rotation change
STATE = ("words", "factors", "mean", "counts")
_ROOM_TOKENS, _ROOM_SHARE = 1024, 16  # spare room in a saved sketch: keys, or 1/16


@dataclass
class _Codes:
    """Codes and factors by one mean, with room: marks share them, so that growing keeps no copy."""

    # [Hkv, blocks, W, BLOCK_KEYS] and [Hkv, blocks * BLOCK_KEYS]; both grow or, where growing was
    # interrupted, none: kernels do not look at sizes
    arrays: tuple[NDArray[np.uint32], NDArray[np.float32]]

    @property
    def words(self) -> NDArray[np.uint32]:
        return self.arrays[0]

    @property
    def factors(self) -> NDArray[np.float32]:
        return self.arrays[1]


@dataclass(frozen=True)
class SketchMark:
    """A point in a sketch to which it can return."""

    length: int
    centred_over: int
    mean: torch.Tensor | None
    codes: _Codes  # the first ``length`` keys of which never change


class LayerSketch:
    """Codes of all far keys of one layer of one sequence."""

    def __init__(self, kv_heads: int, head_dim: int, bits: int) -> None:
        self.bits = bits
        self.length = 0
        self._centred_over = 0
        self._mean: torch.Tensor | None = None  # [Hkv, 1, D]
        self._rotation = rotation(head_dim)
        words = np.empty((kv_heads, 0, words_per_key(head_dim, bits), BLOCK_KEYS), np.uint32)
        self._codes = _Codes((words, np.empty((kv_heads, 0), np.float32)))

    @property
    def _words(self) -> NDArray[np.uint32]:
        return self._codes.words

    @property
    def _factors(self) -> NDArray[np.float32]:
        return self._codes.factors

    @property
    def num_bytes(self) -> int:
        """Bytes of codes and factors."""
        return self._words.nbytes + self._factors.nbytes

    def extend(self, far: FarView) -> None:
        """Encode the keys at the end of ``far`` that are new.

        The mean is that of the keys at the first call. Once there are RECENTRE_GROWTH times as many
        keys, all are encoded again with the mean of all: an old mean only costs accuracy.
        """
        if self._mean is None or far.length > RECENTRE_GROWTH * self._centred_over:
            self._mean = mean_of_keys(far)
            self._centred_over = far.length
            self.length = 0
            # fresh arrays: a mark may still hold the old ones
            self._codes = _Codes((self._words[:, :0], self._factors[:, :0]))
        self._reserve(far.length)
        for start in range(self.length, far.length, ENCODE_TOKENS):
            stop = min(start + ENCODE_TOKENS, far.length)
            turned = (far.keys(start, stop).float() - self._mean) @ self._rotation.T
            for head, y in enumerate(turned.numpy()):
                width = LEVEL_WIDTH[self.bits]
                write_codes(y, start, self.bits, width, self._words[head], self._factors[head])
        self.length = far.length

    def scores(self, query: torch.Tensor) -> NDArray[np.float32]:
        """Estimates [Hkv, G, length] of q . (key - mean) for ``query`` [Hq, D] float32."""
        queries, scales = self._rounded(query)
        scores = np.empty((*scales.shape, self.length), np.float32)
        codes = (self._words, self._factors, queries, scales, self.length, self.bits)
        score_codes(*codes, scores)
        return scores

    def weigh(self, query: torch.Tensor, temper: float, weighing: Weighing) -> None:
        """Write into ``weighing`` the softmax numerators of temper * `scores`."""
        queries, scales = self._rounded(query)
        weighing.reserve(self.length)
        codes = (self._words, self._factors, queries, scales, self.length, self.bits)
        weigh_codes(*codes, temper, weighing.numerators, weighing.tops, weighing.masses)

    def _rounded(self, query: torch.Tensor) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
        turned = query @ self._rotation.T
        return round_queries(turned.view(len(self._words), -1, query.shape[1]).numpy())

    def mark(self) -> SketchMark:
        """A point for `rewind`."""
        return SketchMark(self.length, self._centred_over, self._mean, self._codes)

    def rewind(self, mark: SketchMark) -> None:
        """Forget the keys encoded since ``mark``."""
        self.length, self._centred_over = mark.length, mark.centred_over
        self._mean, self._codes = mark.mean, mark.codes

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The state to save, with some room, so that an answer's tokens move no array."""
        Hkv, used, W, _ = self._words.shape
        used = min(used, -(-self.length // BLOCK_KEYS))
        room = used + min(_ROOM_TOKENS // BLOCK_KEYS, used // _ROOM_SHARE)
        words = np.zeros((Hkv, room, W, BLOCK_KEYS), np.uint32)
        factors = np.zeros((Hkv, room * BLOCK_KEYS), np.float32)
        words[:, :used] = self._words[:, :used]
        factors[:, : used * BLOCK_KEYS] = self._factors[:, : used * BLOCK_KEYS]
        mean = torch.zeros(Hkv, 1, len(self._rotation)) if self._mean is None else self._mean
        counts = np.array([self.length, self._centred_over])
        return {"words": words, "factors": factors, "mean": mean.numpy(), "counts": counts}

    def restore(self, state: Mapping[str, NDArray[Any]], length: int) -> None:
        """Become a saved ``state`` of ``length`` keys; ValueError if it cannot be one.

        Any codes and factors are safe to read, so only sizes are checked.
        """
        words, factors, mean, counts = (state[name] for name in STATE)
        Hkv, _, W, _ = self._words.shape
        D = len(self._rotation)
        types = [array.dtype for array in (words, factors, mean, counts)]
        shapes = words.ndim == 4 and words.shape == (Hkv, words.shape[1], W, BLOCK_KEYS)
        shapes = shapes and factors.shape == (Hkv, words.shape[1] * BLOCK_KEYS)
        if not shapes or mean.shape != (Hkv, 1, D) or counts.shape != (2,):
            raise ValueError("the arrays of a sketch do not have its sizes")
        if types != [np.uint32, np.float32, np.float32, np.int64]:
            raise ValueError("the arrays of a sketch do not have its types")
        if counts[0] != length or words.shape[1] * BLOCK_KEYS < length or counts[1] < 0:
            raise ValueError(f"a sketch of {counts[0]} keys is not one of {length}")
        self.length, self._centred_over = length, int(counts[1])
        self._mean = torch.from_numpy(mean) if length else None
        self._codes = _Codes((words, factors))

    def _reserve(self, length: int) -> None:
        blocks = -(-length // BLOCK_KEYS)
        if blocks <= self._words.shape[1]:
            return
        if self.length:  # growing by an eighth keeps copying below one key in eight
            blocks = max(blocks, self._words.shape[1] * 9 // 8)
        Hkv, used, W, _ = self._words.shape
        words = np.zeros((Hkv, blocks, W, BLOCK_KEYS), np.uint32)
        factors = np.zeros((Hkv, blocks * BLOCK_KEYS), np.float32)
        words[:, :used] = self._words
        factors[:, : used * BLOCK_KEYS] = self._factors
        self._codes.arrays = words, factors


def mean_of_keys(far: FarView) -> torch.Tensor:
    """The mean [Hkv, 1, D] float32 of all keys; of stored ones one head is widened at a time."""
    if far.rows.dtype == torch.float32:
        return far.keys().mean(1, keepdim=True)
    means = []
    wide = torch.empty(far.length, far.head_dim)
    for head in range(len(far.rows)):
        own = FarView(far.rows[head : head + 1], far.length)
        for start in range(0, far.length, ENCODE_TOKENS):
            stop = min(start + ENCODE_TOKENS, far.length)
            wide[start:stop] = own.keys(start, stop)[0]
        means.append(wide.mean(0, keepdim=True))
    return torch.stack(means)


def encoding_bytes(kv_heads: int, head_dim: int, num_keys: int, dtype: torch.dtype) -> int:
    """Peak temporary bytes while one layer's ``num_keys`` keys, stored as ``dtype``, are encoded.

    One head in float32 for the mean; then pieces of keys, centred and rotated, and the last piece.
    """
    mean = 0 if dtype == torch.float32 else 4 * num_keys * head_dim
    decoding = decoding_bytes(dtype, head_dim)
    piece = min(num_keys, ENCODE_TOKENS)
    turning = kv_heads * piece * max(12 * head_dim, 4 * head_dim + decoding)
    return max(mean + piece * decoding, turning)


def sketch_bytes(kv_heads: int, head_dim: int, bits: int, num_keys: int) -> int:
    """Bytes of one layer's sketch of ``num_keys`` keys."""
    return (
        kv_heads * -(-num_keys // BLOCK_KEYS) * BLOCK_KEYS * 4 * (words_per_key(head_dim, bits) + 1)
    )

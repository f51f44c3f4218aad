"""Rotary position embedding: the angle of every position and how vectors turn by it.

Half-split rotary, as in Llama: dimension i turns together with dimension i + D/2 by position times
frequency i (Su et al., "RoFormer", 2021). Frequencies and angles are float32 on every device, made
by the same operations as the models were trained with, because at 128K tokens a last bit of a
frequency is visible in the angle. This module knows no layers and no cache: the caller makes the
angles of its positions once and turns the queries and keys of all layers by them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

RopeKind = Literal["default", "linear", "llama3", "yarn"]


@dataclass(frozen=True)
class RopeConfig:
    """How frequencies follow from the base; a field is read by the kinds that its comment names."""

    base: float
    kind: RopeKind = "default"
    factor: float = 1.0  # linear, llama3, yarn: how many times longer than trained
    trained_context_tokens: int = 0  # llama3, yarn: context before the extension
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn: turns within the trained context above which nothing changes
    beta_slow: float = 1.0  # yarn: turns below which a frequency is divided by the factor
    whole_dimensions: bool = True  # yarn: the ramp starts and ends at a whole dimension
    attention_factor: float | None = None  # yarn; None: what the paper recommends

    @property
    def scale(self) -> float:
        """The factor of cosine and sine: 1 except for YaRN (Peng et al. 2023, eq. 22)."""
        if self.attention_factor is not None:
            return self.attention_factor
        return yarn_magnitude(self.factor) if self.kind == "yarn" else 1.0


def yarn_magnitude(factor: float, weight: float = 1.0) -> float:
    """sqrt(1/t) of yarn: by how much longer queries and keys keep attention as sharp as trained."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def inverse_frequencies(config: RopeConfig, head_dim: int) -> Tensor:
    """Radians per token [D / 2] float32, on the CPU."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    wavelengths = config.base**exponents  # in tokens per radian
    if config.kind == "linear":
        return 1.0 / wavelengths / config.factor
    if config.kind == "llama3":
        return _llama3(1.0 / wavelengths, config)
    if config.kind == "yarn":
        return _yarn(wavelengths, config, head_dim)
    return 1.0 / wavelengths


def _llama3(frequencies: Tensor, config: RopeConfig) -> Tensor:
    """Llama 3.1: keep fast frequencies, divide slow ones by the factor, blend between."""
    turns = config.trained_context_tokens / (2 * math.pi / frequencies)
    low, high = config.low_freq_factor, config.high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * frequencies / config.factor + kept * frequencies


def _yarn(wavelengths: Tensor, config: RopeConfig, head_dim: int) -> Tensor:
    """YaRN's NTK-by-parts (Peng et al. 2023, section 3.2)."""

    def dimension(turns: float) -> float:
        """Where a frequency makes this many turns within the trained context."""
        ratio = config.trained_context_tokens / (turns * 2 * math.pi)
        return head_dim * math.log(ratio) / (2 * math.log(config.base))

    first, last = dimension(config.beta_fast), dimension(config.beta_slow)
    if config.whole_dimensions:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    width = last - first or 0.001
    ramp = (torch.arange(head_dim // 2, dtype=torch.float32) - first) / width
    kept = 1 - ramp.clamp(0, 1)
    return 1.0 / (config.factor * wavelengths) * (1 - kept) + 1.0 / wavelengths * kept


class Angles(NamedTuple):
    """Cosine and sine of positions [...] for `rotate`: both tensors are [..., D] float32.

    The first half of ``sin`` is negated, so that a rotation needs no negation of its own.
    """

    cos: Tensor
    sin: Tensor


class Rotary:
    """The frequencies of one model on one device."""

    def __init__(self, config: RopeConfig, head_dim: int, device: torch.device) -> None:
        self._frequencies = inverse_frequencies(config, head_dim).to(device)
        self._scale = config.scale

    def angles(self, positions: Tensor) -> Angles:
        """Angles of ``positions``, integers [...] on this model's device."""
        radians = positions[..., None].float() * self._frequencies
        cos, sin = radians.cos(), radians.sin()
        if self._scale != 1.0:
            cos, sin = cos * self._scale, sin * self._scale
        return Angles(torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1))


def rotate(x: Tensor, angles: Angles) -> Tensor:
    """``x`` rotated to its positions: a new tensor of its shape and dtype, computed in float32.

    ``x`` is [positions..., D], or [positions..., heads, D] where all heads share a position.
    """
    cos, sin = angles
    if x.dim() == cos.dim() + 1:
        cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    turned = torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)
    return turned.to(x.dtype)

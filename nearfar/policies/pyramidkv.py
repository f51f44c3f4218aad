"""PyramidKV: SnapKV with more tokens for low layers and fewer for high ones."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from nearfar.errors import InvalidOptionError
from nearfar.policies.snapkv import SnapKV


@dataclass(frozen=True)
class PyramidKV(SnapKV):
    """The budget falls linearly with depth, from 2 b - b / beta to b / beta; its mean is b."""

    beta: float = 20.0  # the highest layer keeps a beta-th of the mean budget

    name = "pyramidkv"
    traits = dataclasses.replace(
        SnapKV.traits,
        summary="SnapKV with a budget that falls with the layer's depth",
        source="Cai et al., PyramidKV, arXiv 2406.02069",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.beta >= 1:
            raise InvalidOptionError(f"pyramidkv's beta must be 1 or more. Got {self.beta!r}.")

    def layer_budget(self, budget: int, layer: int, layers: int) -> int:
        """Rounded so that all layers together keep ``layers * budget`` tokens."""

        def below(count: int) -> int:
            """Tokens of the ``count`` lowest layers."""
            lowest = 2 * budget - budget / self.beta
            fall = (lowest - budget / self.beta) / max(1, layers - 1)
            return round(count * lowest - fall * count * (count - 1) / 2)

        return budget if layers == 1 else below(layer + 1) - below(layer)

"""From logits to the next token."""

from __future__ import annotations

import torch

from nearfar.config import SamplingConfig, generator_seed


class Sampler:
    """Draws tokens of one sequence; the same seed draws the same tokens."""

    def __init__(self, config: SamplingConfig) -> None:
        self._config = config
        # on the CPU for every device, so that a seed gives the same draws everywhere
        self._generator = torch.Generator().manual_seed(generator_seed(config.seed))

    def sample(self, logits: torch.Tensor) -> int:
        """A token id from ``logits`` [V] float32."""
        if self._config.temperature == 0:
            return int(logits.argmax())
        # in float64 and at most 0, so that no temperature is too low
        logits = logits.cpu().double()
        probabilities = ((logits - logits.max()) / self._config.temperature).softmax(-1)
        if self._config.top_p < 1:
            probabilities = keep_top_p(probabilities, self._config.top_p)
        return int(torch.multinomial(probabilities, 1, generator=self._generator))


def keep_top_p(probabilities: torch.Tensor, top_p: float) -> torch.Tensor:
    """``probabilities`` [V] outside the smallest set that holds ``top_p`` set to 0."""
    ordered, order = probabilities.sort(descending=True)
    before = ordered.cumsum(0) - ordered
    kept = torch.zeros_like(probabilities)
    chosen = before < top_p
    kept[order[chosen]] = ordered[chosen]
    return kept

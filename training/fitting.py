"""Gradient descent with a time limit."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
from torch import Tensor


def fit(
    parameters: list[Tensor],
    loss: Callable[[int], Tensor],
    steps: int,
    seconds: float,
    rate: float,
) -> int:
    """Minimise ``loss`` by Adam with a cosine decay for ``steps`` or ``seconds``; the steps taken.

    ``loss`` gets the number of the step.
    """
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimiser = torch.optim.Adam(parameters, lr=rate)
    started, taken = time.perf_counter(), 0
    while taken < steps and time.perf_counter() - started < seconds:
        done = max(taken / steps, (time.perf_counter() - started) / seconds)
        for group in optimiser.param_groups:
            group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * done))
        optimiser.zero_grad(set_to_none=True)
        value = loss(taken)
        if torch.isfinite(value):
            value.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimiser.step()
        taken += 1
    for parameter in parameters:
        parameter.requires_grad_(False)
    return taken

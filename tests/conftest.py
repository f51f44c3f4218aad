"""Every test starts from the same seeds, and uninitialised memory is full of NaN."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch


def _poisoned(make: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(make)
    def empty(*arguments: Any, **keywords: Any) -> Any:
        array = make(*arguments, **keywords)
        if isinstance(array, torch.Tensor):
            if array.is_floating_point():
                array.fill_(torch.nan)
        elif array.dtype.kind == "f":
            array.fill(np.nan)
        return array

    return empty


@pytest.fixture(autouse=True)
def _seeds_and_poison(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    monkeypatch.setattr(torch, "empty", _poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", _poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", _poisoned(torch.Tensor.new_empty))
    monkeypatch.setattr(np, "empty", _poisoned(np.empty))

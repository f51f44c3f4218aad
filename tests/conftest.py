"""Every test starts from the same seeds, and uninitialised memory is full of NaN.

Nothing is written to the home folder: what libraries keep goes to the cache folder of nearfar.
"""

from __future__ import annotations

import functools
import importlib
import os
import pkgutil
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from nearfar.config import cache_root

if "MPLCONFIGDIR" not in os.environ:
    os.environ["MPLCONFIGDIR"] = str(cache_root() / "tests" / "matplotlib")
if "TRITON_CACHE_DIR" not in os.environ:
    os.environ["TRITON_CACHE_DIR"] = str(cache_root() / "tests" / "triton")
if os.environ.get("NEARFAR_TEST_DEVICE", "cpu") == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is decorated

from specs import quick, tiny_specs

import nearfar.lsh
import nearfar.policies
from nearfar.policies.registry import usable_names


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


class _PoisonedNumpy(ModuleType):
    """NumPy with another `empty`, for modules that hand arrays to kernels.

    Kernels themselves keep the real one: Numba compiles it, and knows no other.
    """

    empty = staticmethod(_poisoned(np.empty))

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)


def _modules(*packages: ModuleType) -> list[ModuleType]:
    return [
        importlib.import_module(found.name)
        for package in packages
        for found in pkgutil.iter_modules(package.__path__, package.__name__ + ".")
    ]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the cases of policies that others stand for."""
    names = usable_names()
    alike = set(tiny_specs(names)) - set(quick(names))
    for item in items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        if any(given in alike for given in params.values() if isinstance(given, str)):
            item.add_marker(pytest.mark.alike)


@pytest.fixture(autouse=True)
def _seeds_and_poison(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    monkeypatch.setattr(torch, "empty", _poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", _poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", _poisoned(torch.Tensor.new_empty))
    poisoned = _PoisonedNumpy("numpy")
    for module in _modules(nearfar.lsh, nearfar.policies):
        if getattr(module, "np", None) is np:
            monkeypatch.setattr(module, "np", poisoned)

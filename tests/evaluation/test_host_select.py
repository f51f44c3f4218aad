"""Choosing keys beside faiss: what recall counts, and what is searched for."""

from __future__ import annotations

import importlib.util
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from nearfar.errors import InvalidOptionError
from nearfar.evaluation.host_cases import HostSetting, random_far
from nearfar.evaluation.host_select import KeySearch, check_faiss, faiss_indexes
from nearfar.records import Geometry

SETTING = HostSetting(Geometry(1, 6, 2, 16), num_keys=1500, budget=30, threads=2, rounds=2)


class Exact:
    """An index that finds the best keys of those it was given, or the worst."""

    def __init__(self, sign: int) -> None:
        self._sign = sign

    def train(self, keys: np.ndarray[Any, Any]) -> None:
        np.testing.assert_allclose(keys.mean(0), 0, atol=1e-4)

    def add(self, keys: np.ndarray[Any, Any]) -> None:
        self._keys = keys

    def search(self, queries: np.ndarray[Any, Any], k: int) -> tuple[Any, Any]:
        scores = self._sign * (queries @ self._keys.T)
        return scores, np.argsort(-scores, axis=1)[:, :k]


@pytest.fixture
def pretended_faiss(monkeypatch: pytest.MonkeyPatch) -> None:
    faiss: Any = SimpleNamespace(
        METRIC_INNER_PRODUCT=0,
        ScalarQuantizer=SimpleNamespace(QT_4bit=0),
        IndexPQFastScan=lambda *_: Exact(1),
        IndexRaBitQ=lambda *_: Exact(-1),
        IndexRaBitQFastScan=lambda *_: Exact(1),
        IndexScalarQuantizer=lambda *_: Exact(1),
        omp_set_num_threads=lambda _: None,
    )
    monkeypatch.setitem(sys.modules, "faiss", faiss)


@pytest.mark.usefixtures("pretended_faiss")
def test_recall_is_the_share_of_the_true_best() -> None:
    far = random_far(SETTING, torch.float32)
    case = KeySearch(SETTING, far, against_faiss=True).case(4)
    assert case.recall["faiss PQ fast scan"] == case.recall["faiss scalar quantiser"] == 1
    assert case.recall["faiss RaBitQ"] == 0
    assert 0.5 < case.recall["nearfar"] < 1
    works = case.draw(np.random.default_rng(0))
    found: Any = works["faiss PQ fast scan"]()
    assert [len(row) for row in found] == [15] * 6
    best: Any = works["faiss PQ fast scan, best key only"]()
    assert [row[0] for row in best] == [row[0] for row in found]
    works["nearfar"]()


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_faiss_itself(bits: int) -> None:
    pytest.importorskip("faiss", reason="measured with faiss only where it is: nearfar[rivals]")
    case = KeySearch(SETTING, random_far(SETTING, torch.float32), against_faiss=True).case(bits)
    assert set(case.recall) == {"nearfar", *faiss_indexes(16, bits)}
    assert all(0.1 < share <= 1 for share in case.recall.values())


def test_faiss_that_cannot_be_measured_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())
    check_faiss(1000)
    with pytest.raises(InvalidOptionError, match=r"faiss needs 1,000 keys or more\. Got 999\."):
        check_faiss(999)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(InvalidOptionError, match=r"faiss is not installed\. Run: pip install"):
        check_faiss(1000)

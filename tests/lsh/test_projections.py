"""Codes of random hyperplanes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nearfar.lsh import projections
from nearfar.lsh.projections import random_projections
from nearfar.lsh.tables_reference import ReferenceSampler


@pytest.mark.parametrize(("bits", "tables"), [(1, 1), (7, 13), (12, 5), (16, 3)])
def test_codes_equal_the_reference(bits: int, tables: int) -> None:
    hashing = random_projections(33, bits, tables, 5)
    vectors = torch.randn(101, 33, generator=torch.Generator().manual_seed(1))
    codes = hashing.codes(vectors)
    expected = ReferenceSampler(hashing.planes.double().numpy(), bits, tables).codes(
        vectors.double().numpy()
    )
    assert codes.dtype == np.uint16
    np.testing.assert_array_equal(codes.T, expected)


def test_all_bits_of_a_sixteen_bit_code_are_used() -> None:
    vectors = torch.randn(2000, 24, generator=torch.Generator().manual_seed(0))
    codes = random_projections(24, 16, 2, 0).codes(vectors)
    assert np.bitwise_or.reduce(codes.ravel()) == 0xFFFF
    assert np.bitwise_and.reduce(codes.ravel()) == 0


def test_chunks_do_not_change_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    hashing = random_projections(16, 9, 11, 0)
    vectors = torch.randn(130, 16, generator=torch.Generator().manual_seed(2))
    whole = hashing.codes(vectors)
    monkeypatch.setattr(projections, "CHUNK_VECTORS", 17)
    np.testing.assert_array_equal(hashing.codes(vectors), whole)


def test_a_zero_vector_has_code_zero() -> None:
    assert not random_projections(8, 10, 4, 0).codes(torch.zeros(3, 8)).any()


def test_planes_depend_on_the_seed_alone() -> None:
    first = random_projections(8, 4, 3, 1)
    random_projections.cache_clear()
    assert torch.equal(first.planes, random_projections(8, 4, 3, 1).planes)
    assert not torch.equal(first.planes, random_projections(8, 4, 3, 2).planes)

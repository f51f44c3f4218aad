"""What building an index works with does not grow with the context."""

from __future__ import annotations

import pytest
import torch
from peaks import peak_bytes

from nearfar.config import Budget
from nearfar.policies.growing import PIECE_KEYS
from nearfar.policies.registry import create_policy
from nearfar.records import FarView, Geometry
from nearfar.storage import FORMATS, encode_rows

GEOMETRY = Geometry(layers=1, query_heads=2, kv_heads=2, head_dim=32)


def working_bytes(policy: str, far: FarView) -> int:
    """The peak of building an index of ``far``, less the index."""
    index = create_policy(policy).new_index(GEOMETRY, Budget(64), 0)
    assert index is not None

    def build() -> None:
        index.reserve(far.length)
        index.extend(0, far)

    return peak_bytes(build) - index.index_bytes()


@pytest.mark.parametrize("far_dtype", ["bfloat16", "int8", "kivi-2"])
@pytest.mark.parametrize("policy", ["quest", "infllm", "clusters"])
def test_twice_the_keys_need_no_more_to_build(policy: str, far_dtype: str) -> None:
    keys, values = torch.randn(2, 2, 2 * PIECE_KEYS, GEOMETRY.head_dim)
    rows = encode_rows(keys, values, FORMATS[far_dtype])
    working_bytes(policy, FarView(rows, PIECE_KEYS // 2))  # what is only made once
    once, twice = (working_bytes(policy, FarView(rows, n * PIECE_KEYS)) for n in (1, 2))
    assert 0 < twice < 1.2 * once

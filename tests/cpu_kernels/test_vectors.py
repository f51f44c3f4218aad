"""Emitted vector code: exponential, sums over lanes, partial loads and stores."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import pytest
from numba import types
from numba.extending import intrinsic

from nearfar.cpu_kernels.compile import cpu_features
from nearfar.cpu_kernels.vectors import FLOAT, FLOATS, LANES, Emitter


def compiled(emit_body: Any) -> Any:
    """A function (source, count, target) of two float32 arrays whose body is emitted."""

    @intrinsic  # type: ignore[untyped-decorator]
    def body(typing_context: Any, source: Any, count: Any, target: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            emit = Emitter(context, builder)
            first, _ = emit.array(signature.args[0], arguments[0])
            last, _ = emit.array(signature.args[2], arguments[2])
            emit_body(emit, first, arguments[1], last)
            return context.get_dummy_value()

        return types.void(source, types.int64, target), generate

    @numba.njit  # type: ignore[untyped-decorator]
    def run(source: Any, count: int, target: Any) -> None:
        body(source, count, target)

    return run


def test_exponential_is_accurate_and_ends_at_zero() -> None:
    def body(emit: Emitter, source: Any, count: Any, target: Any) -> None:
        with emit.loop(count, step=4 * LANES) as offset:
            value = emit.exp(emit.load(emit.at(source, offset), FLOATS))
            emit.store(value, emit.at(target, offset))

    x = np.concatenate([-np.geomspace(1e-7, 86.99, 4092), [0, -87.1, -1e30, -np.inf]])
    x = x.astype(np.float32)
    got = np.full(len(x), np.nan, np.float32)
    compiled(body)(x, 4 * len(x), got)
    want = np.exp(x[:-3].astype(np.float64))
    assert np.abs(got[:-3] / want - 1).max() < 3e-7
    assert got[-4] == 1
    assert np.array_equal(got[-3:], np.zeros(3))


def test_sums_of_lanes_keep_their_order() -> None:
    def body(emit: Emitter, source: Any, count: Any, target: Any) -> None:
        each = [emit.load(emit.at(source, 4 * LANES * i), FLOATS) for i in range(LANES)]
        emit.store(emit.sums(each), target)

    x = np.random.default_rng(0).standard_normal((LANES, LANES)).astype(np.float32)
    got = np.full(LANES, np.nan, np.float32)
    compiled(body)(x, 0, got)
    np.testing.assert_allclose(got, x.sum(1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [1, 2, 4, LANES])
def test_groups_of_lanes_share_their_maximum(size: int) -> None:
    def body(emit: Emitter, source: Any, count: Any, target: Any) -> None:
        vector = emit.load(source, FLOATS)
        emit.store(emit.over_groups(vector, size, emit.maximum), target)

    x = np.random.default_rng(size).standard_normal(LANES).astype(np.float32)
    got = np.full(LANES, np.nan, np.float32)
    compiled(body)(x, 0, got)
    np.testing.assert_array_equal(got, x.reshape(-1, size).max(1).repeat(size))


def test_partial_loads_end_in_zeros_and_partial_stores_touch_no_more() -> None:
    def body(emit: Emitter, source: Any, count: Any, target: Any) -> None:
        value = emit.load_some(source, FLOAT, count)
        emit.store_some(value, target, count)
        emit.store(value, emit.at(target, 4 * LANES))

    run = compiled(body)
    for count in range(LANES):
        x = np.arange(1, LANES + 1).astype(np.float32)
        x[count:] = np.nan
        got = np.full(2 * LANES, -1, np.float32)
        run(x, count, got)
        np.testing.assert_array_equal(got[:count], x[:count])
        assert (got[count:LANES] == -1).all()
        np.testing.assert_array_equal(got[LANES : LANES + count], x[:count])
        assert (got[LANES + count :] == 0).all()


def test_lanes_follow_the_cpu() -> None:
    features = cpu_features()
    assert (16 if "avx512f" in features else 8) == LANES

"""A sketch as arrays: taken back as it was, with room, and refused where it cannot be one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from sketch_cases import make_far, make_query, sketched

from nearfar.cpu_kernels.sketch_scan import BLOCK_KEYS
from nearfar.lsh.sketch import STATE, LayerSketch

HKV, D, BITS = 2, 33, 2
Arrays = dict[str, NDArray[Any]]


@pytest.mark.parametrize("length", [0, 1, BLOCK_KEYS, BLOCK_KEYS + 1, 40 * BLOCK_KEYS])
def test_it_is_taken_back_as_it_was_and_grows_as_it_would(length: int) -> None:
    far = make_far(length + 9, D)
    centred = -(-length // 2)  # the mean is that of the first half
    layer = sketched(far, BITS, centred, length) if length else LayerSketch(HKV, D, BITS)
    state, query, again = layer.arrays(), make_query(4, D), LayerSketch(HKV, D, BITS)
    assert tuple(state) == STATE
    blocks = -(-length // BLOCK_KEYS)
    room = min(1024 // BLOCK_KEYS, blocks // 16)
    assert state["words"].shape[1] == blocks + room
    assert not state["words"][:, blocks:].any()
    assert not state["factors"][:, blocks * BLOCK_KEYS :].any()
    again.restore(state, length)
    assert (again.length, again.mark().centred_over) == (length, centred)
    np.testing.assert_array_equal(again.scores(query), layer.scores(query))
    layer.extend(far)
    again.extend(far)
    np.testing.assert_array_equal(again.scores(query), layer.scores(query))


def test_room_that_was_reserved_is_not_saved() -> None:
    far = make_far(20 * BLOCK_KEYS, D)
    layer = sketched(far, BITS, 19 * BLOCK_KEYS, 20 * BLOCK_KEYS)
    assert layer.mark().codes.words.shape[1] > 20
    assert layer.arrays()["words"].shape[1] == 21


@pytest.mark.parametrize(
    "change",
    [
        lambda a: {"words": a["words"][0]},
        lambda a: {"words": a["words"][:1]},
        lambda a: {"words": a["words"][:, :, :-1]},
        lambda a: {"words": a["words"][..., :-1]},
        lambda a: {"factors": a["factors"][:1]},
        lambda a: {"factors": a["factors"][:, :-1]},
        lambda a: {"words": a["words"][:, :-1], "factors": a["factors"][:, :-BLOCK_KEYS]},
        lambda a: {"mean": a["mean"][:, 0]},
        lambda a: {"mean": a["mean"][..., :-1]},
        lambda a: {"counts": a["counts"][:1]},
        lambda a: {"counts": a["counts"] + [1, 0]},
        lambda a: {"counts": a["counts"] - [1, 0]},
        lambda a: {"counts": a["counts"] * [1, -1]},
        *(lambda a, name=name: {name: a[name].astype(np.float64)} for name in STATE),
    ],
)
def test_what_no_sketch_has_is_refused(change: Callable[[Arrays], Arrays]) -> None:
    layer = sketched(make_far(BLOCK_KEYS + 3, D), BITS)
    state, other = layer.arrays(), LayerSketch(HKV, D, BITS)
    with pytest.raises(ValueError, match=r"^(the arrays of )?a sketch "):
        other.restore(state | change(state), layer.length)
    assert other.length == 0
    with pytest.raises(ValueError, match=r"^a sketch of 67 keys is not one of 66$"):
        other.restore(state, 66)
    other.restore(state, layer.length)

"""The rotation: orthogonal, the same everywhere, and uniform over the orthogonal group."""

from __future__ import annotations

import pytest
import torch

from nearfar.lsh.rotation import rotation


@pytest.mark.parametrize("D", [1, 2, 7, 33, 64, 80, 96, 128, 256])
def test_it_is_orthogonal(D: int) -> None:
    turn = rotation(D)
    assert turn.shape == (D, D)
    assert turn.dtype == torch.float32
    exact = turn.double()
    torch.testing.assert_close(exact @ exact.T, torch.eye(D).double(), rtol=0, atol=1e-6)


def test_it_is_the_same_in_every_process_and_leaves_the_global_seed_alone() -> None:
    before = torch.get_rng_state()
    for D in (7, 64):
        assert torch.equal(rotation(D), rotation.__wrapped__(D))
        assert not torch.equal(rotation(D), rotation(D, seed=1))
        assert rotation(D) is rotation(D)
    assert torch.equal(before, torch.get_rng_state())


def test_it_is_uniform_over_rotations_and_reflections() -> None:
    """Without its signs put right, QR gives first columns that all point to one side."""
    D, count = 4, 600
    turns = torch.stack([rotation(D, seed) for seed in range(count)]).double()
    error = (1 / D / count) ** 0.5  # of a mean of entries, whose variance is 1 / D
    assert turns.mean(0).abs().max() < 4.5 * error
    torch.testing.assert_close(
        turns.square().mean(0), torch.full((D, D), 1 / D).double(), rtol=0.2, atol=0
    )
    reflections = (torch.linalg.det(turns) < 0).double().mean()
    assert abs(reflections - 0.5) < 4 * 0.5 / count**0.5


def test_it_spreads_a_vector_that_has_one_coordinate() -> None:
    D = 128
    turned = rotation(D) * D**0.5  # column j is the turned axis j
    assert turned.abs().max() < 5
    kurtosis = turned.double().pow(4).mean()
    assert abs(kurtosis - 3 * D / (D + 2)) < 0.2


def test_it_is_the_one_by_which_codes_were_saved() -> None:
    """Another one needs another `nearfar.lsh.sketch.LAYOUT`: codes in files are by this one."""
    want = torch.tensor(
        [
            [0.301325, -0.483733, -0.821709],
            [0.438915, 0.835402, -0.330842],
            [0.846497, -0.260970, 0.464045],
        ]
    )
    torch.testing.assert_close(rotation(3), want, rtol=0, atol=1e-5)

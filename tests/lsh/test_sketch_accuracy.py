"""Estimates are right along a key, as accurate as theory says, and with one bit sign hashing."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sketch_cases import BITS, Array, levels_of, make_far, make_query, scores_of, sketched

from nearfar.lsh.probability import log_collision_probability
from nearfar.lsh.rotation import rotation
from nearfar.lsh.sketch import LEVEL_WIDTH, LayerSketch
from nearfar.lsh.sketch_reference import DISTORTION, expected_error
from nearfar.records import FarView


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("D", [7, 128])
def test_the_estimate_is_right_along_the_key(bits: int, D: int) -> None:
    far = make_far(70, D)
    layer = sketched(far, bits)
    centred = far.keys().double() - far.keys().double().mean(1, keepdim=True)
    for key in (0, 33, 69):
        for scale in (1.0, -3.0):
            query = scale * centred[:, key]
            got = scores_of(layer, query.float())[:, 0, key]
            want = scale * centred[:, key].square().sum(1)
            # the query is rounded to 127ths of its largest coordinate
            np.testing.assert_allclose(got, want.numpy(), rtol=1e-2)


def relative_errors(bits: int, D: int, N: int = 2000) -> Array:
    """Errors of scores as shares of |q'| |y| (see `expected_error`) on Gaussian keys."""
    far = make_far(N, D, Hkv=1, offset=0.0)
    y = (far.keys() - far.keys().mean(1, keepdim=True))[0].double().numpy()
    query = make_query(8, D)
    q = query.double().numpy()
    truth = q @ y.T
    size = np.linalg.norm(y, axis=1)
    across = np.sqrt(np.square(q).sum(1)[:, None] - np.square(truth / size))
    errors: Array = (scores_of(sketched(far, bits), query)[0] - truth) / (across * size)
    return errors


@pytest.mark.parametrize("D", [64, 128])
def test_errors_on_gaussian_keys_are_what_theory_says(D: int) -> None:
    sizes = []
    for bits in BITS:
        errors = relative_errors(bits, D)
        want = expected_error(bits, D)
        sizes.append(np.sqrt(np.square(errors).mean()))
        assert sizes[-1] == pytest.approx(want, rel=0.1)
        assert abs(errors.mean()) < 0.1 * want
        assert np.abs(errors).max() < 7 * want
    assert sizes[0] > 1.8 * sizes[1] > 3.2 * sizes[2] > 5.5 * sizes[3]


def test_level_widths_are_the_best_for_gaussian_coordinates() -> None:
    x = np.linspace(-8, 8, 160_001)
    density = np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi) * (x[1] - x[0])
    for bits, width in LEVEL_WIDTH.items():

        def distortion(step: float, bits: int = bits) -> float:
            half = 2 ** (bits - 1)
            nearest = (np.clip(np.floor(x / step), -half, half - 1) + 0.5) * step
            return float(((x - nearest) ** 2 * density).sum())

        assert distortion(width) == pytest.approx(DISTORTION[bits], rel=2e-3)
        assert distortion(width) < min(distortion(width * 1.01), distortion(width * 0.99))


@pytest.mark.parametrize("degrees", [0, 20, 60, 90, 135, 175])
def test_one_bit_is_sign_hashing(degrees: float) -> None:
    """Signs of key and query agree in a share 1 - angle / pi of the hyperplanes."""
    D, N = 96, 600
    rng = np.random.default_rng(int(degrees))
    key = rng.standard_normal((N, D))
    other = rng.standard_normal((N, D))
    key /= np.linalg.norm(key, axis=1, keepdims=True)
    other -= (other * key).sum(1, keepdims=True) * key
    other /= np.linalg.norm(other, axis=1, keepdims=True)
    angle = math.radians(degrees)
    queries = math.cos(angle) * key + math.sin(angle) * other
    rows = torch.zeros(1, 2 * N, 2 * D)
    rows[0, :, :D] = torch.from_numpy(np.concatenate([key, -key]))  # their mean is zero
    signs = levels_of(sketched(FarView(rows, 2 * N), 1), D)[0] * 2 - 1
    query_signs = np.sign(queries @ rotation(D).double().numpy().T)
    theory = float(np.exp(log_collision_probability(math.cos(angle), 1)))
    error = math.sqrt(theory * (1 - theory) / (N * D)) + 1e-4
    assert (signs[:N] == query_signs).mean() == pytest.approx(theory, abs=4 * error)
    assert (signs[N:] == query_signs).mean() == pytest.approx(1 - theory, abs=4 * error)


def test_a_new_mean_mends_what_a_drifting_text_costs() -> None:
    far = make_far(401, offset=0.0)
    far.rows[:, 100:, :33] += 6.0
    query = make_query(6, 33)
    exact = torch.einsum("hgd,hnd->hgn", query.view(2, 3, 33), far.keys()).numpy()

    def error(layer: LayerSketch) -> float:
        """Of scores, each head's constant left out."""
        off = scores_of(layer, query) - exact[..., : layer.length]
        return float((off - off.mean(-1, keepdims=True)).std())

    assert error(sketched(far, 4, 100, 400)) > 1.5 * error(sketched(far, 4, 100, 400, 401))

"""Frequencies equal transformers'; products of turned vectors depend on distance alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from nearfar.runtime.models.rope import RopeConfig, Rotary, inverse_frequencies, rotate

CPU = torch.device("cpu")


def reference(head_dim: int, **rope: Any) -> tuple[torch.Tensor, float]:
    config = transformers.LlamaConfig(
        hidden_size=6 * head_dim,
        num_attention_heads=6,
        max_position_embeddings=131072,
        rope_parameters=rope,
    )
    frequencies, scale = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, CPU)
    return frequencies, float(scale)


def test_default_frequencies_are_powers_of_the_base() -> None:
    frequencies = inverse_frequencies(RopeConfig(10_000.0), 6)
    assert frequencies.dtype == torch.float32
    expected = torch.tensor([1.0, 10_000 ** (-2 / 6), 10_000 ** (-4 / 6)])
    torch.testing.assert_close(frequencies, expected, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("head_dim", [6, 64, 128])
def test_linear_frequencies_equal_transformers(head_dim: int) -> None:
    expected, _ = reference(head_dim, rope_type="linear", rope_theta=5e5, factor=2.5)
    assert torch.equal(inverse_frequencies(RopeConfig(5e5, "linear", 2.5), head_dim), expected)


@pytest.mark.parametrize("head_dim", [6, 64, 128])
def test_llama3_frequencies_equal_transformers(head_dim: int) -> None:
    expected, _ = reference(
        head_dim,
        rope_type="llama3",
        rope_theta=5e5,
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    )
    config = RopeConfig(5e5, "llama3", 8.0, 8192, 1.0, 4.0)
    torch.testing.assert_close(inverse_frequencies(config, head_dim), expected, rtol=3e-7, atol=0)


@pytest.mark.parametrize("head_dim", [6, 64, 128])
@pytest.mark.parametrize("truncate", [True, False])
def test_yarn_frequencies_and_scale_equal_transformers(head_dim: int, truncate: bool) -> None:
    expected, scale = reference(
        head_dim,
        rope_type="yarn",
        rope_theta=1e6,
        factor=4.0,
        original_max_position_embeddings=32768,
        truncate=truncate,
    )
    config = RopeConfig(1e6, "yarn", 4.0, 32768, whole_dimensions=truncate)
    assert torch.equal(inverse_frequencies(config, head_dim), expected)
    assert config.scale == pytest.approx(scale)
    assert config.scale == pytest.approx(0.1 * math.log(4.0) + 1.0)


def test_position_zero_turns_nothing_and_lengths_stay() -> None:
    rotary = Rotary(RopeConfig(500.0), 10, CPU)
    x = torch.randn(4, 3, 10)
    turned = rotate(x, rotary.angles(torch.tensor([0, 1, 77, 100_000])))
    assert torch.equal(turned[0], x[0])
    assert ((turned[1:] - x[1:]).abs().amax((1, 2)) > 0.1).all()
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1), rtol=1e-5, atol=0.0)


def test_products_depend_on_the_distance_alone() -> None:
    rotary = Rotary(RopeConfig(10_000.0), 64, CPU)
    q, k = torch.randn(1, 1, 64), torch.randn(1, 1, 64)

    def product(query_position: int, key_position: int) -> float:
        turned_q = rotate(q, rotary.angles(torch.tensor([query_position])))
        turned_k = rotate(k, rotary.angles(torch.tensor([key_position])))
        return float((turned_q * turned_k).sum())

    assert product(3008, 3001) == pytest.approx(product(7, 0), abs=1e-2)
    assert product(3008, 3001) != pytest.approx(product(70, 0), abs=1e-2)


def test_halves_turn_together() -> None:
    rotary = Rotary(RopeConfig(10_000.0), 4, CPU)
    x = torch.tensor([[[1.0, 0.0, 0.0, 2.0]]])
    turned = rotate(x, rotary.angles(torch.tensor([5])))[0, 0]
    slow = 5 * 10_000**-0.5
    expected = [math.cos(5), -2 * math.sin(slow), math.sin(5), 2 * math.cos(slow)]
    torch.testing.assert_close(turned, torch.tensor(expected), rtol=1e-5, atol=1e-6)


def test_every_head_may_have_positions_of_its_own() -> None:
    rotary = Rotary(RopeConfig(500.0), 6, CPU)
    keys = torch.randn(3, 5, 6)  # [Hkv, N, D]; as many heads as the other layout has tokens
    positions = torch.randint(0, 9999, (3, 5))
    turned = rotate(keys, rotary.angles(positions))
    for head in range(3):
        alone = rotate(keys[head, :, None], rotary.angles(positions[head]))[:, 0]
        torch.testing.assert_close(turned[head], alone, rtol=1e-5, atol=1e-6)


def test_a_batch_of_tokens_turns_like_its_members() -> None:
    rotary = Rotary(RopeConfig(500.0), 6, CPU)
    x, positions = torch.randn(2, 5, 3, 6), torch.randint(0, 9999, (2, 5))
    turned = rotate(x, rotary.angles(positions))
    torch.testing.assert_close(
        turned[1], rotate(x[1], rotary.angles(positions[1])), rtol=1e-5, atol=1e-6
    )


def test_yarn_scales_what_it_turns() -> None:
    rotary = Rotary(RopeConfig(500.0, "yarn", 4.0, 32, attention_factor=1.5), 6, CPU)
    x = torch.randn(3, 2, 6)
    turned = rotate(x, rotary.angles(torch.arange(3)))
    torch.testing.assert_close(turned.norm(dim=-1), 1.5 * x.norm(dim=-1), rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_rounded_once(dtype: torch.dtype) -> None:
    angles = Rotary(RopeConfig(500.0), 6, CPU).angles(torch.arange(7))
    x = torch.randn(7, 3, 6).to(dtype)
    turned = rotate(x, angles)
    assert turned.dtype == dtype
    assert torch.equal(turned, rotate(x.float(), angles).to(dtype))


def test_no_positions_give_nothing() -> None:
    angles = Rotary(RopeConfig(500.0), 6, CPU).angles(torch.arange(0))
    assert rotate(torch.randn(0, 3, 6), angles).shape == (0, 3, 6)

"""A weight's product and what is fused with it, for any number of tokens."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch

from nearfar.gpu_kernels.matvec import matvec_reference
from nearfar.runtime.models.linear import PRODUCT_TOKENS, DenseLinear, Fused, pieces

close = partial(torch.testing.assert_close, rtol=2e-5, atol=2e-5)
IN, OUT = 37, 22


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("by_kernel", [False, True], ids=["tensors", "kernel"])
@pytest.mark.parametrize("T", [0, 1, 5, PRODUCT_TOKENS + 3])
def test_a_product_and_all_that_is_fused_with_it(T: int, by_kernel: bool) -> None:
    for has_bias, has_norm, kind in itertools.product(
        (False, True), (False, True), ("plain", "gated", "add")
    ):
        weight, bias = random(OUT, IN), random(OUT) if has_bias else None
        linear = DenseLinear(weight, bias)
        linear._one_token_kernel = by_kernel
        norm = random(IN) if has_norm else None
        fused = Fused(norm, 1e-3, gated=kind == "gated", add=kind == "add")
        x, width = random(T, IN), OUT // 2 if kind == "gated" else OUT
        out = random(T, width) if kind == "add" else torch.full((T, width), torch.nan)
        want, before = out.clone(), x.clone()
        matvec_reference(
            x, weight, bias, want, norm=norm, eps=1e-3, gated=fused.gated, add=fused.add
        )
        linear.into(x, out, fused)
        close(out, want)
        assert torch.equal(x, before)


@pytest.mark.parametrize("kind", ["plain", "gated", "add"])
def test_a_narrow_type_is_rounded_where_tensor_code_rounds(kind: str) -> None:
    weight = random(OUT, IN).bfloat16()
    x, width = random(5, IN).bfloat16(), OUT // 2 if kind == "gated" else OUT
    out = random(5, width).bfloat16()
    product = torch.nn.functional.linear(x, weight)
    gate, value = product.chunk(2, dim=-1)
    if kind == "gated":
        want = torch.nn.functional.silu(gate) * value
    else:
        want = out + product if kind == "add" else product
    DenseLinear(weight).into(x, out, Fused(gated=kind == "gated", add=kind == "add"))
    assert torch.equal(out, want)


def test_logits_may_be_wider_than_the_weights() -> None:
    weight, x = random(OUT, IN).bfloat16(), random(3, IN).bfloat16()
    out = torch.full((3, OUT), torch.nan)
    DenseLinear(weight).into(x, out)
    assert torch.equal(out, torch.nn.functional.linear(x, weight).float())


def test_sizes_and_bytes() -> None:
    linear = DenseLinear(random(OUT, IN), random(OUT))
    assert linear.out_features == OUT
    assert linear.num_bytes == 4 * (OUT * IN + OUT)


def test_pieces_cover_a_span_in_order() -> None:
    assert pieces(slice(3, 10), 4) == [slice(3, 7), slice(7, 10)]
    assert pieces(slice(3, 3), 4) == []

"""Near attention and both merges: exact for any split of the keys, empty sets included."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from nearfar.cpu_kernels import merge as cpu_merge
from nearfar.gpu_kernels import attend_near as near
from nearfar.records import Partial

MERGES = [near.merge_partials, cpu_merge.merge_partials]


def inputs(Hq: int, Hkv: int, N: int, D: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(N)
    return (
        torch.randn(Hq, D, generator=generator),
        torch.randn(Hkv, N, D, generator=generator),
        torch.randn(Hkv, N, D, generator=generator),
    )


@pytest.mark.parametrize(("Hq", "Hkv", "N", "D"), [(9, 3, 77, 64), (4, 4, 1, 33), (6, 1, 130, 96)])
def test_equals_softmax_attention(Hq: int, Hkv: int, N: int, D: int) -> None:
    q, k, v = inputs(Hq, Hkv, N, D)
    group = Hq // Hkv
    wide_k, wide_v = k.repeat_interleave(group, 0).double(), v.repeat_interleave(group, 0).double()
    logits = torch.einsum("hd,hnd->hn", q.double(), wide_k)
    partial, attention = near.attend_near_scored(q, k, v)
    torch.testing.assert_close(attention.double(), logits.softmax(-1), rtol=1e-4, atol=1e-6)
    want = torch.einsum("hn,hnd->hd", logits.softmax(-1), wide_v)
    torch.testing.assert_close(partial.out.double(), want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(partial.lse.double(), logits.logsumexp(-1), rtol=1e-5, atol=1e-5)
    plain = near.attend_near(q, k, v)
    torch.testing.assert_close(plain.out, partial.out, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize("cut", [0, 1, 40, 77])
def test_any_split_gives_the_same_output(
    merge: Callable[[Partial, Partial], Partial], cut: int
) -> None:
    q, k, v = inputs(9, 3, 77, 64)
    whole = near.attend_near(q, k, v)
    first = near.attend_near(q, k[:, :cut], v[:, :cut])
    second = near.attend_near(q, k[:, cut:], v[:, cut:])
    for merged in (merge(first, second), merge(second, first)):
        torch.testing.assert_close(merged.out, whole.out, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(merged.lse, whole.lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("merge", MERGES)
def test_two_empty_sets_are_empty(merge: Callable[[Partial, Partial], Partial]) -> None:
    empty = Partial(torch.zeros(3, 8), torch.full((3,), -torch.inf))
    merged = merge(empty, empty)
    assert torch.equal(merged.out, empty.out)
    assert torch.equal(merged.lse, empty.lse)


@pytest.mark.parametrize("merge", MERGES)
def test_far_apart_sums_do_not_overflow(merge: Callable[[Partial, Partial], Partial]) -> None:
    heavy = Partial(torch.ones(1, 4), torch.tensor([300.0]))
    light = Partial(torch.full((1, 4), 5.0), torch.tensor([-300.0]))
    merged = merge(light, heavy)
    torch.testing.assert_close(merged.out, heavy.out, rtol=1e-6, atol=0.0)
    torch.testing.assert_close(merged.lse, heavy.lse, rtol=1e-6, atol=0.0)


def test_interpreted_merge_equals_compiled() -> None:
    out, lse = torch.empty(2, 3), torch.empty(2)
    rows = [torch.rand(2, 3), torch.rand(2), torch.rand(2, 3), torch.tensor([0.3, -torch.inf])]
    cpu_merge.merge_rows.py_func(*(row.numpy() for row in rows), out.numpy(), lse.numpy())
    merged = cpu_merge.merge_partials(Partial(rows[0], rows[1]), Partial(rows[2], rows[3]))
    torch.testing.assert_close(merged.out, out, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(merged.lse, lse, rtol=1e-5, atol=1e-6)

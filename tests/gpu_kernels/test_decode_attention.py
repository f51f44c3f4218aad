from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from kernel_cases import (
    DEVICE,
    HEADS,
    TYPES,
    close,
    integers,
    poisoned,
    random,
    rows_of,
    tolerance,
)

from nearfar.gpu_kernels.decode_attention import attend_rows, attend_rows_reference
from nearfar.gpu_kernels.merge import (
    merge_pair,
    merge_pair_reference,
    merge_splits,
    merge_splits_reference,
)
from nearfar.gpu_kernels.rows import RowTable


def attend_and_merge(
    attend: Callable[..., None],
    merge: Callable[..., None],
    query: torch.Tensor,
    rows: RowTable,
    lengths: torch.Tensor,
    scale: float,
    splits: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    B, Hq, D = query.shape
    out, lse = poisoned(B, Hq, splits + 3, D), poisoned(B, Hq, splits + 3)
    attend(query, rows, lengths, scale, splits, out, lse, 2)
    of_others = [0, 1, splits + 2]
    assert out[:, :, of_others].isnan().all()
    assert lse[:, :, of_others].isnan().all()
    mine = slice(2, splits + 2)
    out, lse = out[:, :, mine].contiguous(), lse[:, :, mine].contiguous()
    merged = poisoned(B, Hq, D)
    merge(out, lse, None, None, merged)
    return merged, lse.logsumexp(-1)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(("Hq", "Hkv", "D"), HEADS)
def test_a_ragged_batch_equals_the_reference(Hq: int, Hkv: int, D: int, dtype: torch.dtype) -> None:
    lengths = [0, 1, 67, 200]
    rows = RowTable.of([rows_of(n, n + 5, Hkv, D, dtype, n) for n in lengths])
    query = random(len(lengths), Hq, D, dtype=dtype)
    arguments = (query, rows, integers(*lengths), D**-0.5, 3)
    got, got_lse = attend_and_merge(attend_rows, merge_splits, *arguments)
    want, want_lse = attend_and_merge(attend_rows_reference, merge_splits_reference, *arguments)
    close(got, want, **tolerance(dtype))
    close(got_lse, want_lse, **tolerance(dtype))
    assert (got[0] == 0).all()
    assert (got_lse[0] == -torch.inf).all()


@pytest.mark.parametrize("splits", [1, 2, 7])
def test_the_number_of_splits_does_not_matter(splits: int) -> None:
    rows = RowTable.of([rows_of(150, 160, 2, 32, torch.float32)])
    query = random(1, 4, 32)
    arguments = (query, rows, integers(150), 0.3)
    got, _ = attend_and_merge(attend_rows, merge_splits, *arguments, splits)
    want, _ = attend_and_merge(attend_rows_reference, merge_splits_reference, *arguments, 1)
    close(got, want, rtol=2e-5, atol=2e-5)


def test_equal_and_huge_logits() -> None:
    rows = torch.ones(1, 70, 64, device=DEVICE)
    rows[0, :, 32:] = random(70, 32)
    for size in (0.0, 300.0):
        query = torch.full((1, 2, 32), size, device=DEVICE)
        got, lse = attend_and_merge(
            attend_rows, merge_splits, query, RowTable.of([rows]), integers(70), 1.0, 2
        )
        close(got[0], rows[0, :, 32:].mean(0).expand(2, 32), rtol=1e-5, atol=1e-5)
        close(lse[0, 0].item(), 32 * size + torch.tensor(70.0).log().item(), rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("heads_per_row", [1, 3])
@pytest.mark.parametrize("splits", [1, 3])
def test_far_parts_join(heads_per_row: int, splits: int) -> None:
    B, Hq, D = 2, 6, 40
    near, near_lse = random(B, Hq, 2, D), random(B, Hq, 2)
    shape = (B, Hq // heads_per_row, splits, heads_per_row)
    far, far_lse = random(*shape, D, seed=1), random(*shape, seed=2)
    far[0, 0, 0], far_lse[0, 0, 0] = 0.0, -torch.inf  # an empty part
    near[1, 0], near_lse[1, 0] = 0.0, -torch.inf
    got, want = poisoned(B, Hq, D), poisoned(B, Hq, D)
    merge_splits(near, near_lse, far, far_lse, got)
    merge_splits_reference(near, near_lse, far, far_lse, want)
    close(got, want, rtol=1e-5, atol=1e-5)


def test_nothing_anywhere_is_nothing() -> None:
    out = poisoned(1, 2, 16)
    empty, lse = torch.zeros(1, 2, 1, 16), torch.full((1, 2, 1), -torch.inf)
    empty, lse = empty.to(DEVICE), lse.to(DEVICE)
    merge_splits(empty, lse, empty.view(1, 2, 1, 1, 16), lse.view(1, 2, 1, 1), out)
    assert (out == 0).all()


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_two_results_of_a_prompt_merge(dtype: torch.dtype) -> None:
    H, T, D = 3, 70, 40
    got = random(T, H, D, dtype=dtype).transpose(0, 1)
    other = random(H, T, D, dtype=dtype, seed=1)
    lse, other_lse = random(H, T) * 20, random(H, T, seed=1) * 20
    lse[0, 0] = other_lse[0, 0] = -torch.inf
    other_lse[0, 1] = -torch.inf
    want, want_lse = got.clone(), lse.clone()
    merge_pair(got, lse, other, other_lse)
    merge_pair_reference(want, want_lse, other, other_lse)
    close(got, want, **tolerance(dtype))
    close(lse, want_lse, rtol=1e-5, atol=1e-5)

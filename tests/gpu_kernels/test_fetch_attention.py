from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from kernel_cases import COMPILED, DEVICE, HEADS, close, integers, poisoned, random, tolerance

from nearfar.gpu_kernels.fetch_attention import (
    attend_fetched,
    attend_fetched_reference,
    fetch_parts,
)
from nearfar.gpu_kernels.rows import RowTable
from nearfar.records import DrawnKeys
from nearfar.storage import encode

SIZE = 32  # keys of a segment
Pair = tuple[torch.Tensor, torch.Tensor]


def far_rows(length: int, Hkv: int, D: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows on the host, where a GPU can read them; unused ones are poison."""
    rows = torch.full((Hkv, length + 7, 2, D), 127 if dtype == torch.int8 else torch.nan)
    rows = rows.to(dtype)
    rows[:, :length] = encode(random(Hkv, length, 2, D, seed=length).cpu(), dtype)
    rows = rows.view(Hkv, length + 7, 2 * D)
    # heads start at multiples of 16
    wide = torch.zeros(Hkv, -(-rows[0].numel() // 16) * 16, dtype=dtype, pin_memory=COMPILED)
    wide[:, : rows[0].numel()] = rows.flatten(1)
    return wide.as_strided(rows.shape, (wide.shape[1], 2 * D, 1))


def drawn_keys(lengths: list[int], R: int, share: float, seed: int = 0) -> DrawnKeys:
    """A random list for the GPU in every segment, poison behind it."""
    generator = torch.Generator().manual_seed(seed)
    segments = max(1, -(-max(lengths) // SIZE))
    fetched = torch.full((R, segments, SIZE // 2), torch.iinfo(torch.int64).max)
    counts = torch.full((R, segments), 10**6, dtype=torch.int32)
    for r in range(R):
        length = lengths[r * len(lengths) // R]
        for s in range(-(-length // SIZE)):
            keys = torch.arange(s * SIZE, min(length, (s + 1) * SIZE))
            keys = keys[torch.rand(len(keys), generator=generator) < share][: SIZE // 2]
            bits = torch.rand(len(keys), generator=generator).view(torch.int32).long() << 32
            fetched[r, s, : len(keys)], counts[r, s] = bits | keys, len(keys)
    chosen = torch.empty(R, segments, SIZE, dtype=torch.int64, device=DEVICE)
    none = integers(*[0] * len(lengths))
    return DrawnKeys(chosen, none, fetched.to(DEVICE), counts.to(DEVICE), none, none)


def attend(
    function: Callable[..., None],
    query: torch.Tensor,
    rows: RowTable,
    Hkv: int,
    drawn: DrawnKeys,
    lengths: list[int],
    places: tuple[int, int],
) -> Pair:
    """The parts merged; places before the first of them must stay as they are."""
    first, S = places
    B, Hq, D = query.shape
    out, lse = poisoned(B, Hq, S, D), poisoned(B, Hq, S)
    function(query, rows, Hkv, drawn, integers(*lengths), D**-0.5, first, out, lse)
    assert out[:, :, :first].isnan().all()
    assert lse[:, :, :first].isnan().all()
    out, lse = out[:, :, first:], lse[:, :, first:]
    total = lse.logsumexp(-1)
    weights = torch.exp(lse - total.where(total.isfinite(), 0.0)[..., None])
    return (out * weights[..., None]).sum(2), total


def table_of(rows: list[torch.Tensor]) -> RowTable:
    table = RowTable.empty(len(rows), rows[0].dtype, DEVICE)
    table.point(rows)
    return table


def check(
    lengths: list[int],
    heads: tuple[int, int, int],
    dtype: torch.dtype,
    rows_per_sequence: int,
    places: tuple[int, int],
    share: float = 0.3,
) -> None:
    Hq, Hkv, D = heads
    near = torch.float32 if dtype == torch.int8 else dtype
    query = random(len(lengths), Hq, D, dtype=near)
    table = table_of([far_rows(n, Hkv, D, dtype) for n in lengths])
    drawn = drawn_keys(lengths, len(lengths) * rows_per_sequence, share)
    got = attend(attend_fetched, query, table, Hkv, drawn, lengths, places)
    want = attend(attend_fetched_reference, query, table, Hkv, drawn, lengths, places)
    for mine, theirs in zip(got, want, strict=True):
        close(mine, theirs, **tolerance(near))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int8], ids=str)
@pytest.mark.parametrize("heads", HEADS)
def test_a_ragged_batch_equals_the_reference(
    heads: tuple[int, int, int], dtype: torch.dtype
) -> None:
    check([150, 0, 1, 77], heads, dtype, heads[1], (1, 4))


@pytest.mark.parametrize("parts", [1, 2, 3, 9])
def test_rows_of_single_heads_and_any_number_of_parts(parts: int) -> None:
    check([150, 65], (6, 2, 40), torch.float16, 6, (2, 2 + parts))


@pytest.mark.parametrize("share", [0.0, 0.02, 1.0])
def test_none_few_and_as_many_as_there_is_room_for(share: float) -> None:
    check([SIZE * 5], (3, 1, 64), torch.float32, 1, (0, 2), share)


@pytest.mark.skipif(not COMPILED, reason="interpreted products of bfloat16 are wrong")
def test_bfloat16_and_int8_under_it() -> None:
    check([400, 31], (32, 8, 128), torch.bfloat16, 8, (1, 16))
    rows = [far_rows(300, 8, 128, torch.int8)]
    query = random(1, 32, 128, dtype=torch.bfloat16)
    drawn, sizes = drawn_keys([300], 8, 0.3), ([300], (1, 16))
    got = attend(attend_fetched, query, table_of(rows), 8, drawn, *sizes)
    want = attend(attend_fetched_reference, query, table_of(rows), 8, drawn, *sizes)
    close(got[0], want[0], rtol=3e-2, atol=3e-2)


def test_parts_fill_a_gpu_and_make_a_power_of_two_with_one_more() -> None:
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert [fetch_parts(rows, gpu) for rows in (1, 8, 16, 32, 100, 999)] == [127, 15, 7, 3, 1, 1]
    assert fetch_parts(8, cpu) == 1

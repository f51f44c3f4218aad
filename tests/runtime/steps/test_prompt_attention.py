from __future__ import annotations

from functools import cache, partial

import pytest
import torch

from nearfar.runtime.steps import prompt_attention
from nearfar.runtime.steps.prompt_attention import attend_chunk, attend_heads, column_sums

SCALE = 0.05
close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)
SHAPES = [(4, 4, 16), (6, 2, 33), (5, 1, 64), (1, 1, 7), (9, 3, 128)]
shapes = pytest.mark.parametrize(("heads", "kv_heads", "D"), SHAPES)
lengths = pytest.mark.parametrize(
    ("T", "N"), [(1, 1), (1, 50), (37, 37), (2, 3), (13, 50), (49, 50), (33, 700)]
)


def draw(heads: int, kv_heads: int, D: int, T: int, N: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(heads + D + T + N)
    q = 4 * torch.randn(heads, T, D, generator=generator)
    return (
        q,
        torch.randn(kv_heads, N, D, generator=generator),
        torch.randn(kv_heads, N, D, generator=generator),
    )


@cache
def drawn_reference(
    heads: int, kv_heads: int, D: int, T: int, N: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`reference` of what `draw` makes."""
    return reference(*draw(heads, kv_heads, D, T, N))


def reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [Hq, T, D] and attention [Hq, T, N], one query at a time, in float64."""
    group, past = len(q) // len(k), k.shape[1] - q.shape[1]
    attention = torch.zeros(len(q), q.shape[1], k.shape[1], dtype=torch.float64)
    for head in range(len(q)):
        for t in range(q.shape[1]):
            seen = k[head // group, : past + t + 1].double()
            attention[head, t, : past + t + 1] = (seen @ q[head, t].double() * SCALE).softmax(0)
    return attention @ v.double().repeat_interleave(group, 0), attention


@shapes
@lengths
def test_chunk_is_softmax_over_all_before_it(
    heads: int, kv_heads: int, D: int, T: int, N: int
) -> None:
    q, k, v = draw(heads, kv_heads, D, T, N)
    out, lse = attend_chunk(q, k, v, SCALE)
    wanted, attention = drawn_reference(heads, kv_heads, D, T, N)
    close(out, wanted.float())
    first_key = k[:, 0].double().repeat_interleave(heads // kv_heads, 0)
    logits = (q.double() @ first_key[..., None])[..., 0] * SCALE
    close(lse, (logits - attention[:, :, 0].log()).float())


@shapes
@lengths
def test_chunk_in_bfloat16(heads: int, kv_heads: int, D: int, T: int, N: int) -> None:
    q, k, v = (part.bfloat16() for part in draw(heads, kv_heads, D, T, N))
    out = attend_chunk(q, k, v, SCALE).out
    assert out.dtype == torch.bfloat16
    close(out.float(), reference(q, k, v)[0].float(), atol=0.02, rtol=0.02)


# every shape in whole tiles; cut into tiles, where a head's own size is of no account, two
@pytest.mark.parametrize(
    ("heads", "kv_heads", "D", "tile"),
    [
        *((*shape, (256, 1024)) for shape in SHAPES),
        *((*shape, tile) for shape in SHAPES[1:3] for tile in ((5, 7), (1, 64))),
    ],
)
@lengths
def test_column_sums_are_what_each_key_got(
    heads: int,
    kv_heads: int,
    D: int,
    T: int,
    N: int,
    tile: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From the log-sum-exp alone, tile by tile, and as exact as the eager attention matrix."""
    monkeypatch.setattr(prompt_attention, "SUMMED_QUERIES", tile[0])
    monkeypatch.setattr(prompt_attention, "SUMMED_KEYS", tile[1])
    q, k, v = draw(heads, kv_heads, D, T, N)
    received = column_sums(q, k, attend_chunk(q, k, v, SCALE).lse, SCALE)
    attention = drawn_reference(heads, kv_heads, D, T, N)[1]
    close(received, attention.sum(1).float())
    assert received.shape == (heads, N)
    assert received.sum().item() == pytest.approx(heads * T, rel=1e-5)


def test_column_sums_in_bfloat16() -> None:
    q, k, v = (part.bfloat16() for part in draw(6, 2, 33, 13, 50))
    received = column_sums(q, k, attend_chunk(q, k, v, SCALE).lse, SCALE)
    close(received, reference(q, k, v)[1].sum(1).float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_attend_to_rows_of_their_own(dtype: torch.dtype) -> None:
    q, k, v = (part.to(dtype) for part in draw(6, 2, 16, 5, 40))
    rows = torch.cat([k, v], -1)
    got = attend_heads(q, [rows[0, :1], rows[1, :33]], SCALE)
    close(got.out[:3], v[0, :1].expand(3, 5, 16))
    logits = q[3:].double() @ k[1, :33].double().T * SCALE
    close(got.lse[3:], logits.logsumexp(-1).float())
    bound = 0.02 if dtype == torch.bfloat16 else 1e-5
    wanted = (logits.softmax(-1) @ v[1, :33].double()).float()
    close(got.out[3:].float(), wanted, atol=bound, rtol=bound)


@pytest.mark.parametrize("T", [1, 20, 64])
def test_strided_inputs_are_read_as_they_are(T: int) -> None:
    """Queries and keys arrive as views: transposed projections and slices of a longer store."""
    q, k, v = draw(6, 2, 16, T, 64)
    views = (
        q.transpose(0, 1).contiguous().transpose(0, 1),
        torch.cat([k, k], 1)[:, :64],
        torch.cat([v, v], 2)[..., :16],
    )
    got, wanted = attend_chunk(*views, SCALE), attend_chunk(q, k, v, SCALE)
    close(got.out, wanted.out)
    sums = column_sums(views[0], views[1], got.lse, SCALE)
    close(sums, column_sums(q, k, wanted.lse, SCALE))


def test_logits_far_apart_stay_finite() -> None:
    q, k, v = draw(2, 1, 8, 5, 40)
    for part in (q, k):
        part *= 100
    wanted, attention = reference(q, k, v)
    got = attend_chunk(q, k, v, SCALE)
    close(got.out, wanted.float(), atol=1e-3)
    # logits of tens of thousands are 0.004 apart in float32
    close(column_sums(q, k, got.lse, SCALE), attention.sum(1).float(), atol=5e-3)

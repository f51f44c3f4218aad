from __future__ import annotations

from functools import partial

import pytest
import torch

from nearfar.runtime import prompt_attention
from nearfar.runtime.prompt_attention import attend_chunk, attend_chunk_scored

SCALE = 0.05
close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)
shapes = pytest.mark.parametrize(
    ("heads", "kv_heads", "D"), [(4, 4, 16), (6, 2, 33), (5, 1, 64), (1, 1, 7), (9, 3, 128)]
)
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
    close(attend_chunk(q, k, v, SCALE), reference(q, k, v)[0].float())


@shapes
@lengths
def test_chunk_in_bfloat16(heads: int, kv_heads: int, D: int, T: int, N: int) -> None:
    q, k, v = (part.bfloat16() for part in draw(heads, kv_heads, D, T, N))
    out = attend_chunk(q, k, v, SCALE)
    assert out.dtype == torch.bfloat16
    close(out.float(), reference(q, k, v)[0].float(), atol=0.02, rtol=0.02)


@shapes
@lengths
@pytest.mark.parametrize("step_bytes", [None, 1, 6_000])
def test_scored_chunk_also_says_what_each_key_got(
    heads: int,
    kv_heads: int,
    D: int,
    T: int,
    N: int,
    step_bytes: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if step_bytes is not None:  # the queries are taken in several steps
        monkeypatch.setattr(prompt_attention, "SCORED_BYTES", step_bytes)
    q, k, v = draw(heads, kv_heads, D, T, N)
    out, received = attend_chunk_scored(q, k, v, SCALE)
    wanted, attention = reference(q, k, v)
    close(out, wanted.float())
    close(received, attention.sum(1).float())
    assert received.shape == (heads, N)
    assert received.sum().item() == pytest.approx(heads * T, rel=1e-5)


def test_scored_chunk_in_bfloat16() -> None:
    q, k, v = (part.bfloat16() for part in draw(6, 2, 33, 13, 50))
    out, received = attend_chunk_scored(q, k, v, SCALE)
    wanted, attention = reference(q, k, v)
    assert out.dtype == torch.bfloat16
    close(out.float(), wanted.float(), atol=0.02, rtol=0.02)
    close(received, attention.sum(1).float())


@pytest.mark.parametrize("T", [1, 20, 64])
def test_strided_inputs_are_read_as_they_are(T: int) -> None:
    """Queries and keys arrive as views: transposed projections and slices of a longer store."""
    q, k, v = draw(6, 2, 16, T, 64)
    views = (
        q.transpose(0, 1).contiguous().transpose(0, 1),
        torch.cat([k, k], 1)[:, :64],
        torch.cat([v, v], 2)[..., :16],
    )
    close(attend_chunk(*views, SCALE), attend_chunk(q, k, v, SCALE))
    close(attend_chunk_scored(*views, SCALE)[1], attend_chunk_scored(q, k, v, SCALE)[1])


def test_logits_far_apart_stay_finite() -> None:
    q, k, v = draw(2, 1, 8, 5, 40)
    for part in (q, k):
        part *= 100
    wanted, attention = reference(q, k, v)
    close(attend_chunk(q, k, v, SCALE), wanted.float(), atol=1e-3)
    close(attend_chunk_scored(q, k, v, SCALE)[1], attention.sum(1).float(), atol=1e-3)

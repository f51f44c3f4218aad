"""What is gathered of a prompt's queries, in any chunks, against all of them at once."""

from __future__ import annotations

import pytest
import torch
from tiny_engine import tiny_config, tiny_engine

from nearfar.policies.base import LAST_QUERIES, PromptQueryStats
from nearfar.runtime.models.rope import rotate
from nearfar.runtime.steps.query_statistics import SKIPPED_QUERIES, QueryStatistics

PAST = 11


def draw(T: int) -> torch.Tensor:
    """Queries [T, Hq, D] before they are rotated."""
    return torch.randn(T, 6, 16, generator=torch.Generator().manual_seed(T)) + 0.5


def watched(T: int, chunk: int, layer: int = 0) -> PromptQueryStats:
    decoder = tiny_engine(tiny_config()).decoder
    watch = QueryStatistics(decoder, layer, PAST, T, ("last", "moments"))
    turned = rotate(draw(T), decoder.rotary(layer).angles(torch.arange(PAST, PAST + T)))
    for start in range(0, T, chunk):
        watch.see(turned[start : start + chunk], PAST + start)
    stats = watch.stats()
    assert stats is not None
    return stats


@pytest.mark.parametrize("chunk", [1000, 64, 3])
@pytest.mark.parametrize("T", [1, 4, 5, 100, 300])
def test_chunks_make_no_difference(T: int, chunk: int) -> None:
    stats = watched(T, chunk)
    assert stats.last is not None
    assert stats.moments is not None
    queries = draw(T).double() / 4  # scaled by D^-0.5
    used = queries[SKIPPED_QUERIES:] if T > SKIPPED_QUERIES else queries
    mean = used.mean(0)
    spread = used - mean
    covariance = torch.einsum("thi,thj->hij", spread, spread) / len(used)
    close = torch.testing.assert_close
    close(stats.moments.mean, mean.float(), rtol=1e-4, atol=1e-5)
    close(stats.moments.covariance, covariance.float(), rtol=1e-4, atol=1e-5)
    assert stats.last.shape == (6, min(T, LAST_QUERIES), 16)
    # rotation keeps lengths
    lengths = queries[-LAST_QUERIES:].norm(dim=-1).T.float()
    close(stats.last.norm(dim=-1), lengths, rtol=1e-4, atol=1e-5)


def test_nothing_wanted_is_nothing_told() -> None:
    watch = QueryStatistics(tiny_engine().decoder, 0, 0, 5, ())
    watch.see(draw(5), 0)
    assert watch.stats() is None
    assert not watch.needs_all_attention


def test_the_first_four_queries_do_not_count() -> None:
    """However large they are, and however few come in one chunk."""
    decoder = tiny_engine(tiny_config()).decoder
    queries = draw(9)
    larger = torch.cat([1000 * queries[:4], queries[4:]])
    seen = []
    for rows, chunk in ((queries, 9), (larger, 9), (larger, 3)):
        watch = QueryStatistics(decoder, 0, 0, 9, ["moments"])
        for start in range(0, 9, chunk):
            watch.see(rows[start : start + chunk], start)
        stats = watch.stats()
        assert stats is not None
        assert stats.moments is not None
        seen.append(stats.moments)
    for other in seen[1:]:
        torch.testing.assert_close(other.mean, seen[0].mean, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(other.covariance, seen[0].covariance, rtol=1e-5, atol=1e-6)

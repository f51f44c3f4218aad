"""LESS: what the state of dropped rows holds, and how a query reads it."""

from __future__ import annotations

import pytest
import torch
from less_reference import heavy_maps, heavy_state
from tiny_engine import DEVICE, decode, read, tiny_config, tiny_engine, tokens

from nearfar.policies.feature_maps import RANK, layer_maps, random_maps
from nearfar.records import Geometry
from nearfar.runtime.steps.attention import attend_near
from nearfar.runtime.steps.prefill import prefill

SPEC = "less:maps=random"
GEOMETRY = Geometry(2, 6, 2, 16)
close = torch.testing.assert_close


@pytest.mark.parametrize("lengths", [(1,), (5, 1, 7), (13,)])
def test_a_query_reads_dropped_rows_by_their_features(lengths: tuple[int, ...]) -> None:
    """The formula of the paper, row by row: however the rows came in."""
    generator = torch.Generator().manual_seed(5)
    n, T = sum(lengths), 3
    keys, values = torch.randn(2, GEOMETRY.kv_heads, n, GEOMETRY.head_dim, generator=generator)
    queries = torch.randn(GEOMETRY.query_heads, T, GEOMETRY.head_dim, generator=generator)
    state = heavy_state(GEOMETRY)
    start = 0
    for length in lengths:
        span = slice(start, start + length)
        state.fold(1, keys[:, span].to(DEVICE), values[:, span].to(DEVICE))
        start += length
    part = state.attend(1, queries.to(DEVICE))
    out, lse = part.out.cpu(), part.lse.cpu()
    maps = layer_maps(heavy_maps(GEOMETRY), 1)
    phi, psi = maps.of_queries(queries), maps.of_keys(keys)
    for head in range(GEOMETRY.query_heads):
        weights = phi[head] @ psi[head // GEOMETRY.group].T  # [T, n]
        close(lse[head], weights.sum(1).log() + maps.log_scale[head], rtol=1e-4, atol=1e-4)
        want = weights @ values[head // GEOMETRY.group] / weights.sum(1, keepdim=True)
        close(out[head], want, rtol=1e-4, atol=1e-4)


def test_the_state_holds_what_is_not_near() -> None:
    prompt = tokens(90)
    full = read(tiny_engine(policy="full"), prompt)
    sequence = read(tiny_engine(policy=SPEC, budget=20), prompt)
    assert sequence.evicted_summary is not None
    maps = random_maps(GEOMETRY, seed=0)
    state = sequence.evicted_summary.state()
    for layer in range(GEOMETRY.layers):
        psi = layer_maps(maps, layer).of_keys(full.near[layer].keys.cpu())
        for head, near in enumerate(sequence.layers[layer].positions):
            gone = sorted(set(range(90)) - set(near.tolist()))
            assert len(gone) == 90 - 28
            values = full.near[layer].values[head, gone].cpu()
            close(state["masses"][layer, head].cpu(), psi[head, gone].sum(0), rtol=1e-4, atol=1e-7)
            want = psi[head, gone].T @ values
            close(state["values"][layer, head].cpu(), want, rtol=1e-4, atol=1e-7)


def test_near_attention_is_of_kept_rows_and_state_together() -> None:
    """The sums of the paper, not their logarithms."""
    engine = tiny_engine(policy=SPEC, budget=20)
    sequence = read(engine, tokens(90))
    state, near = heavy_state(GEOMETRY), sequence.near[1]
    rows = torch.randn(2, 2, 40, 16, generator=torch.Generator().manual_seed(1))
    state.fold(1, *rows.to(DEVICE))
    sequence.evicted_summary = state
    query = torch.randn(6, 16, generator=torch.Generator().manual_seed(2))
    got = attend_near(1, query.to(DEVICE), sequence, engine.decoder).out.cpu()
    near_keys, near_values = near.keys.cpu(), near.values.cpu()
    maps = layer_maps(heavy_maps(GEOMETRY), 1)
    phi = maps.of_queries(query[:, None])[:, 0].double()
    psi = maps.of_keys(rows[0]).double()
    for head in range(6):
        kv = head // 3
        weights = (near_keys[kv].double() @ query[head].double()).exp()
        learned = psi[kv] @ phi[head] * maps.log_scale[head].double().exp()
        total = weights @ near_values[kv].double() + learned @ rows[1, kv].double()
        close(got[head].double(), total / (weights.sum() + learned.sum()), rtol=1e-4, atol=1e-5)


def test_a_prompt_of_one_token_is_a_decoded_token() -> None:
    engine = tiny_engine(policy=SPEC, budget=20)
    prompt, one = tokens(90), tokens(1, seed=4)
    stepped = decode(engine, read(engine, prompt), one)[0]
    sequence = read(engine, prompt)
    close(prefill(engine.decoder, sequence, one, 64), stepped, rtol=1e-4, atol=1e-4)


def test_bytes_do_not_grow() -> None:
    engine = tiny_engine(tiny_config(), policy=SPEC, budget=20)
    sequence = read(engine, tokens(90))
    assert sequence.evicted_summary is not None
    held = sequence.evicted_summary.num_bytes
    decode(engine, sequence, tokens(30, seed=1))
    assert sequence.evicted_summary.num_bytes == held == 4 * 2 * 2 * RANK * 17

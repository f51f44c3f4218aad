from __future__ import annotations

import re
from functools import partial
from typing import Any

import psutil
import pytest
import torch

from nearfar.errors import InvalidOptionError, OutOfMemoryError
from nearfar.records import Geometry
from nearfar.runtime.memory import far_store
from nearfar.runtime.memory.far_store import BLOCK_TOKENS, FarStore
from nearfar.runtime.memory.ledger import Ledger
from nearfar.storage import decode, encode

GEOMETRY = Geometry(layers=2, query_heads=6, kv_heads=3, head_dim=5)
equal = partial(torch.testing.assert_close, rtol=0, atol=0)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


def new_store(
    capacity: int = 1000, dtype: torch.dtype = torch.float32, ledger: Ledger | None = None
) -> FarStore:
    return FarStore(GEOMETRY, dtype, capacity, ledger or Ledger())


def tokens(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [3, count, 5]."""
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, 3, count, 5, generator=generator)
    return keys, values


@every_dtype
def test_what_is_appended_is_read(dtype: torch.dtype) -> None:
    store = new_store(dtype=dtype)
    keys, values = tokens(700)
    for start, stop in ((0, 1), (1, 256), (256, 257), (257, 257), (257, 700)):
        store.append(1, keys[:, start:stop], values[:, start:stop])
    view = store.view(1)
    assert view.rows.dtype == dtype
    assert view.rows.is_contiguous()
    equal(view.keys(), keys.to(dtype))
    equal(view.values(), values.to(dtype))
    equal(view.keys(3, 9), keys[:, 3:9].to(dtype))
    assert (store.length(0), store.length(1)) == (0, 700)
    assert store.view(0).length == 0


@pytest.mark.parametrize("given", [torch.bfloat16, torch.float16])
def test_half_precision_is_kept_to_the_bit(given: torch.dtype) -> None:
    keys, values = (part.to(given) for part in tokens(9))
    for dtype in (given, torch.float32):
        store = new_store(dtype=dtype)
        store.append(0, keys, values)
        equal(store.view(0).keys().to(given), keys)
        equal(store.view(0).values().to(given), values)


def test_float16_saturates() -> None:
    store = new_store(dtype=torch.float16)
    keys, values = tokens(1)
    keys[:, 0, 0], values[:, 0, 0] = 1e6, -1e30
    keys[:, 0, 1], values[:, 0, 1] = 65504.0, -torch.inf
    store.append(0, keys, values)
    assert store.view(0).keys()[0, 0, :2].tolist() == [65504.0, 65504.0]
    assert store.view(0).values()[0, 0, :2].tolist() == [-65504.0, -65504.0]


def test_int8_is_decoded_to_what_came(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(far_store, "ENCODE_TOKENS", 64)
    geometry = Geometry(layers=1, query_heads=4, kv_heads=2, head_dim=20)
    store = FarStore(geometry, torch.int8, 300, Ledger())
    keys, values = torch.randn(2, 2, 300, 20).bfloat16()
    values = values * 50
    for span in (slice(0, 7), slice(7, 300)):
        store.append(0, keys[:, span], values[:, span])
    assert store.token_bytes == 2 * 2 * 20
    equal(store.view(0).keys(), decode(encode(keys, torch.int8)))
    equal(store.view(0).values(), decode(encode(values, torch.int8)))
    assert (store.view(0).keys() - keys).abs().max() < 0.04 * keys.abs().max()
    with pytest.raises(InvalidOptionError, match="16 dimensions or more"):
        FarStore(Geometry(1, 4, 2, 15), torch.int8, 300, Ledger())


def test_rows_never_move() -> None:
    store = new_store(capacity=5000)
    keys, values = tokens(100)
    first = store.view(0)
    store.append(0, keys, values)
    for seed in range(40):
        store.append(0, *tokens(100, seed))
    assert store.view(0).rows.data_ptr() == first.rows.data_ptr()
    equal(first.rows[:, :100, :5], keys)
    assert first.length == 0


@every_dtype
def test_bytes_are_charged_in_blocks(dtype: torch.dtype) -> None:
    ledger = Ledger()
    store = new_store(dtype=dtype, ledger=ledger)
    assert store.token_bytes == 3 * 2 * 5 * dtype.itemsize
    blocks = 0
    for count, length in ((1, 1), (254, 255), (1, 256), (1, 257), (600, 857)):
        store.append(0, *tokens(count))
        blocks = -(-length // BLOCK_TOKENS)
        assert store.num_bytes == ledger.used_bytes == blocks * BLOCK_TOKENS * store.token_bytes
    store.append(1, *tokens(2))
    assert store.num_bytes == (blocks + 1) * BLOCK_TOKENS * store.token_bytes


def test_appending_past_the_reserve_is_refused() -> None:
    store = new_store(capacity=300)
    store.append(0, *tokens(512))  # the reserve is in whole blocks
    message = (
        "Far memory is reserved for 512 tokens a layer and token 514 came. Give a shorter text or "
        "generate fewer tokens."
    )
    with pytest.raises(OutOfMemoryError, match=f"^{re.escape(message)}$"):
        store.append(0, *tokens(2))
    assert store.length(0) == 512


def test_cap_stops_growth_and_changes_nothing() -> None:
    ledger = Ledger(100_000)  # three blocks of 30,720 bytes
    store = new_store(ledger=ledger)
    keys, values = tokens(2 * BLOCK_TOKENS)
    store.append(0, keys, values)
    store.append(1, *tokens(3))
    with pytest.raises(OutOfMemoryError, match=r"full: 120\.0 KiB needed, 97\.7 KiB"):
        store.append(1, *tokens(BLOCK_TOKENS))
    assert (store.length(0), store.length(1)) == (2 * BLOCK_TOKENS, 3)
    assert store.num_bytes == ledger.used_bytes == 3 * 30_720
    equal(store.view(0).keys(), keys)
    store.append(1, *tokens(BLOCK_TOKENS - 3))


def test_stores_share_a_cap() -> None:
    ledger = Ledger(100_000)
    first, second = new_store(ledger=ledger), new_store(ledger=ledger)
    first.append(0, *tokens(600))
    with pytest.raises(OutOfMemoryError):
        second.append(0, *tokens(1))
    first.close()
    second.append(0, *tokens(600))


def test_rewinding_then_appending_writes_over() -> None:
    store = new_store()
    keys, values = tokens(300)
    store.append(0, keys, values)
    store.append(1, keys[:, :5], values[:, :5])
    mark = store.mark()
    store.append(0, *tokens(400, seed=1))
    store.append(1, *tokens(400, seed=2))
    held = store.num_bytes
    store.rewind(mark)
    assert (store.length(0), store.length(1)) == (300, 5)
    assert store.num_bytes == held
    more_keys, more_values = tokens(401, seed=3)
    store.append(1, more_keys, more_values)
    assert store.num_bytes == held
    equal(store.view(1).keys(), torch.cat([keys[:, :5], more_keys], 1))
    equal(store.view(0).values(), values)


def test_store_without_capacity_takes_nothing() -> None:
    ledger = Ledger(0)
    store = new_store(capacity=0, ledger=ledger)
    assert store.num_bytes == store.length(0) == store.view(0).length == 0
    assert store.view(0).keys().shape == (3, 0, 5)
    with pytest.raises(OutOfMemoryError, match="reserved for 0 tokens a layer and token 1 came"):
        store.append(0, *tokens(1))
    store.close()


def test_closing_gives_back_once_and_views_stay() -> None:
    ledger = Ledger()
    store, other = new_store(ledger=ledger), new_store(ledger=ledger)
    keys, values = tokens(300)
    store.append(0, keys, values)
    other.append(0, keys, values)
    view = store.view(0)
    store.close()
    store.close()
    assert store.num_bytes == 0
    assert ledger.used_bytes == other.num_bytes > 0
    equal(view.keys(), keys)


def test_reserving_costs_nothing_until_it_is_touched() -> None:
    before = psutil.Process().memory_info().rss
    store = new_store(capacity=2**26)
    store.append(0, *tokens(1))
    assert store.token_bytes * store.capacity_tokens == 30 * 2**28
    assert psutil.Process().memory_info().rss - before < 32 * 2**20


def test_refused_reservation_is_put_into_words(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr("nearfar.runtime.memory.host_memory.mmap.mmap", refuse)
    message = (
        "The system refused to reserve 122880 bytes of address space for far memory ([Errno 12] "
        "Cannot allocate memory). Raise the limit (ulimit -v) or give a shorter text."
    )
    with pytest.raises(OutOfMemoryError, match=f"^{re.escape(message)}$"):
        new_store()

"""Rows of a file as far memory: mapped where they are wanted, looked at once, grown behind."""

from __future__ import annotations

import mmap
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pretend_cuda import PAGE, pretend_cuda

from nearfar.errors import DamagedDocumentError, OutOfMemoryError
from nearfar.records import ALL, NONE, Geometry, Selection
from nearfar.runtime.memory.far_store import BLOCK_TOKENS, FarStore
from nearfar.runtime.memory.ledger import Ledger
from nearfar.runtime.saved.container import open_container
from nearfar.runtime.saved.layout import Section
from nearfar.runtime.saved.rows import MappedRows
from nearfar.runtime.saved.writing import Content, write_container

equal = partial(torch.testing.assert_close, rtol=0, atol=0)
GEOMETRY = Geometry(layers=2, query_heads=6, kv_heads=3, head_dim=5)  # a row has 40 bytes
TOKENS = 700


def rows_of(layer: int, tokens: int = TOKENS) -> torch.Tensor:
    generator = torch.Generator().manual_seed(layer)
    return torch.randn(3, tokens, 10, generator=generator)


def written(path: Path, tokens: int = TOKENS) -> list[str]:
    names, contents = ["rows.0", "rows.1"], []
    for layer, name in enumerate(names):
        heads = rows_of(layer, tokens).view(torch.uint8).numpy()
        section = Section(name, "uint8", heads.shape, 3, BLOCK_TOKENS * 40)
        contents.append(Content(section, partial(iter, heads)))
    write_container(path, {}, contents)
    return names


def opened(path: Path, names: list[str], capacity: int = 5000) -> FarStore:
    saved = MappedRows(open_container(path), names, 40)
    return FarStore(GEOMETRY, torch.float32, capacity, Ledger(), saved)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    written(tmp_path / "a")
    return tmp_path / "a"


def store(path: Path) -> FarStore:
    return opened(path, ["rows.0", "rows.1"])


def damaged_at(path: Path, layer: int, head: int, token: int) -> Path:
    place = open_container(path).place(f"rows.{layer}")
    data = bytearray(path.read_bytes())
    data[place.offset + head * place.stride + token * 40 + 7] ^= 2
    other = path.with_name("damaged")
    other.write_bytes(data)
    return other


def test_rows_are_those_of_the_file_and_contiguous(path: Path) -> None:
    far = store(path)
    for layer in range(2):
        view = far.view(layer)
        assert (view.length, view.rows.is_contiguous()) == (TOKENS, True)
        equal(view.rows[:, :TOKENS], rows_of(layer))
    assert far.num_bytes == far.mapped_bytes == 2 * 3 * BLOCK_TOKENS * 3 * 40
    assert far._account.num_bytes == 0


def test_tokens_come_behind_and_the_file_stays_as_it_is(path: Path) -> None:
    before, far, other = path.read_bytes(), store(path), store(path)
    mark = far.mark()
    more = rows_of(9, 600)
    far.append(1, more[..., :5], more[..., 5:])
    equal(far.view(1).rows[:, : TOKENS + 600], torch.cat([rows_of(1), more], 1))
    equal(other.view(1).rows[:, :TOKENS], rows_of(1))
    # 68 tokens find room in the last block of the file's
    assert far._account.num_bytes == 3 * BLOCK_TOKENS * 3 * 40
    assert far.num_bytes - far.mapped_bytes == far._account.num_bytes
    far.rewind(mark)
    again = rows_of(8, 3)
    far.append_stored(1, again)
    equal(far.view(1).rows[:, : TOKENS + 3], torch.cat([rows_of(1), again], 1))
    assert path.read_bytes() == before
    far.close()
    assert far._account.num_bytes == far.num_bytes == 0


def test_a_file_whose_name_another_took_stays_readable(path: Path) -> None:
    far = store(path)
    written(path, 300)
    equal(far.view(0).rows[:, :TOKENS], rows_of(0))
    assert store(path).length(0) == 300


@pytest.mark.parametrize("tokens", [0, 1, 255, 256, 257])
def test_any_number_of_tokens(tmp_path: Path, tokens: int) -> None:
    far = opened(tmp_path / "a", written(tmp_path / "a", tokens), capacity=1000)
    far.verify_all()
    equal(far.view(1).rows[:, :tokens], rows_of(1, tokens))
    far.append_stored(1, rows_of(3, 9))
    equal(far.view(1).rows[:, tokens : tokens + 9], rows_of(3, 9))


def test_where_pages_are_larger_rows_are_read_into_place(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["rows.0", "rows.1"]
    saved = MappedRows(open_container(path), names, 40)
    monkeypatch.setattr("nearfar.runtime.saved.rows.mmap.PAGESIZE", 2**16)
    far = FarStore(GEOMETRY, torch.float32, 5000, Ledger(), saved)
    equal(far.view(1).rows[:, :TOKENS], rows_of(1))
    far.verify_all()


def selection(per_row: list[list[int]], heads_per_row: int) -> Selection:
    offsets = np.cumsum([0, *map(len, per_row)])
    indices = np.concatenate([np.array(row, np.int32) for row in per_row])
    return Selection(indices, offsets, np.zeros(len(indices), np.float32), heads_per_row)


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        (ALL, True),
        (NONE, False),
        (selection([[], [300], []], 2), True),
        (selection([[], [511], []], 2), True),
        (selection([[300], [255, 512], [300]], 2), False),
        (selection([[], [], [256], [], [], []], 1), True),
        (selection([[], [], [], [256], [], []], 1), True),
        (selection([[256], [256], [], [], [256], [256]], 1), False),
        (selection([[], [], []], 2), False),
        (selection([[], [TOKENS + 5], []], 2), False),  # not of the file
    ],
)
def test_a_damaged_block_is_found_by_what_reads_it(path: Path, asked: Any, found: bool) -> None:
    far = store(damaged_at(path, layer=1, head=1, token=400))
    far.verify(0, ALL)
    for _ in range(2):
        if found:
            with pytest.raises(DamagedDocumentError, match=r"section 'rows\.1' differs at byte"):
                far.verify(1, asked)
        else:
            far.verify(1, asked)


def test_a_block_is_looked_at_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[tuple[int, int, int]] = []
    real = MappedRows._is_whole

    def look(self: MappedRows, *where: int) -> bool:
        looked.append(where)  # type: ignore[arg-type]
        return real(self, *where)

    monkeypatch.setattr(MappedRows, "_is_whole", look)
    far = store(path)
    far.verify(0, selection([[1, 2, 300], [699], []], 2))
    assert sorted(looked) == [(0, 0, 0), (0, 0, 1), (0, 1, 2)]
    far.verify(0, ALL)
    far.verify(0, ALL)
    assert len(looked) == len(set(looked)) == 9


def test_a_refused_mapping_is_put_into_words(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = MappedRows(open_container(path), ["rows.0", "rows.1"], 40)
    saved._container.close()
    with path.open("wb") as other:  # a descriptor that cannot be read from
        monkeypatch.setattr(saved._container, "file", other)
        with pytest.raises(OutOfMemoryError, match=r"a cannot be mapped into memory \(Permission"):
            FarStore(GEOMETRY, torch.float32, 5000, Ledger(), saved)


def test_rows_take_no_memory_of_their_own(path: Path) -> None:
    """What is mapped is the page cache's, so a second store of a file adds nothing."""
    far = store(path)
    address = far.view(0).rows.data_ptr()
    maps = [line for line in Path("/proc/self/smaps").read_text().split("\n") if str(path) in line]
    assert any(int(line.split("-")[0], 16) == address for line in maps)
    assert address % mmap.PAGESIZE == 0


def test_a_gpu_gets_rows_of_a_file_without_registering_them(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pages of a file are copied by way of other memory; what comes behind them is registered."""
    cuda, before, far = pretend_cuda(monkeypatch), path.read_bytes(), store(path)
    copies, more = far._copies_from(torch.device("cpu")), rows_of(9, 1500)
    for start, stop in ((0, 900), (900, 903), (903, 1500)):
        target = far._room(1, stop - start)
        copies.announce(target)
        copies.copy(target, more[:, start:stop])
        copies.settle()
        far._lengths[1] += stop - start
        back = torch.full((3, TOKENS + stop, 10), torch.nan)
        copies.bring(back, far.view(1).rows[:, : TOKENS + stop])
        equal(back, torch.cat([rows_of(1), more[:, :stop]], 1))
    base, head_bytes = far.view(1).rows.data_ptr(), far.capacity_tokens * 40
    whole_pages = TOKENS * 40 // PAGE * PAGE  # in the last page of the file come others behind
    assert cuda.spans
    assert all((start - base) % head_bytes >= whole_pages for start in cuda.spans)
    far.close()
    assert not cuda.spans
    assert path.read_bytes() == before


def test_any_other_bytes_are_noticed(path: Path) -> None:
    """Whether their checksum is larger than that of the right ones or smaller."""
    place, data = open_container(path).place("rows.0"), bytearray(path.read_bytes())
    other = path.with_name("damaged")
    for bit in range(24):
        changed = bytearray(data)
        changed[place.offset + 300 * 40 + bit // 8] ^= 1 << bit % 8
        other.unlink(missing_ok=True)
        other.write_bytes(changed)
        with pytest.raises(DamagedDocumentError, match=r"section 'rows\.0' differs at byte"):
            store(other).verify(0, ALL)


def test_copied_rows_are_those_of_the_file_and_checked(path: Path) -> None:
    saved = MappedRows(open_container(path), ["rows.0", "rows.1"], 40)
    for layer in range(2):
        equal(saved.copied(layer).view(torch.float32), rows_of(layer))
    other = damaged_at(path, layer=1, head=1, token=400)
    saved = MappedRows(open_container(other), ["rows.0", "rows.1"], 40)
    equal(saved.copied(0).view(torch.float32), rows_of(0))
    with pytest.raises(DamagedDocumentError, match=r"section 'rows\.1' differs at byte"):
        saved.copied(1)

"""The container: what is written is read, and whatever is wrong with a file has its own words."""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nearfar.errors import DamagedDocumentError, SavedDocumentError
from nearfar.runtime.saved.container import (
    CONVERSATION,
    Container,
    head_digest,
    is_container,
    open_container,
)
from nearfar.runtime.saved.layout import (
    HEADER_AT,
    MAX_HEADER_BYTES,
    PRELUDE,
    Layout,
    Section,
    parse_section,
)
from nearfar.runtime.saved.writing import Content, write_container

HEADS = np.arange(3 * 5000, dtype=np.uint8).reshape(3, 5000)
NUMBERS = np.arange(7, dtype=np.int64)
HALVES = np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4)
ABOUT = {"kind": "test", "text": "grüße"}


def written(path: Path) -> Path:
    heads = Section("heads", "uint8", HEADS.shape, 3, 1000)
    contents = [
        Content(Section("numbers", "int64", (7,)), lambda: [NUMBERS]),
        Content(heads, lambda: iter(HEADS)),
        Content(Section("halves", "float32", (3, 4)), lambda: [HALVES]),
        Content(Section("nothing", "int32", (0, 9)), lambda: [np.zeros((0, 9), np.int32)]),
    ]
    write_container(path, ABOUT, contents)
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return written(tmp_path / "a file")


def words(path: Path) -> str:
    """What opening and checking all of ``path`` says."""
    with pytest.raises(SavedDocumentError) as caught:
        open_container(path).check()
    return str(caught.value)


def test_what_is_written_is_read(path: Path) -> None:
    container = open_container(path)
    container.close()
    assert container.about == ABOUT
    assert (container.array("numbers", "int64", (7,)) == NUMBERS).all()
    assert (container.array("halves") == HALVES).all()
    assert container.array("nothing", "int32", (0, None)).shape == (0, 9)
    place = container.place("heads")
    for part in range(3):
        assert (container.part_bytes(place, part) == HEADS[part]).all()
    seen: list[tuple[int, int]] = []
    container.check(progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (5, 5)
    assert is_container(path)


def test_parts_lie_at_pages_and_the_rest_is_zero(path: Path) -> None:
    container, data = open_container(path), bytearray(path.read_bytes())
    for place in container.layout.places.values():
        for part in range(place.section.parts):
            start = place.offset + part * place.stride
            assert start % 4096 == 0
            data[start : start + place.section.part_bytes] = bytes(place.section.part_bytes)
    body = HEADER_AT + container.layout.header_bytes + 4 * container.layout.sum_count
    assert not any(data[body:])
    assert len(data) == container.layout.file_bytes


def test_writing_to_what_is_mapped_stays_here(path: Path) -> None:
    numbers = open_container(path).array("numbers")
    numbers[:] = 0
    assert (open_container(path).array("numbers") == NUMBERS).all()


@pytest.mark.parametrize(
    ("name", "dtype", "shape"),
    [
        ("numbers", "int32", (7,)),
        ("numbers", "int64", (8,)),
        ("numbers", "int64", (7, None)),
        ("heads", "uint8", (3, 5000)),
    ],
)
def test_an_array_must_have_its_type_and_shape(
    path: Path, name: str, dtype: str, shape: tuple[int | None, ...]
) -> None:
    with pytest.raises(DamagedDocumentError, match=f"section '{name}' is (int64|uint8) "):
        open_container(path).array(name, dtype, shape)


def test_a_section_that_is_not_there(path: Path) -> None:
    container = open_container(path)
    assert container.has("heads")
    assert not container.has("tails")
    with pytest.raises(DamagedDocumentError, match=r"damaged: it has no section 'tails'\. Make it"):
        container.array("tails")


def test_every_byte_counts(path: Path) -> None:
    """A flipped bit anywhere but in the zeros between sections is found and put into words."""
    data, layout = path.read_bytes(), open_container(path).layout
    rng = np.random.default_rng(0)
    spans = [(0, HEADER_AT + layout.header_bytes + 4 * layout.sum_count)]
    for place in layout.places.values():
        starts = [place.offset + part * place.stride for part in range(place.section.parts)]
        spans += [(start, start + place.section.part_bytes) for start in starts]
    for start, stop in spans:
        for at in rng.integers(start, max(stop, start + 1), 40) if stop > start else []:
            if 60 <= at < HEADER_AT:
                continue  # bytes that are not used
            damaged = bytearray(data)
            damaged[at] ^= 1 << int(rng.integers(8))
            other = path.with_name("other")
            other.unlink(missing_ok=True)
            other.write_bytes(damaged)
            assert words(other).startswith(str(other)), at


def test_a_damaged_block_is_named(path: Path) -> None:
    container = open_container(path)
    at = container.place("heads").offset + container.place("heads").stride + 2100
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.unlink()
    path.write_bytes(data)
    assert words(path) == (
        f"{path} is damaged: section 'heads' differs at byte {at - 100:,}. Make it again with: "
        "nearfar index"
    )
    damaged = open_container(path)
    assert (damaged.array("numbers") == NUMBERS).all()


@pytest.mark.parametrize("size", [0, 3, 8, 40, 63, 64, 100, 4096, -1])
def test_a_file_that_is_cut(path: Path, size: int) -> None:
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data[:size])
    said = words(path)
    whole = f"it has {len(data) + size if size < 0 else size:,} bytes where {len(data):,} were"
    assert ("not a saved document" in said) == (0 <= size < 8)
    assert (f"it ends after {size} bytes" in said) == (8 <= size < 64)
    assert (whole in said) == (size >= 64 or size < 0)


def test_a_file_that_goes_on(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")
    assert "bytes where" in words(path)


def test_what_is_no_file(tmp_path: Path) -> None:
    missing = tmp_path / "no.nearfar"
    make = "Make one with: nearfar index DOCUMENT -o FILE"
    assert words(missing) == f"{missing} does not exist. {make}"
    assert words(tmp_path) == f"{tmp_path} is a folder, not a saved document. {make}"
    text = tmp_path / "a.txt"
    text.write_text("hello " * 100)
    assert words(text) == (
        f"{text} is not a saved document: it does not begin as one does. Make one with: nearfar "
        "index DOCUMENT -o FILE"
    )
    assert not is_container(text)
    assert not is_container(missing)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_that_may_not_be_read(path: Path) -> None:
    path.chmod(0)
    assert words(path) == f"{path} cannot be read: Permission denied."


def test_another_version(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[8:12] = struct.pack("<I", 9)
    path.unlink()
    path.write_bytes(data)
    assert words(path) == (
        f"{path} has format version 9; this nearfar reads version 1. Make it again with: nearfar "
        "index, or use the nearfar that wrote it."
    )


def test_sizes_in_the_head_are_compared_before_they_are_used(path: Path) -> None:
    data = path.read_bytes()
    magic, version, header, size, sums, digest = PRELUDE.unpack_from(data)
    for changed in (
        (MAX_HEADER_BYTES + 1, size, sums),
        (2**32 - 1, size, sums),
        (header, size, 2**32 - 1),
        (size, size, sums),
    ):
        other = path.with_name("other")
        other.unlink(missing_ok=True)
        other.write_bytes(PRELUDE.pack(magic, version, *changed, digest) + data[PRELUDE.size :])
        assert "its header has an impossible size" in words(other)


@pytest.mark.parametrize(
    "change",
    [
        {"name": 1},
        {"dtype": "object"},
        {"shape": [-1]},
        {"shape": [2**60]},
        {"shape": [1.0]},
        {"shape": [True]},
        {"shape": [1] * 9},
        {"shape": 7},
        {"parts": 0},
        {"parts": 0, "shape": [0, 7]},
        {"parts": 2},
        {"parts": 2**12 + 1, "shape": [2**12 + 1, 1]},
        {"parts": 2**40, "shape": [2**40, 0]},
        {"block": 0},
        {"block": -1},
        {"more": 1},
    ],
)
def test_sections_that_cannot_be(change: dict[str, Any]) -> None:
    whole = Section("a", "uint8", (7,)).as_json()
    assert parse_section(json.loads(json.dumps(whole))) == Section("a", "uint8", (7,))
    with pytest.raises(ValueError, match="section"):
        parse_section(whole | change)


def test_two_sections_of_one_name_are_refused(tmp_path: Path) -> None:
    twice = [Content(Section("a", "int64", (7,)), lambda: [NUMBERS])] * 2
    write_container(tmp_path / "a", {}, twice)
    assert "its sections do not make up the file" in words(tmp_path / "a")


def test_places_follow_from_sizes() -> None:
    sections = [Section("a", "uint16", (3, 5), 3, 4), Section("b", "int64", (513,))]
    layout = Layout(sections, 100, align=512)
    assert layout.sum_count == 3 * 3 + 1
    assert (layout.places["a"].offset, layout.places["a"].stride) == (512, 512)
    assert (layout.places["b"].offset, layout.places["b"].first_sum) == (2048, 9)
    assert layout.file_bytes == 2048 + 513 * 8


def test_a_header_that_is_too_long_is_not_written(tmp_path: Path) -> None:
    about = {"text": "x" * MAX_HEADER_BYTES}
    message = re.escape("its header would have 4,194,")
    with pytest.raises(SavedDocumentError, match=message):
        write_container(tmp_path / "a", about, [])
    assert os.listdir(tmp_path) == []


def test_a_file_that_cannot_be_mapped(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(19, "No such device")

    monkeypatch.setattr("nearfar.runtime.saved.container.mmap.mmap", refuse)
    said = (
        f"{path} cannot be mapped into memory ([Errno 19] No such device). Copy it to a local disk."
    )
    assert words(path) == said


def test_arrays_outlive_the_container(path: Path) -> None:
    def numbers(container: Container) -> np.ndarray[Any, Any]:
        container.close()
        return container.array("numbers")

    assert (numbers(open_container(path)) == NUMBERS).all()


@pytest.mark.parametrize("block", [0, 63, 64, 127, 128])
def test_every_block_of_a_long_section_is_checked(tmp_path: Path, block: int) -> None:
    """Threads check 64 blocks at a time; this section has two such parts and one more."""
    whole, path = np.arange(129 * 16, dtype=np.uint8), tmp_path / "long"
    section = Section("long", "uint8", whole.shape, 1, 16)
    write_container(path, ABOUT, [Content(section, lambda: [whole])])
    at = open_container(path).place("long").offset + block * 16
    data = bytearray(path.read_bytes())
    data[at + 15] ^= 1
    path.unlink()
    path.write_bytes(data)
    assert f"section 'long' differs at byte {at:,}. " in words(path)


def with_header(path: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """The same file with a changed header, of as many bytes, under a digest that fits."""
    data = path.read_bytes()
    _, _, size, _, sum_bytes, _ = PRELUDE.unpack_from(data)
    value = json.loads(data[HEADER_AT : HEADER_AT + size])
    change(value)
    header = json.dumps(value, separators=(",", ":")).encode().ljust(size)
    sums = data[HEADER_AT + size : HEADER_AT + size + sum_bytes]
    start = data[:28] + head_digest(data[:28], header, sums)
    path.unlink()
    path.write_bytes(start.ljust(HEADER_AT, b"\0") + header + data[HEADER_AT + size :])
    return path


@pytest.mark.parametrize("align", [0, -4096, 2**24 + 1, 4096.0, "4096", True, None])
def test_parts_lie_at_multiples_of_a_whole_number(path: Path, align: object) -> None:
    said = words(with_header(path, lambda header: header.update(align=align)))
    assert "its header is not valid (the header is not described as it should be)" in said


def test_what_is_about_the_file_has_names(path: Path) -> None:
    said = words(with_header(path, lambda header: header.update(about=[])))
    assert "its header is not valid (the header is not described as it should be)" in said


def test_sections_of_another_size_than_the_file_are_refused(path: Path) -> None:
    said = words(with_header(path, lambda header: header["sections"][1].update(shape=[3, 900])))
    assert "its header is not valid (its sections do not make up the file)" in said


def test_a_section_of_one_byte_is_read(tmp_path: Path) -> None:
    one = np.array([7], np.uint8)
    write_container(tmp_path / "a", {}, [Content(Section("one", "uint8", (1,)), lambda: [one])])
    assert open_container(tmp_path / "a").array("one").tolist() == [7]


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (MemoryError(), "cannot be read: there is no memory for it."),
        (OSError(5, "Input/output error"), "cannot be read: Input/output error."),
        (DamagedDocumentError("It is damaged."), ""),
    ],
)
def test_a_file_that_is_refused_is_closed(
    path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, text: str
) -> None:
    files = []

    def refuse(_: Path, file: Any, kind: object) -> None:
        files.append(file)
        assert kind is CONVERSATION
        raise error

    monkeypatch.setattr("nearfar.runtime.saved.container._read_head", refuse)
    with pytest.raises(
        SavedDocumentError, match=f"^{re.escape(f'{path} {text}' if text else 'It')}"
    ):
        open_container(path, CONVERSATION)
    assert files[0].closed


def test_damage_is_told_in_the_words_of_its_kind(path: Path) -> None:
    assert str(open_container(path, CONVERSATION).damaged("it is odd")) == (
        f"{path} is damaged: it is odd. Name another file to begin a new conversation"
    )

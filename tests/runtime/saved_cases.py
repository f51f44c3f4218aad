"""A tiny model with a tokenizer, documents of it, and ways to damage their files."""

from __future__ import annotations

import json
import math
import random
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from tiny_folder import make_folder, text_of

from nearfar.config import EngineConfig, SamplingConfig
from nearfar.records import Geometry
from nearfar.runtime.engine.engine import Engine
from nearfar.runtime.saved.container import head_digest
from nearfar.runtime.saved.facts import Facts
from nearfar.runtime.saved.layout import HEADER_AT, MAGIC, PRELUDE, Layout, parse_section

TEXT = text_of(420, seed=9)
QUESTION = "what did the cat do?"
NINE = SamplingConfig(max_new_tokens=9)
# of commands on the model of `tiny_engine`
HOW = ("--device", "cpu", "--dtype", "float32", "--threads", "1", "--window", "8", "--budget", "16")
SETTINGS = EngineConfig(
    dtype="float32", far_dtype="float32", device="cpu", threads=1, window=8, budget=16
)
FACTS = Facts(
    model="tiny",
    model_identity="1",
    tokenizer_identity="2",
    text_sha256="0" * 64,
    geometry=Geometry(layers=1, query_heads=2, kv_heads=1, head_dim=4),
    tokens=70,
    near_dtype="float32",
    row_format="float32",
    sinks=4,
    window=8,
    rest="",
    read_seconds=0.5,
)


def tiny_engine(folder: Path, **changes: Any) -> Engine:
    """An engine with the model in ``folder``, which is made if it is not there."""
    if not (folder / "config.json").exists():
        make_folder(folder, context=3000)
    # nothing ends an answer before its length, so that there is much to compare
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        path = folder / name
        values = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(values | {"eos_token_id": None, "eos_token": None}))
    return Engine.from_pretrained(str(folder), SETTINGS.replace(**changes))


class SavedBytes:
    """The bytes of a saved file, taken apart so that they can be changed and made to look whole."""

    def __init__(self, data: bytes) -> None:
        _, self.version, header_bytes, _, sum_bytes, _ = PRELUDE.unpack_from(data)
        self.header = json.loads(data[HEADER_AT : HEADER_AT + header_bytes])
        sections = [parse_section(value) for value in self.header["sections"]]
        self.layout = Layout(sections, header_bytes, self.header["align"])
        self.data = bytearray(data)
        self.body_at = HEADER_AT + header_bytes + sum_bytes

    def section(self, name: str) -> slice:
        """Where the first part of a section is."""
        place = self.layout.places[name]
        return slice(place.offset, place.offset + place.section.part_bytes)

    def set(self, name: str, array: np.ndarray[Any, Any]) -> None:
        """Write over a section of one part."""
        span = self.section(name)
        assert array.nbytes == span.stop - span.start
        self.data[span] = array.tobytes()

    def repaired(self) -> bytes:
        """The file with checksums of what is in it now, as its author would have written them."""
        sums = []
        for place in self.layout.places.values():
            section = place.section
            for part in range(section.parts):
                start = place.offset + part * place.stride
                data = self.data[start : start + section.part_bytes]
                size = section.block_bytes
                sums += [zlib.crc32(data[i : i + size]) for i in range(0, len(data), size)]
        return self._with_head(json.dumps(self.header).encode(), np.array(sums, "<u4").tobytes())

    def with_header(self, header: object) -> bytes:
        """The file with another header and a digest that fits it, its places moved along."""
        try:
            sections = [parse_section(value) for value in header["sections"]]  # type: ignore[index]
            encoded = json.dumps(header).encode()
            layout = Layout(sections, len(encoded), header["align"])  # type: ignore[index]
            assert layout.file_bytes < 2**24
        except Exception:
            return self._with_head(json.dumps(header).encode(), b"")
        moved = SavedBytes.__new__(SavedBytes)
        moved.version, moved.header, moved.layout = self.version, header, layout
        moved.body_at = HEADER_AT + len(encoded) + 4 * layout.sum_count
        moved.data = bytearray(layout.file_bytes)
        for name, place in layout.places.items():
            if name not in self.layout.places:
                continue
            old = self.layout.places[name]
            for part in range(min(old.section.parts, place.section.parts)):
                source = old.offset + part * old.stride
                size = min(old.section.part_bytes, place.section.part_bytes)
                target = place.offset + part * place.stride
                moved.data[target : target + size] = self.data[source : source + size]
        return moved.repaired()

    def _with_head(self, header: bytes, sums: bytes) -> bytes:
        body = bytes(self.data[self.body_at :])
        sizes = (len(header), HEADER_AT + len(header) + len(sums) + len(body), len(sums))
        start = PRELUDE.pack(MAGIC, self.version, *sizes, b"")
        digest = head_digest(start, header, sums)
        prelude = PRELUDE.pack(MAGIC, self.version, *sizes, digest)
        return prelude.ljust(HEADER_AT, b"\0") + header + sums + body


STRANGE = [
    -1,
    0,
    1,
    2**31,
    2**63,
    10**400,
    0.5,
    math.nan,
    math.inf,
    "",
    "x" * 999,
    "\ud800",
    None,
    True,
    [],
    {},
    [[]],
    {"name": 1},
]


def random_damage(data: bytes, rng: random.Random) -> bytes:
    """What a disk, a network or a hurried copy does to a file."""
    kind = rng.choice(["bits", "bits", "range", "cut", "grow", "swap", "zero"])
    damaged = bytearray(data)
    if kind == "bits":
        for _ in range(rng.choice([1, 1, 2, 16])):
            at = rng.randrange(len(data)) if rng.random() < 0.5 else rng.randrange(4096)
            damaged[at] ^= 1 << rng.randrange(8)
    elif kind in ("range", "zero"):
        start = rng.randrange(len(data))
        size = min(rng.choice([1, 8, 4096, 2**16]), len(data) - start)
        damaged[start : start + size] = rng.randbytes(size) if kind == "range" else bytes(size)
    elif kind == "cut":
        del damaged[rng.randrange(len(data)) :]
    elif kind == "grow":
        damaged += rng.randbytes(rng.choice([1, 4096]))
    else:
        first, second = sorted(rng.sample(range(0, len(data) - 4096, 4096), 2))
        page = slice(first, first + 4096), slice(second, second + 4096)
        damaged[page[0]], damaged[page[1]] = damaged[page[1]], damaged[page[0]]
    return bytes(damaged)


def hostile_change(data: bytes, rng: random.Random) -> bytes:
    """What someone writes who knows the format: any content under checksums that fit."""
    saved = SavedBytes(data)
    if rng.random() < 0.5:
        name = rng.choice(list(saved.layout.places))
        span = saved.section(name)
        for _ in range(rng.choice([1, 4, 64])):
            if span.stop > span.start:
                at = rng.randrange(span.start, span.stop)
                size = min(rng.choice([1, 4, 8, 512]), span.stop - at)
                filled = rng.choice([rng.randbytes(size), b"\xff" * size, bytes(size)])
                saved.data[at : at + size] = filled
        return saved.repaired()
    header = json.loads(json.dumps(saved.header))
    facts = header["about"]["facts"]
    for _ in range(rng.choice([1, 1, 3])):
        # sections are so many that facts would hardly ever be chosen
        _change_somewhere(rng.choice([header, facts]), rng)
    return saved.with_header(header)


def _change_somewhere(value: Any, rng: random.Random) -> None:
    """Change, drop or repeat one value in nested lists and dicts, at any depth."""
    places: list[tuple[Any, Any]] = []

    def visit(node: Any) -> None:
        for key in list(node) if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], dict | list):
                visit(node[key])

    visit(value)
    node, key = rng.choice(places)
    near = rng.randrange(-3, 2000)
    change = rng.choice(["set", "set", "drop", "repeat"])
    if change == "set":
        node[key] = rng.choice([*STRANGE, near, near, near])
    elif change == "drop":
        del node[key]
    elif isinstance(node, list):
        node.insert(key, node[key])
    else:
        node[rng.choice(["name", "extra"])] = node[key]

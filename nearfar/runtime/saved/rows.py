"""Far rows of a saved document: mapped into far memory, checked before they are read.

A layer of far memory is one array with room for the longest context. Over the beginning of each
head's part of it the file's rows are mapped, copy-on-write: no row is copied, all processes share
the pages, and later tokens are written behind them as usual. If the page size of this system does
not allow that, rows are read into place instead.

A block of 256 tokens of one head is compared with its checksum when it is read for the first time,
so mapping reads nothing and no damaged row enters an answer.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray

from nearfar.errors import OutOfMemoryError
from nearfar.records import AllOrNone, Selection
from nearfar.runtime.memory.far_store import BLOCK_TOKENS
from nearfar.runtime.saved.container import MAP_FLAGS, Container

_MAP_FIXED = 0x10  # Linux and the BSDs; the mmap module does not name it


class MappedRows:
    """The far rows of all layers of an opened file."""

    def __init__(self, container: Container, names: list[str], row_bytes: int) -> None:
        self._container = container
        self._row_bytes = row_bytes
        self._places = [container.place(name) for name in names]
        self._sums = [container.sums(place) for place in self._places]
        # for each layer which blocks [Hkv, blocks] were compared; None: all
        self._known: list[NDArray[np.bool_] | None] = [
            np.zeros(sums.shape, np.bool_) for sums in self._sums
        ]
        self._heads: list[list[NDArray[np.uint8]]] = [[] for _ in names]
        self._threads = ThreadPoolExecutor(os.cpu_count() or 1)
        self.tokens = self._places[0].section.part_bytes // row_bytes

    def lay_into(self, layer: int, memory: NDArray[np.uint8], head_bytes: int) -> None:
        """Put the rows of ``layer`` at the beginning of each part of ``memory``."""
        place = self._places[layer]
        size = place.section.part_bytes
        for head in range(place.section.parts if size else 0):
            source, start = place.offset + head * place.stride, head * head_bytes
            if source % mmap.PAGESIZE == 0 and head_bytes % mmap.PAGESIZE == 0:
                _map_over(memory, start, size, self._container, source)
            else:
                memory[start : start + size] = self._container.part_bytes(place, head)
            self._heads[layer].append(memory[start : start + size])

    def copied(self, layer: int) -> torch.Tensor:
        """A copy [Hkv, tokens, row bytes] uint8 of ``layer``, checked."""
        place = self._places[layer]
        self._container.check([place.section.name])
        parts = [self._container.part_bytes(place, head) for head in range(place.section.parts)]
        return torch.from_numpy(np.stack(parts)).view(place.section.shape)

    def verify(self, layer: int, selection: Selection | AllOrNone) -> None:
        """Compare the rows of ``layer`` that are read for the first time with their checksums.

        Raises DamagedDocumentError; the rows must then not be used.
        """
        known = self._known[layer]
        if known is None or selection is AllOrNone.NONE:
            return
        fresh = ~known
        if isinstance(selection, Selection):
            fresh &= self._blocks(selection, known)
        wanted = np.argwhere(fresh).tolist()
        whole = list(self._threads.map(lambda where: self._is_whole(layer, *where), wanted))
        if not all(whole):
            head, block = wanted[whole.index(False)]
            raise self._container.damaged_block(self._places[layer], head, block)
        known |= fresh
        if known.all():
            self._known[layer] = None

    def _blocks(self, selection: Selection, known: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Which blocks, of the shape of ``known``, hold rows that a selection reads."""
        rows = len(selection.offsets) - 1
        head = np.repeat(np.arange(rows) // (rows // len(known)), np.diff(selection.offsets))
        saved = selection.indices < self.tokens
        wanted = np.zeros_like(known)
        wanted[head[saved], selection.indices[saved] // BLOCK_TOKENS] = True
        return wanted

    def _is_whole(self, layer: int, head: int, block: int) -> bool:
        size = BLOCK_TOKENS * self._row_bytes
        data = self._heads[layer][head][block * size : (block + 1) * size]
        return zlib.crc32(data.data) == int(self._sums[layer][head, block])


def _map_over(
    memory: NDArray[np.uint8], start: int, size: int, container: Container, source: int
) -> None:
    """Map ``size`` bytes of the file from ``source`` over ``memory`` from ``start``, both pages."""
    library = ctypes.CDLL(None, use_errno=True)
    library.mmap.restype = ctypes.c_void_p
    library.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_int64]
    wanted = memory.ctypes.data + start
    protection = mmap.PROT_READ | mmap.PROT_WRITE
    flags = MAP_FLAGS | _MAP_FIXED
    got = library.mmap(wanted, size, protection, flags, container.file.fileno(), source)
    if got != wanted:
        reason = os.strerror(ctypes.get_errno())
        raise OutOfMemoryError(
            f"{container.path} cannot be mapped into memory ({reason}). Raise the number of "
            "mappings (sysctl vm.max_map_count), or copy the file to a local disk."
        )

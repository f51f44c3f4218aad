"""Faults while a real document is written: killed writers, a full disk, two writers at once.

    python benchmarks/saved_faults.py book.nearfar --kills 50

Opens a saved document and writes it to a folder again and again, in processes that are killed with
SIGKILL at random moments of a write. After each kill the name must belong to no file or to a file
whose every byte is right, and at the end no other file may be left. A limit on file sizes simulates
a full disk. Prints all outcomes and fails if any is wrong.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from nearfar import Document, Engine
from nearfar.errors import SavedDocumentError
from nearfar.runtime.saved.container import open_container


def main() -> None:
    """Open, interrupt, check and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("document", type=Path)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--folder", type=Path, help="A folder on the disk to test.")
    arguments = parser.parse_args()
    document = Engine.from_pretrained(threads=1).open(arguments.document)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        path = Path(folder) / "a.nearfar"
        started = time.perf_counter()
        document.save(path)
        seconds = time.perf_counter() - started
        print(f"{path.stat().st_size / 2**20:.0f} MiB written in {seconds:.2f} s")
        print(f"killed: {dict(_killed(document, path, arguments.kills, seconds))}")
        print(f"disk full: {_full(document, path)}")
        print(f"two writers at once: {_two(document, path)}")


def _killed(document: Document, path: Path, kills: int, seconds: float) -> Counter[str]:
    """Counts of the file's states after a writer was killed."""
    rng, found = random.Random(5), Counter[str]()
    for number in range(kills):
        if number % 2:
            path.unlink(missing_ok=True)
        writer = _start(lambda: document.save(path))
        time.sleep(rng.random() * 1.1 * seconds)
        os.kill(writer, signal.SIGKILL)
        _, status = os.waitpid(writer, 0)
        cut = "killed" if os.WIFSIGNALED(status) else "finished before"
        found[f"{cut}, {_state(path)}"] += 1
    document.save(path)
    assert os.listdir(path.parent) == [path.name], "a killed writer's file was left behind"
    return found


def _full(document: Document, path: Path) -> str:
    """The outcome of a writer with half of the room: it must fail and keep the old file."""

    def write() -> None:
        half = path.stat().st_size // 2
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (half, half))
        try:
            document.save(path)
        except SavedDocumentError as error:
            print(f"  {error}", flush=True)
            os._exit(7)

    _, status = os.waitpid(_start(write), 0)
    assert os.waitstatus_to_exitcode(status) == 7, "a full disk was not noticed"
    assert os.listdir(path.parent) == [path.name], "a failed writer's file was left behind"
    return f"said so, the old file is {_state(path)}"


def _two(document: Document, path: Path) -> str:
    writers = [_start(lambda: document.save(path)) for _ in range(2)]
    for writer in writers:
        assert os.waitpid(writer, 0)[1] == 0, "a writer failed"
    assert os.listdir(path.parent) == [path.name]
    return _state(path)


def _start(work: Callable[[], object]) -> int:
    """The id of a process that does ``work`` and ends."""
    process = os.fork()
    if process == 0:
        work()
        os._exit(0)
    return process


def _state(path: Path) -> str:
    """``whole`` or ``absent``; raises for a file that opens and differs from the written one."""
    if not path.exists():
        return "absent"
    container = open_container(path)
    container.check()
    container.close()
    return "whole"


if __name__ == "__main__":
    main()

"""Files appear whole or not at all: killed, full disks, several writers, interrupted writers.

NEARFAR_KILLS is how many writers are killed at random moments; the suite kills few.
"""

from __future__ import annotations

import errno
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from limits import LIMIT_SECONDS, beside

from nearfar.errors import SavedDocumentError
from nearfar.output.whole import PARTIAL, remove_leftovers, whole_file
from nearfar.runtime.saved.container import open_container
from nearfar.runtime.saved.layout import Section
from nearfar.runtime.saved.writing import Content, write_container

KILLS = int(os.environ.get("NEARFAR_KILLS", "6"))
Usage = namedtuple("Usage", ["total", "used", "free"])
WRITER = """
import itertools, sys
import numpy as np
from pathlib import Path
from nearfar.runtime.saved.layout import Section
from nearfar.runtime.saved.writing import Content, write_container
path, size = Path(sys.argv[1]), int(sys.argv[2])
print("begun", flush=True)
for number in itertools.count(1):
    filled = np.full(size, number % 251, np.uint8)
    content = Content(Section("data", "uint8", (size,)), lambda: [filled])
    write_container(path, {"number": number}, [content])
    if len(sys.argv) > 3:
        break
"""


def write(path: Path, number: int, size: int = 100_000) -> None:
    filled = np.full(size, number, np.uint8)
    content = Content(Section("data", "uint8", (size,)), lambda: [filled])
    write_container(path, {"number": number}, [content])


def number_in(path: Path) -> int:
    """The number that a file says, if it is whole."""
    container = open_container(path)
    container.check()
    number: int = container.about["number"]
    assert (container.array("data") == number % 251).all()
    return number


@pytest.mark.slow
def test_writers_killed_at_random_moments_leave_no_half_file(tmp_path: Path) -> None:
    path, rng, found = tmp_path / "a", random.Random(3), 0
    for kill in range(KILLS):
        if kill % 5 == 0:
            path.unlink(missing_ok=True)
        size = rng.choice([5_000, 3_000_000])
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path), str(size)], stdout=subprocess.PIPE
        ) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"begun\n"
            time.sleep(rng.random() * 0.05)
            process.kill()
        assert process.returncode == -signal.SIGKILL
        assert not path.exists() or number_in(path) >= 1
        found += path.exists()
    assert found > KILLS / 3
    write(path, 7)
    assert number_in(path) == 7
    assert os.listdir(tmp_path) == ["a"]


def test_a_writer_killed_before_its_first_file_leaves_none(tmp_path: Path) -> None:
    path = tmp_path / "a"

    def interrupted() -> None:
        with whole_file(path, 10) as file:
            file.write(b"half")
            file.flush()
            leftover = next(tmp_path.iterdir())
            # as if the process had been killed here: the file stays, its lock goes
            shutil.copy(leftover, tmp_path / f".a.00000000{PARTIAL}")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert os.listdir(tmp_path) == [f".a.00000000{PARTIAL}"]
    write(path, 1)
    assert os.listdir(tmp_path) == ["a"]


def test_what_another_is_writing_is_not_removed(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with whole_file(path, 10) as file:
        file.write(b"mine")
        remove_leftovers(path)
        write(path, 5)
        assert number_in(path) == 5
    assert path.read_bytes() == b"mine"
    assert os.listdir(tmp_path) == ["a"]


def test_several_writers_at_once(tmp_path: Path) -> None:
    path = tmp_path / "a"

    def write_many(number: int) -> None:
        for _ in range(15):
            write(path, number)

    seen = set()
    with beside(*(partial(write_many, number) for number in (1, 2, 3))) as writers:
        while any(writer.is_alive for writer in writers):
            if path.exists():
                seen.add(number_in(path))
    assert seen <= {1, 2, 3}
    assert number_in(path) in (1, 2, 3)
    assert os.listdir(tmp_path) == ["a"]


def test_a_disk_that_fills_up_while_writing(tmp_path: Path) -> None:
    """A limit on the size of files is what a full disk looks like, and needs no disk."""
    path = tmp_path / "a"
    write(path, 1)
    limited = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (700_000, 700_000))"
    done = subprocess.run(
        [sys.executable, "-c", f"{limited}\n{WRITER}", str(path), "3000000", "once"],
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
    )
    last = done.stderr.strip().splitlines()[-1]
    needed = (
        r"No room to write .*/a\. Needed: 2\.9 MiB\. Free there: .* GiB\. Make room, or name a "
    )
    assert re.search(f"SavedDocumentError: {needed}file on another disk", last), done.stderr
    assert number_in(path) == 1
    assert os.listdir(tmp_path) == ["a"]


def test_a_disk_that_is_full_is_seen_before_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**6, 10**6 - 99, 99))
    message = re.escape(f"No room to write {tmp_path / 'a'}. Needed: ")
    with pytest.raises(SavedDocumentError, match=f"^{message}.*Free there: 99 B\\. Make room"):
        write(tmp_path / "a", 1)
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_that_may_not_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(SavedDocumentError, match=r"a cannot be written: Permission denied\.$"):
            write(tmp_path / "a", 1)
    finally:
        tmp_path.chmod(0o700)


def test_permissions_are_those_that_a_new_file_gets(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.touch()
    write(tmp_path / "a", 1)
    assert (tmp_path / "a").stat().st_mode == plain.stat().st_mode


def test_a_part_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write(path, 1)

    def fail() -> list[np.ndarray[tuple[int], np.dtype[np.uint8]]]:
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        write_container(path, {}, [Content(Section("data", "uint8", (9,)), fail)])
    assert number_in(path) == 1
    assert os.listdir(tmp_path) == ["a"]


def test_a_disk_that_fails_while_writing_is_told(tmp_path: Path) -> None:
    """And nothing is left, neither a half file nor the word that all went well."""

    def failing() -> list[np.ndarray[tuple[int], np.dtype[np.uint8]]]:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    path = tmp_path / "a"
    message = re.escape(f"{path} cannot be written: Input/output error.")
    with pytest.raises(SavedDocumentError, match=f"^{message}$"):
        write_container(path, {}, [Content(Section("a", "uint8", (9,)), failing)])
    assert os.listdir(tmp_path) == []

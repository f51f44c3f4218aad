from __future__ import annotations

import errno
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from limits import LIMIT_SECONDS

from nearfar.errors import CheckpointError
from nearfar.runtime.checkpoints import cache_folder as files
from nearfar.runtime.checkpoints.cache_folder import (
    cache_folder,
    fingerprint,
    locked,
    scratch_folder,
    sha256_of,
    written_whole,
)

HOLD = """
import sys
from pathlib import Path
from nearfar.runtime.checkpoints.cache_folder import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
    print("letting go", flush=True)
"""


def stop_halfway(target: Path, error: BaseException) -> None:
    with written_whole(target, 3) as temporary:
        temporary.write_text("half")
        raise error


def test_folder_is_where_the_environment_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NEARFAR_CACHE_DIR", str(tmp_path / "own"))
    assert cache_folder("models", "x") == tmp_path / "own" / "models" / "x"
    assert cache_folder("models", "x").is_dir()


def test_folder_that_cannot_be_made_is_an_error_with_a_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NEARFAR_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(CheckpointError, match=r"cannot be made: .* Set NEARFAR_CACHE_DIR to a fol"):
        cache_folder("models")


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_nothing_is_left_of_a_write_that_stops(tmp_path: Path, error: type[BaseException]) -> None:
    target = tmp_path / "file"
    with pytest.raises(error):
        stop_halfway(target, error())
    assert list(tmp_path.iterdir()) == []


def test_finished_write_has_its_name_and_leaves_nothing_else(tmp_path: Path) -> None:
    (tmp_path / ".file.partial").mkdir()
    (tmp_path / ".file.partial" / "of a killed process").write_text("half")
    target = tmp_path / "file"
    target.write_text("old")
    with written_whole(target) as temporary:
        temporary.write_text("new")
        assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert target.read_text() == "new"
    with written_whole(tmp_path / "folder") as temporary:
        temporary.mkdir()
        (temporary / "inner").write_text("x")
    assert (tmp_path / "folder" / "inner").read_text() == "x"


def test_scratch_folder_is_gone_afterwards(tmp_path: Path) -> None:
    with scratch_folder(tmp_path / "wheel") as folder:
        (folder / "inner").write_text("x")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("I/O error: No space left on device (os error 28)"),
    ],
)
def test_full_disk_says_where_and_what_to_do(tmp_path: Path, error: Exception) -> None:
    expected = r"No room to write .*file\. Needed: 3 B\. Free there: .*NEARFAR_CACHE_DIR"
    with pytest.raises(CheckpointError, match=expected):
        stop_halfway(tmp_path / "file", error)
    assert list(tmp_path.iterdir()) == []


def test_room_is_asked_for_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"Needed: 1073741824\.00 GiB"):
        written_whole(tmp_path / "file", 2**60).__enter__()


@contextmanager
def held(target: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that holds the lock of ``target`` until its input ends."""
    arguments = [sys.executable, "-c", HOLD, str(target)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(arguments, **pipes) as holder:  # type: ignore[call-overload]
        assert holder.stdout.readline() == b"held\n"
        try:
            yield holder
        finally:
            holder.kill()


def test_second_process_waits_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = []
    with held(tmp_path / "model") as holder:
        assert holder.stdin is not None
        assert holder.stdout is not None

        def say(text: str, name: str) -> None:
            said.append(text % name)
            holder.stdin.close()  # type: ignore[union-attr]

        monkeypatch.setattr(files._log, "warning", say)
        with locked(tmp_path / "model"):
            assert select.select([holder.stdout], [], [], 0)[0]  # it has let go by now
    assert said == ["Waiting for another process that is preparing model."]


def test_waiting_for_another_process_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "WAIT_SECONDS", 0.06)
    target = tmp_path / "model"
    with held(target), pytest.raises(CheckpointError) as caught, locked(target):
        pass
    assert str(caught.value) == (
        "Another process has been preparing model for 0 minutes. End it and run this again; it "
        f"holds {target}.lock."
    )


def test_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with held(target) as holder:
        holder.kill()
        assert holder.wait(LIMIT_SECONDS) == -signal.SIGKILL
        with locked(target):
            pass


def test_fingerprint_tells_files_apart_wherever_they_differ(tmp_path: Path) -> None:
    content = os.urandom(9 * 2**20)
    path = tmp_path / "file"
    path.write_bytes(content)
    seen = {fingerprint(path)}
    (tmp_path / "copy").write_bytes(content)
    assert fingerprint(tmp_path / "copy") in seen
    for changed in (
        bytes([content[0] ^ 1]) + content[1:],
        content[:-1] + bytes([content[-1] ^ 1]),
        content[: 9 * 2**20 - 1],
        content[: 8 * 2**20] + bytes(2**20),
        b"",
    ):
        path.write_bytes(changed)
        assert fingerprint(path) not in seen
        seen.add(fingerprint(path))


def test_a_changed_byte_anywhere_is_another_fingerprint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the size and the time of change that it had; and a file is read once while it stays."""
    monkeypatch.setenv("NEARFAR_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(files, "_SETTLED_SECONDS", -1)
    monkeypatch.setattr(files, "_PIECE_BYTES", 2**20)
    path, content = tmp_path / "file", bytearray(3 * 2**20 + 5)
    path.write_bytes(content)
    seen = {fingerprint(path)}
    status = path.stat()
    for place in (2**20 - 1, 2**20, 3 * 2**20 // 2 + 12345):
        content[place] ^= 1
        path.write_bytes(content)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        seen.add(fingerprint(path))
    assert len(seen) == 4
    last = fingerprint(path)
    monkeypatch.setattr(files, "_digest_of_piece", None)  # nothing is read
    assert fingerprint(path) == last


def test_sha256_is_that_of_the_content(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    assert sha256_of(tmp_path / "abc").startswith("ba7816bf8f01cfea414140de5dae2223b00361a3")

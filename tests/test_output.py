"""Where outputs go: devices, links, folders, files of others; and that they are written whole."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from nearfar.errors import OutputError, OutputExistsError, OutputNameError
from nearfar.output.place import Place, check_replaced, find_place
from nearfar.output.whole import PARTIAL, remove_leftovers, whole_file, write_output

root = pytest.mark.skipif(os.geteuid() != 0, reason="only root makes devices")


def put(name: Path | str, data: bytes = b"new", overwrite: bool = False) -> None:
    place = find_place(name, may_stream=True)
    check_replaced(
        place, "a note", lambda path: path.read_bytes().startswith(b"note"), overwrite=overwrite
    )
    write_output(place, data)


def test_a_name_that_is_free_and_one_that_is_empty(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.touch()
    put(path)
    put(tmp_path / "b")
    assert [each.read_bytes() for each in (path, tmp_path / "b")] == [b"new", b"new"]


def test_an_own_file_is_replaced_and_another_is_not(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"note 1")
    put(path, b"thesis")
    with pytest.raises(OutputExistsError) as caught:
        put(path)
    assert str(caught.value) == (
        f"{path} exists and is not a note. Name another file, or replace it: overwrite=True."
    )
    assert path.read_bytes() == b"thesis"
    put(path, overwrite=True)
    assert path.read_bytes() == b"new"


def test_what_is_read_is_never_replaced(tmp_path: Path) -> None:
    path, other = tmp_path / "a", tmp_path / "b"
    path.write_bytes(b"note")
    os.link(path, other)
    with pytest.raises(OutputNameError, match=r"b is also an input\. Name another file"):
        check_replaced(
            find_place(other), "a note", lambda _: True, overwrite=True, read=["none", path]
        )


def test_links_are_followed(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    target, link, last = tmp_path / "deep" / "real", tmp_path / "link", tmp_path / "last"
    last.symlink_to("link")
    link.symlink_to("deep/real")
    for data in (b"note 1", b"note 2"):  # dangling, then not
        put(last, data)
        assert last.is_symlink()
        assert link.is_symlink()
        assert target.read_bytes() == data
    assert os.listdir(tmp_path / "deep") == ["real"]
    loop = tmp_path / "loop"
    loop.symlink_to("loop")
    with pytest.raises(OutputNameError, match="loop cannot be written: Too many levels"):
        put(loop)
    lost = tmp_path / "lost"
    lost.symlink_to("gone/real")
    with pytest.raises(OutputNameError, match=r"gone/real'\) does not exist\. Make it"):
        put(lost)


def test_hard_links_keep_what_they_had(tmp_path: Path) -> None:
    path, other = tmp_path / "a", tmp_path / "b"
    path.write_bytes(b"note")
    os.link(path, other)
    put(path)
    assert (path.read_bytes(), other.read_bytes()) == (b"new", b"note")


def test_permissions_and_owner_are_handed_on(tmp_path: Path) -> None:
    path = tmp_path / "a"
    for mode in (0o600, 0o664, 0o640):
        path.write_bytes(b"note")
        path.chmod(mode)
        if os.geteuid() == 0:
            os.chown(path, 65534, 65534)
        put(path)
        status = path.stat()
        assert stat.S_IMODE(status.st_mode) == mode
        assert os.geteuid() or (status.st_uid, status.st_gid) == (65534, 65534)


def test_a_read_only_file_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"note")
    path.chmod(0o444)
    with pytest.raises(OutputExistsError, match=r"a is read-only\. Name another file"):
        put(path)
    put(path, overwrite=True)
    assert (path.read_bytes(), stat.S_IMODE(path.stat().st_mode)) == (b"new", 0o444)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "'' is not a file name. Name a file."),
        ("a\0b", "is not a file name"),
        ("x/", "x/ is the name of a folder. Name a file in it."),
        (".", ". is a folder. Name a file in it."),
        ("gone/x", "The folder of 'gone/x' does not exist. Make it first."),
        ("file/x", "file/x cannot be written: Not a directory. Name another file."),
        ("n" * 256, "cannot be written: File name too long. Name another file."),
    ],
)
def test_names_that_cannot_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("mine")
    with pytest.raises(OutputNameError) as caught:
        find_place(name)
    assert message in str(caught.value)
    assert caught.value.exit_code == 2


def test_names_as_long_as_names_can_be(tmp_path: Path) -> None:
    for name in ("n" * 255, "é" * 127, "[*]?"):
        put(tmp_path / name)
        put(tmp_path / name, overwrite=True)
        assert os.listdir(tmp_path) == [name]
        (tmp_path / name).unlink()


def test_the_home_folder_has_its_short_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_place("~/a").path == tmp_path / "a"


def test_a_pipe_is_written_into_by_what_comes_in_order(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(OutputNameError, match="pipe is a FIFO, but this output needs"):
        find_place(pipe)
    with pytest.raises(OutputError, match=r"Nothing reads from .*pipe\. Start its reader first"):
        put(pipe)
    got: list[bytes] = []
    number = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    os.set_blocking(number, True)

    def read() -> None:
        with os.fdopen(number, "rb") as file:
            got.append(file.read())

    reader = threading.Thread(target=read, daemon=True)
    put(pipe, b"small")  # fits what a pipe holds
    reader.start()
    reader.join(20)
    assert got == [b"small"]
    assert stat.S_ISFIFO(pipe.lstat().st_mode)


@root
def test_a_device_stays_one(tmp_path: Path) -> None:
    null, disk = tmp_path / "null", tmp_path / "disk"
    try:
        os.mknod(null, stat.S_IFCHR | 0o666, os.makedev(1, 3))
        os.mknod(disk, stat.S_IFBLK | 0o600, os.makedev(259, 4095))
    except OSError:
        pytest.skip("devices cannot be made here")
    put(null)
    assert stat.S_ISCHR(null.lstat().st_mode)
    with pytest.raises(OutputNameError, match="null is a device, but this output needs"):
        find_place(null)
    for may_stream in (False, True):
        with pytest.raises(OutputNameError, match="disk is a block device"):
            find_place(disk, may_stream=may_stream)
    with pytest.raises(OutputError, match="null cannot be written: it is there and is not a file"):
        write_output(Place("null", null, None), b"unchecked")
    assert stat.S_ISCHR(null.lstat().st_mode)


def test_standard_output_is_written_into(tmp_path: Path) -> None:
    put_it = "from nearfar.output import place, whole\nprint('first', flush=True)\n"
    put_it += "whole.write_output(place.find_place('/dev/stdout', may_stream=True), b'then')"
    with (tmp_path / "a").open("wb") as file:
        subprocess.run([sys.executable, "-c", put_it], stdout=file, check=True, timeout=60)
    assert (tmp_path / "a").read_bytes() == b"first\nthen"
    piped = subprocess.run(
        [sys.executable, "-c", put_it], capture_output=True, check=True, timeout=60
    )
    assert piped.stdout == b"first\nthen"


def test_a_private_file_is_private_from_its_first_byte(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.touch(0o666)
    with whole_file(path, 3, private=True) as file:
        assert stat.S_IMODE(os.fstat(file.fileno()).st_mode) & 0o077 == 0
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_leftovers_are_told_from_files_of_the_user(tmp_path: Path) -> None:
    kept = {".a.notes.partial", ".a.12345678.partial.txt", ".ab.12345678.partial", "a.partial"}
    for name in kept:
        (tmp_path / name).write_text("mine")
    (tmp_path / f".a.12345678{PARTIAL}").write_bytes(b"half")
    remove_leftovers(tmp_path / "a")
    assert set(os.listdir(tmp_path)) == kept

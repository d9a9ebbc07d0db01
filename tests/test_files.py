"""Atomic writes: modes, links, failures, leftovers of killed processes, and errors that name file and cause."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from spmdeploy import files
from spmdeploy.errors import BundleError, InputError, OutOfMemoryError
from spmdeploy.files import MAX_NAME_LENGTH, atomic_replace_dir, atomic_write, os_errors, sha256, sweep, translated

posix = pytest.mark.skipif(os.name != "posix", reason="modes, links and locks are those of POSIX")


@pytest.fixture(autouse=True)
def unswept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_SWEPT", set())


def write(path: Path, **options: bool) -> None:
    write_and(path, lambda: None, **options)


def write_and(path: Path, then: Callable[[], object], **options: bool) -> None:
    with atomic_write(path, **options) as stream:
        stream.write(b"new")
        then()


def throw(error: type[BaseException] | BaseException) -> None:
    raise error


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@posix
@pytest.mark.parametrize("mode", [0o600, 0o640, 0o444, 0o755])
def test_atomic_write_replaced_file_keeps_its_mode(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "photo.png"
    path.write_bytes(b"old")
    path.chmod(mode)
    write(path)
    assert path.read_bytes() == b"new" and stat.S_IMODE(path.stat().st_mode) == mode


@posix
def test_atomic_write_new_file_has_the_mode_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    write(tmp_path / "photo.png")
    assert (tmp_path / "photo.png").stat().st_mode == (tmp_path / "other").stat().st_mode


@posix
def test_atomic_write_link_is_written_through(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real/photo.png").write_bytes(b"old")
    (tmp_path / "photo.png").symlink_to("real/photo.png")
    write(tmp_path / "photo.png")
    assert (tmp_path / "photo.png").is_symlink()
    assert (tmp_path / "real/photo.png").read_bytes() == b"new"
    assert names(tmp_path / "real") == ["photo.png"]


@posix
def test_atomic_write_dangling_link_makes_its_target(tmp_path: Path) -> None:
    (tmp_path / "photo.png").symlink_to("real.png")
    write(tmp_path / "photo.png")
    assert names(tmp_path) == ["photo.png", "real.png"] and (tmp_path / "real.png").read_bytes() == b"new"


@posix
def test_atomic_write_device_and_folder_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name, message in (("pipe", "is a device or a pipe"), ("folder", "is a folder")):
        with pytest.raises(InputError, match=message):
            write(tmp_path / name)
    assert names(tmp_path) == ["folder", "pipe"]


@pytest.mark.parametrize("links", [True, False])
def test_atomic_write_without_overwrite_replaces_nothing(
    tmp_path: Path, links: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.EPERM, "no hard links here")

    if not links:
        monkeypatch.setattr(os, "link", unsupported)
    path = tmp_path / "photo.png"
    write(path, overwrite=False)
    assert path.read_bytes() == b"new"
    with pytest.raises(InputError, match="exists already"):
        write(path, overwrite=False)
    path.unlink()
    with pytest.raises(InputError, match="exists already"):
        write_and(path, lambda: path.write_bytes(b"of another process"), overwrite=False)
    assert path.read_bytes() == b"of another process" and names(tmp_path) == ["photo.png"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(errno.ENOSPC, "No space left on device")])
def test_atomic_write_failure_leaves_the_old_file_alone(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "photo.png"
    path.write_bytes(b"old")
    with pytest.raises((KeyboardInterrupt, InputError)):
        write_and(path, lambda: throw(error))
    assert path.read_bytes() == b"old" and names(tmp_path) == ["photo.png"]


@posix
def test_atomic_write_longest_names_work(tmp_path: Path) -> None:
    for name in ("x" * 255, "ü" * 127):
        write(tmp_path / name)
    assert len(names(tmp_path)) == 2
    with pytest.raises(InputError, match="the name is too long"):
        write(tmp_path / ("x" * 256))


@posix
def test_atomic_write_deleted_working_folder_is_an_input_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(InputError):
        write(Path("photo.png"))


@posix
def test_atomic_write_circle_of_links_is_named(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(InputError, match="symbolic links"):
        write(tmp_path / "a")


def replace(path: Path, text: str = "new", then: Callable[[], object] = lambda: None) -> None:
    with atomic_replace_dir(path, overwrite=True) as folder:
        (folder / "a.txt").write_text(text)
        then()


@pytest.mark.parametrize("exchange", [True, False])
def test_atomic_replace_dir_replaces_whole_and_keeps_the_mode(
    tmp_path: Path, exchange: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exchange:
        monkeypatch.setattr(files, "_exchange", lambda first, second: False)
    target = tmp_path / "folder"
    replace(target, "old")
    (target / "b.txt").touch()
    target.chmod(0o750)
    replace(target)
    assert names(target) == ["a.txt"] and (target / "a.txt").read_text() == "new" and names(tmp_path) == ["folder"]
    assert os.name != "posix" or stat.S_IMODE(target.stat().st_mode) == 0o750


@pytest.mark.skipif(sys.platform != "linux", reason="renameat2 is Linux's")
def test_atomic_replace_dir_target_is_never_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "folder"
    replace(target, "old")
    if not files._exchange(target, tmp_path / "folder"):
        pytest.skip("this file system cannot exchange")
    monkeypatch.setattr(os, "rename", lambda *_: pytest.fail("moved aside"))
    replace(target)
    assert (target / "a.txt").read_text() == "new"


def test_atomic_replace_dir_exception_leaves_nothing(tmp_path: Path) -> None:
    replace(tmp_path / "folder", "old")
    with pytest.raises(KeyboardInterrupt):
        replace(tmp_path / "folder", "half", lambda: throw(KeyboardInterrupt))
    assert (tmp_path / "folder/a.txt").read_text() == "old" and names(tmp_path) == ["folder"]


KILLED = """
import sys, time
from pathlib import Path
from spmdeploy.files import atomic_replace_dir, atomic_write
with atomic_write(Path(sys.argv[1]) / "photo.png") as stream, atomic_replace_dir(Path(sys.argv[1]) / "b.spm") as folder:
    (folder / "half").write_text("half")
    print("ready", flush=True)
    time.sleep(60)
"""


@posix
def test_sweep_removes_what_a_killed_process_left_and_nothing_of_a_living_one(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        left = names(tmp_path)
        assert len(left) == 2
        for name in left:
            os.utime(tmp_path / name, (0, 0))
        sweep(tmp_path)
        assert names(tmp_path) == left
        process.send_signal(signal.SIGKILL)
    files._SWEPT.clear()
    write(tmp_path / "photo.png")
    assert names(tmp_path) == ["photo.png"]


@posix
def test_sweep_keeps_an_old_bundle_that_nothing_replaced(tmp_path: Path) -> None:
    aside = tmp_path / ".street.spm.0123456789abcdef.previous"
    aside.mkdir()
    os.utime(aside, (0, 0))
    sweep(tmp_path)
    assert aside.exists()
    (tmp_path / "street.spm").mkdir()
    files._SWEPT.clear()
    sweep(tmp_path)
    assert names(tmp_path) == ["street.spm"]


@posix
def test_sweep_keeps_what_is_young_or_not_ours(tmp_path: Path) -> None:
    for name in (".street.spm.0123456789abcdef.building", ".notes.tmp", "a.0123456789abcdef.tmp"):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, None if "building" in name else (0, 0))
    before = names(tmp_path)
    sweep(tmp_path)
    assert names(tmp_path) == before


CAUSES: list[tuple[int, str, type[Exception]]] = [
    (errno.EACCES, "permission to write .* is denied", InputError),
    (errno.ENOSPC, "the disk is full", InputError),
    (errno.EDQUOT, "the disk is full", InputError),
    (errno.EROFS, "read-only", InputError),
    (errno.ENAMETOOLONG, "name is too long", InputError),
    (errno.ELOOP, "symbolic links", InputError),
    (errno.EMFILE, "too many open files", InputError),
    (errno.EIO, "disk or network", InputError),
    (errno.ENOMEM, "too little memory", OutOfMemoryError),
    (errno.ENXIO, "cannot write .*No such device", InputError),
]


@pytest.mark.parametrize(("number", "message", "kind"), CAUSES)
def test_os_errors_cause_and_file_are_named(number: int, message: str, kind: type[Exception]) -> None:
    with pytest.raises(kind, match=message) as caught, os_errors("a/photo.png", "write"):
        raise OSError(number, os.strerror(number))
    assert "a/photo.png" in str(caught.value)


def test_os_errors_other_file_is_named_but_never_a_hidden_one() -> None:
    other = OSError(errno.EACCES, "denied", "b.png")
    hidden = OSError(errno.ENOSPC, "full", "/x/.a.spm.0123456789abcdef.building/graphs/g.onnx")
    assert "b.png" in str(translated(other, "/x/a.spm", "write"))
    assert str(translated(hidden, "/x/a.spm", "write")) == "cannot write /x/a.spm: the disk is full"


@pytest.mark.parametrize("name", ["a\0b", "\udcff\ud800"])
def test_os_errors_impossible_name_is_an_input_error(name: str) -> None:
    with pytest.raises(BundleError), os_errors("a", "read", BundleError):
        Path(name).read_bytes()


def test_os_errors_memory_is_no_damage() -> None:
    with pytest.raises(OutOfMemoryError, match="too little memory to read a"), os_errors("a", "read", BundleError):
        raise MemoryError


@pytest.mark.parametrize("size", [0, 1, 5, None])
def test_sha256_hashes_the_next_bytes(size: int | None) -> None:
    content = os.urandom(3_000_000)
    stream = io.BytesIO(content)
    stream.seek(2)
    expected = content[2:] if size is None else content[2 : 2 + size]
    assert sha256(stream, size) == hashlib.sha256(expected).hexdigest()


def test_is_safe_relative_path_limits_length() -> None:
    assert files.is_safe_relative_path("x" * MAX_NAME_LENGTH)
    assert not files.is_safe_relative_path("x" * (MAX_NAME_LENGTH + 1))

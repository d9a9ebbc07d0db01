"""Reading inputs: limits on size and time for files, pipes and devices."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from spmdeploy import inputs
from spmdeploy.errors import InputError
from spmdeploy.inputs import read_input, read_text

pytestmark = pytest.mark.skipif(os.name != "posix", reason="pipes and devices are POSIX")


def test_read_input_regular_file_returns_content(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"content")
    assert read_input(tmp_path / "a", 7) == b"content"
    with pytest.raises(InputError, match="larger than"):
        read_input(tmp_path / "a", 6)


def test_read_input_named_pipe_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="named pipe"):
        read_input(tmp_path / "pipe", 100)


@pytest.mark.parametrize("device", ["/dev/zero", "/dev/null", "/dev/full"])
def test_read_input_device_is_refused(device: str) -> None:
    with pytest.raises(InputError, match="device"):
        read_input(device, 100)


def test_read_input_folder_and_missing_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a folder"):
        read_input(tmp_path, 100)
    with pytest.raises(InputError, match="there is no file"):
        read_input(tmp_path / "none", 100)
    with pytest.raises(InputError, match="cannot read"):
        read_input("a\0b", 100)


@pytest.mark.parametrize("path", ["-", "/dev/stdin"])
def test_read_input_standard_input_is_read(path: str) -> None:
    code = f"from spmdeploy.inputs import read_input; print(len(read_input({path!r}, 1 << 20)))"
    done = subprocess.run([sys.executable, "-c", code], input=b"x" * 300_000, capture_output=True, check=True)
    assert done.stdout == b"300000\n"


def test_read_input_pipe_of_the_shell_is_read() -> None:
    reader, writer = os.pipe()
    os.write(writer, b"piped")
    os.close(writer)
    try:
        assert read_input(f"/dev/fd/{reader}", 100) == b"piped"
    finally:
        os.close(reader)


def test_read_input_silent_pipe_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "PIPE_SECONDS", 0.05)
    reader, writer = os.pipe()
    try:
        with pytest.raises(InputError, match="sent nothing"):
            read_input(f"/dev/fd/{reader}", 100)
    finally:
        os.close(reader)
        os.close(writer)


def test_read_input_endless_pipe_is_bounded() -> None:
    code = "from spmdeploy.inputs import read_input; read_input('-', 1 << 22)"
    with open("/dev/zero", "rb") as zero, subprocess.Popen(["cat"], stdin=zero, stdout=subprocess.PIPE) as endless:
        done = subprocess.run([sys.executable, "-c", code], stdin=endless.stdout, capture_output=True, check=False)
        endless.kill()
    assert b"larger than 4 MiB" in done.stderr


def test_read_text_other_encoding_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"\xef\xbb\xbftext")
    assert read_text(tmp_path / "a") == "text"
    (tmp_path / "a").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="not UTF-8"):
        read_text(tmp_path / "a")

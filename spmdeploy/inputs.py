"""Reads input files, that is regular files and explicitly named pipes, with limits on size and time."""

from __future__ import annotations

import os
import re
import select
import stat
import sys
import time
from pathlib import Path
from typing import TypeAlias

from spmdeploy.errors import InputError
from spmdeploy.remote import RemotePath, read_remote

FilePath: TypeAlias = str | os.PathLike[str]
LocalOrRemote: TypeAlias = Path | RemotePath

STDIN = "-"
"""Stands for standard input wherever a file is read."""
IMAGE_BYTES = 1 << 30
"""Limit of an image file. The largest that are read, 200 megapixels of 24 bits, are below it uncompressed."""
TEXT_BYTES = 64 << 20
"""Limit of a manifest of edits, a class table or a configuration."""
PIPE_SECONDS = 60.0
"""Time limit for a pipe that sends nothing."""
_CHUNK = 1 << 20
_DESCRIPTOR = re.compile(r"/dev/(?:fd/(\d{1,4})|stdin)|/proc/self/fd/(\d{1,4})")


def read_input(path: FilePath, max_bytes: int) -> bytes:
    """Return the content of a file.

    Reads regular files, pipes given as "-", /dev/stdin or the /dev/fd/N of a shell's process substitution, and objects
    of a store. Named pipes, devices and sockets are refused: they could block or grow without limit.

    Args:
        path: the file, or "-" for standard input.
        max_bytes: a larger file is refused.

    Raises:
        InputError: names the file and what is wrong with it.
    """
    if isinstance(path, RemotePath):
        return read_remote(path, max_bytes)
    name = input_name(path)
    descriptor = _open(path, name)
    try:
        facts = os.fstat(descriptor)
        _check_kind(path, name, facts.st_mode)
        if stat.S_ISREG(facts.st_mode) and facts.st_size > max_bytes:
            raise _too_large(name, max_bytes)
        return _read_all(descriptor, name, max_bytes)
    except OSError as exc:
        raise InputError(f"cannot read {name}: {exc.strerror or exc}") from exc
    finally:
        os.close(descriptor)


def input_name(path: FilePath) -> str:
    """What messages call an input file."""
    return "standard input" if os.fspath(path) == STDIN else str(path)


def is_stream(path: FilePath) -> bool:
    """Whether the path stands for an open descriptor: "-", /dev/stdin or the /dev/fd/N of a process substitution."""
    return os.fspath(path) == STDIN or _DESCRIPTOR.fullmatch(os.fspath(path)) is not None


def is_standard_input(path: FilePath) -> bool:
    """Whether the path stands for standard input, which can be read only once."""
    return os.fspath(path) in (STDIN, "/dev/stdin", "/dev/fd/0", "/proc/self/fd/0")


def read_text(path: FilePath, max_bytes: int = TEXT_BYTES) -> str:
    """Return the content of a UTF-8 text file, without a byte order mark.

    Raises:
        InputError: as `read_input`, and for bytes that are not UTF-8.
    """
    try:
        return read_input(path, max_bytes).decode("utf-8-sig")
    except UnicodeDecodeError as exc:
        raise InputError(f"{path} is not UTF-8 text: {exc.reason} at byte {exc.start}", "save it as UTF-8") from exc


def regular_file(path: FilePath) -> Path:
    """Return the path, for libraries that open files themselves. Does not check that it exists.

    Raises:
        InputError: the path is a named pipe, a socket or a device, which could block or grow without limit.
    """
    if os.path.lexists(path):
        try:
            mode = os.stat(path).st_mode
        except OSError:
            return Path(path)
        if not stat.S_ISDIR(mode):
            _check_kind(path, str(path), mode)
    return Path(path)


def _open(path: FilePath, name: str) -> int:
    """A descriptor of the file. A named pipe without a writer does not block."""
    try:
        descriptor = _named_descriptor(path)
        if descriptor is not None:
            return os.dup(descriptor)
        return os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except FileNotFoundError as exc:
        folder = Path(os.path.abspath(path)).parent if _has_working_directory() else "a folder that was deleted"
        raise InputError(f"there is no file {name}", f"looked in {folder}") from exc
    except IsADirectoryError as exc:
        raise InputError(f"{name} is a folder, not a file", "name a file in it") from exc
    except PermissionError as exc:
        if os.path.isdir(path):  # Windows
            raise InputError(f"{name} is a folder, not a file", "name a file in it") from exc
        raise InputError(f"permission to read {name} is denied", "check its owner and mode") from exc
    except (OSError, ValueError) as exc:  # ValueError: a zero byte in the name, standard input closed
        raise InputError(f"cannot read {name}: {getattr(exc, 'strerror', None) or exc}") from exc


def _named_descriptor(path: FilePath) -> int | None:
    """The open descriptor that the path stands for, if any."""
    text = os.fspath(path)
    if text == STDIN:
        if sys.stdin is None:
            raise ValueError("standard input is closed")
        return sys.stdin.fileno()
    found = _DESCRIPTOR.fullmatch(text)
    return None if found is None else int(found[1] or found[2] or 0)


def _has_working_directory() -> bool:
    try:
        os.getcwd()
    except OSError:
        return False
    return True


def _check_kind(path: FilePath, name: str, mode: int) -> None:
    if stat.S_ISREG(mode):
        return
    if stat.S_ISDIR(mode):
        raise InputError(f"{name} is a folder, not a file", "name a file in it")
    if stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode):
        if _named_descriptor(path) is not None:
            return
        raise InputError(f"{name} is a named pipe, not a file", "pass a pipe as - (standard input)")
    raise InputError(f"{name} is a terminal or a device, not a file or a pipe", "name a file, or pipe the data in")


def _read_all(descriptor: int, name: str, max_bytes: int) -> bytes:
    chunks: list[bytes] = []
    total = 0
    while True:
        chunk = _read_chunk(descriptor, name)
        if not chunk:
            return b"".join(chunks)
        chunks.append(chunk)
        total += len(chunk)
        if total > max_bytes:
            raise _too_large(name, max_bytes)


def _read_chunk(descriptor: int, name: str) -> bytes:
    """The next bytes, b"" at the end. Waits at most `PIPE_SECONDS` for a pipe."""
    deadline = time.monotonic() + PIPE_SECONDS
    while True:
        if os.name == "posix":
            ready, _, _ = select.select([descriptor], [], [], max(deadline - time.monotonic(), 0))
            if not ready:
                raise InputError(f"{name} sent nothing for {PIPE_SECONDS:g} seconds", "is its writer still running?")
        try:
            return os.read(descriptor, _CHUNK)
        except BlockingIOError:
            continue


def _too_large(name: str, max_bytes: int) -> InputError:
    return InputError(f"{name} is larger than {max_bytes >> 20} MiB, the limit", "is it the right file?")

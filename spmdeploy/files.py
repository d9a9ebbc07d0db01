"""Atomic writes, SHA-256, safe names, the user's cache, and translation of the operating system's errors."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import stat
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from spmdeploy.errors import InputError, OutOfMemoryError, SpmDeployError, UnavailableError

if sys.platform != "win32":
    import fcntl

MAX_NAME_LENGTH = 240
"""Characters: unpacks below any folder on every file system."""
TEMPORARY = ".tmp"
"""Suffix of a hidden file that is being written."""
BUILDING, ASIDE = ".building", ".previous"
"""Suffixes of the hidden neighbors of a folder or bundle that is being written or replaced."""
STALE_SECONDS = 5
"""Age from which a temporary file of a process that has ended is deleted."""

EXISTS_HINT = "choose another name, or allow it with --overwrite"
_HIDDEN = re.compile(r"\.(.*\.)?[0-9a-f]{16}\.(tmp|building|previous)", re.DOTALL)
_OUTPUT_DESCRIPTOR = re.compile(r"-|/dev/stdout|/dev/fd/(\d{1,4})|/proc/self/fd/(\d{1,4})")
_SWEPT: set[Path] = set()
"""Folders that this process has swept."""


def quote_path(path: str | Path) -> str:
    """Return a path as it is typed in a command: in quotes where it contains blanks."""
    text = str(path)
    return f'"{text}"' if re.search(r"\s", text) else text


def user_cache() -> Path:
    """The folder for what can be made again.

    $SPMDEPLOY_CACHE, else spmdeploy/ in $XDG_CACHE_HOME (which the XDG specification ignores unless it is absolute),
    else ~/.cache/spmdeploy.

    Raises:
        UnavailableError: No home folder is known.
    """
    if chosen := os.environ.get("SPMDEPLOY_CACHE"):
        return Path(chosen).absolute()
    xdg = Path(os.environ.get("XDG_CACHE_HOME", ""))
    caches = xdg if xdg.is_absolute() else Path(os.path.expanduser("~/.cache"))
    if not caches.is_absolute():
        raise UnavailableError("no home folder is known to keep engines in", "set SPMDEPLOY_CACHE to a folder")
    return caches / "spmdeploy"


def is_safe_relative_path(name: str) -> bool:
    """Whether `name` is a plain relative path with / between its parts, safe to join to a folder on any system."""
    parts = name.split("/")
    # ":" covers drive letters and NTFS streams; isprintable covers NUL, newlines, lone surrogates, direction overrides.
    plain = name.isprintable() and "\\" not in name and ":" not in name
    return plain and len(name) <= MAX_NAME_LENGTH and not {"", ".", ".."} & set(parts)


def sha256(stream: BinaryIO, size: int | None = None) -> str:
    """SHA-256 of the next `size` bytes of a stream in hexadecimal digits; of all that follow if None."""
    digest = hashlib.sha256()
    while size is None or size > 0:
        chunk = stream.read(1 << 20 if size is None else min(size, 1 << 20))
        if not chunk:
            break
        digest.update(chunk)
        size = None if size is None else size - len(chunk)
    return digest.hexdigest()


def output_descriptor(path: str | os.PathLike[str]) -> int | None:
    """The open descriptor that an output stands for: "-" or /dev/stdout, or the /dev/fd/N of a process substitution."""
    found = _OUTPUT_DESCRIPTOR.fullmatch(os.fspath(path))
    return None if found is None else int(found[1] or found[2] or 1)


def write_descriptor(path: str | os.PathLike[str], content: bytes) -> None:
    """Writes all of `content` to the descriptor that `path` stands for.

    Raises:
        InputError: It cannot be written to.
    """
    descriptor = output_descriptor(path)
    assert descriptor is not None, path
    with os_errors("standard output" if descriptor == 1 else path, "write to"):
        view = memoryview(content)
        while view:
            view = view[os.write(descriptor, view) :]


@contextmanager
def os_errors(path: str | os.PathLike[str], verb: str, error: type[SpmDeployError] = InputError) -> Iterator[None]:
    """Turns OSError and MemoryError into `error` and OutOfMemoryError that name `path`.

    Args:
        verb: What is being done, "read" or "write".
    """
    try:
        yield
    except MemoryError as exc:
        raise OutOfMemoryError(f"too little memory to {verb} {path}", "close other programs") from exc
    except OSError as exc:
        raise translated(exc, path, verb, error) from exc
    except ValueError as exc:  # a zero byte or a lone surrogate in the name
        if "null" not in str(exc) and not isinstance(exc, UnicodeError):
            raise
        raise error(f"cannot {verb} {path}: {exc}", "name another file") from exc


def translated(
    exc: OSError, path: str | os.PathLike[str], verb: str, error: type[SpmDeployError] = InputError
) -> SpmDeployError:
    """The package error for an OSError, with a readable problem and a hint.

    Args:
        exc: The error of the operating system.
        path: Named where the error names no file, or a hidden temporary one.
        verb: What was tried, such as "read" or "write"; part of the message.
        error: Class of the result, except for lack of memory, which is an OutOfMemoryError.
    """
    path = os.fspath(path)
    named = path if exc.filename is None or _is_hidden(exc.filename) else os.fsdecode(exc.filename)
    if exc.errno == errno.ENOMEM:
        return OutOfMemoryError(f"too little memory to {verb} {named}", "close other programs")
    if exc.errno == errno.ENOENT and verb == "write" and named == path:
        return missing_folder(Path(path), error)
    problem, hint = _PROBLEMS.get(exc.errno or 0, (f"cannot {verb} {{}}: {exc.strerror or exc}", "try again"))
    return error(problem.format(named, verb=verb), hint)


def missing_folder(path: Path, error: type[SpmDeployError] = InputError) -> SpmDeployError:
    """The error for an output file whose folder does not exist."""
    try:
        os.getcwd()
    except FileNotFoundError:
        if not path.is_absolute():
            return error("the current directory no longer exists", "cd to a directory that exists")
    return error(f"the folder of {path} does not exist", f"mkdir -p {path.parent}")


_FULL = ("cannot {verb} {}: the disk is full", "free some space, or name another folder")
_DENIED = ("permission to {verb} {} is denied", "check its owner and mode")
_TOO_MANY = ("cannot {verb} {}: too many open files", "raise the limit with ulimit -n")
_PROBLEMS = {
    errno.EACCES: _DENIED,
    errno.EPERM: _DENIED,
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.EFBIG: ("cannot {verb} {}: larger than the system allows", "name a folder on another file system"),
    errno.ENOENT: ("there is no file {}", "check the spelling and the folder"),
    errno.ENOTDIR: ("cannot {verb} {}: a part of the path is a file, not a folder", "check the path"),
    errno.EISDIR: ("{} is a folder", "name a file in it"),
    errno.EEXIST: ("{} exists already", EXISTS_HINT),
    errno.EROFS: ("cannot {verb} {}: the file system is read-only", "name another folder"),
    errno.ENAMETOOLONG: ("cannot {verb} {}: the name is too long for this file system", "choose a shorter name"),
    errno.ELOOP: ("cannot {verb} {}: too many symbolic links, or a circle of them", "name the file itself"),
    errno.EMFILE: _TOO_MANY,
    errno.ENFILE: _TOO_MANY,
    errno.EIO: ("cannot {verb} {}: the disk or network reports an error", "check the disk"),
    errno.ETXTBSY: ("cannot {verb} {}: it is being executed", "choose another name"),
}


@contextmanager
def atomic_write(
    path: str | os.PathLike[str], overwrite: bool = True, mode: int = 0o666, check: Callable[[Path], None] | None = None
) -> Iterator[BinaryIO]:
    """Opens a stream for a file that is written completely or not at all.

    A file that is replaced keeps its mode; behind a symbolic link the file that it points to is replaced. The content
    is flushed to the disk before the name is given.

    Args:
        path: The file to write.
        overwrite: Whether a file that exists may be replaced, also one that appears while this one is written.
        mode: Of a new file, less the process's umask.
        check: Called with what exists; raises an error if that must not be replaced. With it folders may be, too.

    Raises:
        InputError: The path is taken by something that must not be replaced, or cannot be written.
    """
    check = check or _check_regular
    with os_errors(path, "write"):
        target = resolve_target(path)
        check_free(target, overwrite, check)
        sweep(target.parent)
        temporary = _hidden(target, TEMPORARY)
        try:
            with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as stream:
                _lock(stream.fileno())
                yield stream
                stream.flush()
                if target.is_file() and os.name == "posix":
                    os.fchmod(stream.fileno(), stat.S_IMODE(target.stat().st_mode))
                os.fsync(stream.fileno())
            if overwrite:
                check_free(target, overwrite, check)  # again: it may have been written in the meantime
                _rename(temporary, target)
            else:
                _rename_new(temporary, target)
        finally:
            remove(temporary)


@contextmanager
def atomic_replace_dir(
    path: str | Path, overwrite: bool = False, check: Callable[[Path], None] = lambda target: None
) -> Iterator[Path]:
    """Yields a hidden folder next to `path`, which is renamed to `path` at the end if there is no exception.

    Args:
        path: The folder to create or replace.
        overwrite: Whether something that exists at `path` may be replaced, if `check` raises nothing about it.

    Raises:
        InputError: It exists and may not be replaced, or nothing can be written there.
    """
    with os_errors(path, "write"):
        target = resolve_target(path)
        check_free(target, overwrite, check)
        with staging_dir(target) as folder:
            yield folder
            check_free(target, overwrite, check)  # again: it may have been written in the meantime
            put_in_place(folder, target)


@contextmanager
def staging_dir(target: Path) -> Iterator[Path]:
    """Yields a new hidden folder next to `target`, and removes it at the end if it is still there.

    Raises:
        OSError: The folder cannot be made.
    """
    sweep(target.parent)
    folder = _hidden(target, BUILDING)
    folder.mkdir()
    descriptor = os.open(folder, os.O_RDONLY) if os.name == "posix" else None
    try:
        if descriptor is not None:
            _lock(descriptor)
        yield folder
    finally:
        remove(folder)
        if descriptor is not None:
            os.close(descriptor)


def put_in_place(folder: Path, target: Path) -> None:
    """Renames a folder of `staging_dir` to `target` after flushing its files to the disk.

    Where the system supports it, old and new folder are exchanged atomically, so that `target` is complete at any time.

    Raises:
        OSError: The folder cannot be renamed.
    """
    if target.is_dir() and os.name == "posix":
        os.chmod(folder, stat.S_IMODE(target.stat().st_mode))
    for written in (folder, *folder.rglob("*")):
        flush_to_disk(written)
    _rename(folder, target)


def check_free(target: Path, overwrite: bool, check: Callable[[Path], None]) -> None:
    """Raises InputError unless nothing is at `target`, or `overwrite` is set and `check` raises nothing."""
    if not os.path.lexists(target):
        return
    if not overwrite:
        raise InputError(f"{target} exists already", EXISTS_HINT)
    check(target)


def resolve_target(path: str | os.PathLike[str]) -> Path:
    """The absolute path that a write to `path` goes to; behind a symbolic link, what it points to.

    Raises:
        OSError: Links form a loop.
    """
    target = Path(os.path.realpath(path) if os.path.islink(path) else os.path.abspath(path))
    if target.is_symlink():  # realpath stops at a circular link
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
    return target


def flush_to_disk(path: Path) -> None:
    """Waits until a file or folder is on the disk, so that a power failure cannot leave it empty."""
    if os.name != "posix":  # elsewhere folders and files opened for reading cannot be flushed
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Removes a file or a folder with its content; errors are ignored."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def sweep(folder: Path) -> None:
    """Removes temporary files that killed processes left in a folder; once per process, and never raises.

    A writer holds a lock on its file, which ends with its process. An old bundle that was moved aside is kept if
    nothing replaced it.
    """
    if sys.platform == "win32" or folder in _SWEPT:
        return
    _SWEPT.add(folder)
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if (
                _HIDDEN.fullmatch(entry.name)
                and time.time() - entry.stat(follow_symlinks=False).st_mtime > STALE_SECONDS
            ):
                _sweep_one(Path(entry.path))


def _sweep_one(path: Path) -> None:
    if path.suffix == ASIDE and not os.path.lexists(path.with_name(path.stem[1:].rpartition(".")[0])):
        return
    with suppress(OSError):  # BlockingIOError: its writer is still running
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            remove(path)
        finally:
            os.close(descriptor)


def _is_hidden(name: str | bytes | int) -> bool:
    """Whether the path of an OSError is one of `_hidden` or inside one."""
    return not isinstance(name, int) and any(_HIDDEN.fullmatch(part) for part in Path(os.fsdecode(name)).parts)


def _hidden(target: Path, suffix: str) -> Path:
    """An unused name next to `target`, short enough even if the name of `target` has the maximum length."""
    name = os.fsdecode(os.fsencode(target.name)[:200])
    return target.with_name(f".{name}.{os.urandom(8).hex()}{suffix}")


def _check_regular(target: Path) -> None:
    if target.is_dir():
        raise InputError(f"{target} is a folder", "name a file in it")
    if target.exists() and not target.is_file():
        raise InputError(f"{target} is a device or a pipe, not a file", "name a file")


def _lock(descriptor: int) -> None:
    if sys.platform != "win32":
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _rename_new(source: Path, target: Path) -> None:
    """Renames a file without ever replacing another one. Raises FileExistsError."""
    try:
        os.link(source, target)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links, such as FAT: claim the name with an empty file instead
        target.open("xb").close()
        os.replace(source, target)


def _rename(source: Path, target: Path) -> None:
    """Renames a file or folder, replacing what is at `target`; that may be left at `source`."""
    if source.is_dir() or target.is_dir():
        if not os.path.lexists(target):
            try:
                os.rename(source, target)
            except OSError:
                if not os.path.lexists(target):  # otherwise another process created it first
                    raise
        if source.exists() and not _exchange(source, target):
            _replace_in_two_steps(source, target)
    else:
        os.replace(source, target)
    flush_to_disk(target.parent)


def _replace_in_two_steps(source: Path, target: Path) -> None:
    aside = source.with_suffix(ASIDE)
    os.rename(target, aside)
    try:
        os.rename(source, target)
    except BaseException:
        os.rename(aside, target)
        raise
    remove(aside)


def _exchange(first: Path, second: Path) -> bool:
    """Exchanges two paths atomically. Returns False if the system or file system cannot."""
    import ctypes  # slow to import, needed only for replacements

    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    current_folder, exchange = -100, 2
    return bool(rename(current_folder, os.fsencode(first), current_folder, os.fsencode(second), exchange) == 0)

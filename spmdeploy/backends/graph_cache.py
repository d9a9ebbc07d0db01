"""Caches what a backend prepares from a graph: optimized graphs and compiled models, bounded in size.

An entry is a folder named after its key. It is complete or absent (renamed into place), and every file is compared with
its recorded SHA-256 before it is used. Without a usable cache everything works, only slower.
"""

from __future__ import annotations

import hashlib
import json
import logging
import mmap
import os
import platform
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TypeVar

from spmdeploy.errors import SpmDeployError
from spmdeploy.files import atomic_replace_dir, user_cache

logger = logging.getLogger("spmdeploy")

MAX_CACHE_BYTES = 1 << 30
"""The least recently used entries beyond this total are removed."""
_SUMS = "sums.json"
_T = TypeVar("_T")


def cache_key(*facts: object) -> str:
    """Key of an entry made from `facts`, which must include everything that it depends on."""
    return hashlib.sha256(json.dumps([str(fact) for fact in (*facts, cpu_features())]).encode()).hexdigest()


@cache
def cpu_features() -> str:
    """Identifies the instruction sets of this processor."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() in ("flags", "Features"):
                return f"{platform.machine()} {value.strip()}"
    return f"{platform.machine()} {platform.processor()}"


def graph_cache_folder() -> Path:
    """Where entries are kept.

    Raises:
        UnavailableError: No home folder is known.
    """
    return user_cache() / "graphs"


def open_cached(key: str, load: Callable[[Path], _T], make: Callable[[Path], _T], plain: Callable[[], _T]) -> _T:
    """Load an entry, or make it.

    Args:
        key: See `cache_key`.
        load: Opens the entry in a folder. An exception counts as a damaged entry, which is made again.
        make: Opens the graph and writes the entry into a folder.
        plain: Opens the graph without the cache; used where the cache cannot be written to.
    """
    try:
        entry = graph_cache_folder() / key
        if _is_intact(entry):
            try:
                opened = load(entry)
                with suppress(OSError):
                    os.utime(entry)
                return opened
            except Exception as exc:
                _report(f"the cached graph {entry} cannot be used and is made again: {_first_line(exc)}")
        entry.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OSError, SpmDeployError) as exc:
        _report(f"graphs are not cached: {_first_line(exc)}")
        return plain()
    return _make(entry, make, plain)


def _make(entry: Path, make: Callable[[Path], _T], plain: Callable[[], _T]) -> _T:
    made: list[_T] = []
    try:
        with atomic_replace_dir(entry, overwrite=True) as folder:
            made.append(make(folder))
            sums = {path.name: _sha256_of(path) for path in sorted(folder.iterdir())}
            (folder / _SUMS).write_text(json.dumps(sums), encoding="utf-8")
        _remove_oldest(entry)
    except Exception as exc:
        if not made:
            opened = plain()  # raises what is wrong with the graph itself
            _report(f"graphs are not cached: {_first_line(exc)}")
            return opened
        _report(f"graphs are not cached: {_first_line(exc)}")
    return made[0]


def _is_intact(entry: Path) -> bool:
    """Whether the entry exists and its files are as they were written."""
    try:
        text = (entry / _SUMS).read_text(encoding="utf-8")
    except FileNotFoundError:
        return False
    try:
        sums = json.loads(text)
        intact = bool(sums) and all(_sha256_of(entry / name) == digest for name, digest in sums.items())
    except (OSError, ValueError, AttributeError, TypeError):
        intact = False
    if not intact:
        _report(f"the cached graph {entry} is damaged and is made again")
    return intact


def _sha256_of(path: Path) -> str:
    """In one call: the interpreter lock is waited for after each, and other threads import modules meanwhile."""
    with open(path, "rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return hashlib.sha256(content).hexdigest()


def _remove_oldest(newest: Path) -> None:
    """Keeps the total of all entries within `MAX_CACHE_BYTES`; `newest` stays."""
    with suppress(OSError):
        entries = sorted((path for path in newest.parent.iterdir() if path.is_dir()), key=_age, reverse=True)
        total = 0
        for entry in sorted(entries, key=lambda path: path != newest):
            total += sum(path.stat().st_size for path in entry.iterdir())
            if total > MAX_CACHE_BYTES and entry != newest:
                shutil.rmtree(entry, ignore_errors=True)


def _age(entry: Path) -> float:
    return entry.stat().st_mtime


_reported: set[str] = set()


def _report(message: str) -> None:
    """Logs a message once per process."""
    if message not in _reported:
        _reported.add(message)
        logger.warning(message)


def _first_line(exc: Exception) -> str:
    lines: Sequence[str] = str(exc).splitlines() or [type(exc).__name__]
    return lines[0][:300]

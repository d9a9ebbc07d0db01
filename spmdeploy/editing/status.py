"""The status file of a batch: the state of each row, from which an interrupted run resumes."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from spmdeploy.errors import InputError
from spmdeploy.files import translated
from spmdeploy.inputs import LocalOrRemote, read_input
from spmdeploy.remote import RemotePath, list_remote, remove_remote, write_remote

STATUS_FILE = "status.jsonl"
_SEGMENTS = "status/"
_SEGMENT_SECONDS = 5.0
_MAX_BYTES = 4 << 30


@dataclass(frozen=True)
class ItemStatus:
    """The state of one row. "started" occurs in the status file only."""

    row: int
    output: str | None
    """Relative to the output folder, so that the folder may move; None when the row names no usable one."""
    status: Literal["started", "done", "failed", "skipped"]
    error: str | None = None
    hint: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, one line of the status file."""
        return dict(vars(self))


class StatusLog(Protocol):
    """Where the events of a batch are recorded. `add` may be called from several threads."""

    earlier: dict[str, str]
    """The last status of each output in the runs before this one."""
    group: int
    """Rows to record as started at once."""

    def __enter__(self) -> StatusLog: ...

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None: ...

    def add(self, *statuses: ItemStatus) -> None:
        """Record statuses.

        Raises:
            InputError: They cannot be written.
        """

    def exists(self, output: str) -> bool:
        """Whether an output, relative to the folder, existed when it was last looked for."""
        ...


def open_status(output_dir: LocalOrRemote) -> StatusLog:
    """Return the log of an output folder.

    Raises:
        InputError: it cannot be read and written.
        UnavailableError: the credentials for a store, or its package, are missing.
    """
    return RemoteStatus(output_dir) if isinstance(output_dir, RemotePath) else StatusFile(output_dir)


class StatusFile:
    """`status.jsonl`: one line per event, appended at once.

    It survives a killed run: a line that was cut off is ignored and never joined with the next.
    """

    group = 1

    def __init__(self, output_dir: Path) -> None:
        """Create the folder. Raises InputError if the file in it cannot be read and written."""
        self.path = output_dir / STATUS_FILE
        try:
            output_dir.mkdir(parents=True, exist_ok=True)
            written = self.path.read_bytes() if self.path.exists() else b""
            self._stream = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (closed by __exit__)
        except OSError as exc:
            raise InputError(f"{exc.filename} cannot be written: {exc.strerror}", "name another folder") from exc
        if written and not written.endswith(b"\n"):
            self._stream.write("\n")
        self.earlier = _last_statuses([written])
        self._lock = threading.Lock()

    def __enter__(self) -> StatusFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stream.close()

    def add(self, *statuses: ItemStatus) -> None:
        with self._lock:
            try:
                self._stream.write(_lines(statuses))
                self._stream.flush()
            except OSError as exc:
                raise translated(exc, self.path, "write to") from exc

    def exists(self, output: str) -> bool:
        return (self.path.parent / output).exists()


class RemoteStatus:
    """`status.jsonl` in a store, where nothing can be appended: new objects below `status/`, merged at the end.

    An event "started" is stored before `add` returns; others within seconds. The folder is listed once, at the start.
    """

    group = 256

    def __init__(self, output_dir: RemotePath) -> None:
        self._dir = output_dir
        self._names = list_remote(output_dir)
        self._segments = sorted(name for name in self._names if name.startswith(_SEGMENTS))
        names = [name for name in (STATUS_FILE, *self._segments) if name in self._names]
        with ThreadPoolExecutor(16) as pool:
            self._contents = list(pool.map(lambda name: read_input(output_dir / name, _MAX_BYTES), names))
        self.earlier = _last_statuses(self._contents)
        self._waiting: list[ItemStatus] = []
        self._flushed = time.monotonic()
        self._lock = threading.Lock()

    def __enter__(self) -> RemoteStatus:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        self._flush()
        if kind is None:
            write_remote(self._dir / STATUS_FILE, b"\n".join(self._contents), overwrite=True)
            remove_remote([self._dir / name for name in self._segments])

    def add(self, *statuses: ItemStatus) -> None:
        with self._lock:
            self._waiting += statuses
            late = time.monotonic() - self._flushed > _SEGMENT_SECONDS
            if late or any(status.status == "started" for status in statuses):
                self._flush()

    def exists(self, output: str) -> bool:
        return output in self._names

    def _flush(self) -> None:
        if self._waiting:
            content = _lines(self._waiting).encode()
            name = f"{_SEGMENTS}{time.time_ns():020}-{os.urandom(4).hex()}.jsonl"
            write_remote(self._dir / name, content)
            self._segments.append(name)
            self._contents.append(content)
            self._names.update(status.output for status in self._waiting if status.output and status.status == "done")
            self._waiting = []
        self._flushed = time.monotonic()


def _lines(statuses: Iterable[ItemStatus]) -> str:
    # ASCII: a file name that is not valid Unicode would otherwise have no form here.
    return "".join(json.dumps(status.to_json()) + "\n" for status in statuses)


def _last_statuses(contents: Iterable[bytes]) -> dict[str, str]:
    last: dict[str, str] = {}
    for content in contents:
        for line in content.split(b"\n"):
            try:
                record = json.loads(line)
                last[record["output"]] = record["status"]
            except (ValueError, KeyError, TypeError, RecursionError):
                continue
    return last

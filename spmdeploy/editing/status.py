"""The status file of a batch: what became of each row, kept through an interruption."""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from spmdeploy.errors import InputError

STATUS_FILE = "status.jsonl"


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
        return dict(vars(self))


class StatusFile:
    """`status.jsonl`: one line per event, written at once. `add` may be called from several threads.

    It survives a killed run: a line that was cut off is ignored and never joined with the next.
    """

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
        self.earlier = _last_statuses(written)
        """The last status of each output in the runs before this one."""
        self._lock = threading.Lock()

    def __enter__(self) -> StatusFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stream.close()

    def add(self, status: ItemStatus) -> None:
        # ASCII: a file name that is not valid Unicode would otherwise have no form here.
        with self._lock:
            self._stream.write(json.dumps(status.to_json()) + "\n")
            self._stream.flush()


def _last_statuses(written: bytes) -> dict[str, str]:
    last: dict[str, str] = {}
    for line in written.split(b"\n"):
        try:
            record = json.loads(line)
            last[record["output"]] = record["status"]
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
    return last

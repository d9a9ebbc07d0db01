"""Ray actor on the nodes of a fleet: opens the model once and edits items."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spmdeploy.editing.batch import PreparedItem, edit_item
from spmdeploy.editing.editor import Editor
from spmdeploy.editing.status import ItemStatus
from spmdeploy.errors import SpmDeployError, UnavailableError
from spmdeploy.files import atomic_write, sha256, user_cache
from spmdeploy.remote import RemotePath, check_readable


@dataclass(frozen=True)
class WorkerSetup:
    """What a worker opens."""

    sha256: str
    """Of the packed bundle."""
    backend: str
    device: str
    precision: str
    public_key: str | None
    shared_file: Path | None
    """A file of the driver that must be here too; None if outputs go to a store."""
    stores: tuple[RemotePath, ...] = ()
    """A path in each store that the batch uses, which must be reachable from here."""


@dataclass(frozen=True)
class Opened:
    """What a worker has opened, or why not."""

    facts: tuple[str, ...]
    """Backend, provider, device and precision: equal on all nodes."""
    choices: tuple[str, ...]
    problem: str | None = None
    hint: str | None = None


@dataclass(frozen=True)
class ChunkResult:
    """The final statuses of the items that a worker has edited."""

    statuses: list[ItemStatus]
    seconds: float


class EditWorker:
    """Edits chunks of items, one at a time. Ray calls it from several threads."""

    def __init__(self) -> None:
        self._editor: Editor | None = None
        self._editing = threading.Lock()
        self._lock = threading.Lock()
        self._queued: set[int] = set()
        """Rows that have not been begun."""

    def open(self, bundle: NDArray[np.uint8], setup: WorkerSetup) -> Opened:
        """Open the editor. bundle: the packed bundle, in the memory that all workers of the node share."""
        from spmdeploy import open_editor

        try:
            if setup.shared_file is not None and not setup.shared_file.exists():
                raise UnavailableError(
                    f"{setup.shared_file.parent} is not the folder that the driver has under this name",
                    "name a folder on a file system that all nodes share, or s3://",
                )
            for path in setup.stores:
                check_readable(path)
            model = _place_bundle(bundle, setup.sha256)
            editor = open_editor(model, setup.backend, setup.device, setup.precision, setup.public_key)
        except SpmDeployError as exc:
            return Opened((), (), exc.problem, exc.hint)
        except Exception as exc:  # of a library: it must name the node, too
            return Opened((), (), f"{type(exc).__name__}: {exc}", None)
        self._editor, session = editor, editor.session
        device = "GPU" if session.device.startswith("cuda") else session.device.replace("cpu", "CPU")
        return Opened((session.backend, session.provider, device, session.precision), tuple(editor.choices))

    def run(self, items: list[PreparedItem]) -> ChunkResult:
        """Edit the items except those that `withdraw` takes away."""
        assert self._editor is not None
        with self._lock:
            self._queued |= {item.row for item in items}
        statuses, seconds = [], 0.0
        with self._editing:
            for item in items:
                with self._lock:
                    if item.row not in self._queued:
                        continue
                    self._queued.remove(item.row)
                start = time.perf_counter()
                statuses.append(_edit(self._editor, item))
                seconds += time.perf_counter() - start
        return ChunkResult(statuses, seconds)

    def withdraw(self) -> list[int]:
        """Take away the rows that have not been begun, and return them."""
        with self._lock:
            rows, self._queued = sorted(self._queued), set()
        return rows


def _edit(editor: Editor, item: PreparedItem) -> ItemStatus:
    try:
        return edit_item(editor, item)
    except MemoryError as exc:
        return ItemStatus(item.row, item.output, "failed", f"out of memory: {exc}", _MEMORY_HINT)
    except SpmDeployError as exc:  # OutOfMemoryError
        return ItemStatus(item.row, item.output, "failed", exc.problem, exc.hint or _MEMORY_HINT)


_MEMORY_HINT = "give editors more memory by fewer of them: --cores"


def _place_bundle(bundle: NDArray[np.uint8], expected: str) -> Path:
    """Write the bundle to this node's cache, once for all of its workers, and return its path.

    Raises:
        UnavailableError: it arrived with other bytes.
    """
    path = user_cache() / "fleet" / f"{expected}.spm"
    path.parent.mkdir(parents=True, exist_ok=True)
    if not (path.exists() and _file_digest(path) == expected):
        if hashlib.sha256(bundle.data).hexdigest() != expected:
            raise UnavailableError("the bundle was changed on its way to this node", "start the batch again")
        with atomic_write(path) as stream:
            stream.write(bundle.data)
    os.utime(path)
    return path


def _file_digest(path: Path) -> str:
    with open(path, "rb") as stream:
        return sha256(stream)


def describe_node(shared_file: str | None) -> Any:
    """Return a function that tells the versions on a node. It is sent by value: the node may lack this package."""

    def describe() -> dict[str, Any]:
        import os
        import platform

        facts: dict[str, Any] = {"python": platform.python_version(), "spmdeploy": None}
        try:
            from spmdeploy.version import __version__

            facts["spmdeploy"] = __version__
        except ImportError as exc:
            facts["missing"] = str(exc)
        import ray

        facts["ray"] = ray.__version__
        facts["shared"] = shared_file is None or os.path.exists(shared_file)
        return facts

    return describe

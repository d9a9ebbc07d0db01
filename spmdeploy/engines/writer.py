"""Writes and removes engines, in the engines/ of a bundle or in the user's cache.

The cache is used where a bundle cannot be written to. Engines can always be built again from the graphs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from spmdeploy.bundle.bundle import Bundle
from spmdeploy.bundle.storage import ENGINES
from spmdeploy.engines.record import ENGINE_SUFFIX, RECORD_FILE, EngineHost, EngineRecord
from spmdeploy.engines.store import Place, StoredEngine, cache_folder, find_engines
from spmdeploy.errors import InputError, UsageError
from spmdeploy.files import os_errors, put_in_place, staging_dir

LOG_FILE = "build.log"
PACKAGE = Path(os.path.realpath(__file__)).parents[1]


@dataclass(frozen=True)
class EnginePlace:
    """Where new engines are written."""

    folder: Path
    place: Place
    why: str

    @property
    def summary(self) -> str:
        """A sentence for messages."""
        return f"engines go into the {self.place}, {self.folder}: {self.why}"


def choose_place(bundle: Bundle, wanted: Place | None = None) -> EnginePlace:
    """The bundle where it takes engines, else the cache.

    Raises:
        UsageError: The bundle is wanted and takes none.
    """
    obstacle = _why_not_writable(bundle)
    if wanted == "bundle" and obstacle:
        raise UsageError(f"{bundle.path} takes no engines: {obstacle}", "let them go into the cache: --into cache")
    if wanted == "cache" or obstacle:
        return EnginePlace(cache_folder(), "cache", obstacle if obstacle else "as requested")
    return EnginePlace(bundle.path / ENGINES, "bundle", "as requested" if wanted else "it can be written to")


def _why_not_writable(bundle: Bundle) -> str | None:
    """Why no engine can be added to the bundle."""
    if not bundle.is_folder:
        return "the bundle is a zip"
    if PACKAGE in Path(os.path.realpath(bundle.path)).parents:
        return "the bundle is part of the installed package"
    if bundle.read_signature() is not None:
        return "the bundle is signed, and the signature would not cover them"
    if any(name.startswith(ENGINES) for name in bundle.files()):
        return "the bundle was shipped with engines, which are never changed"
    folder = bundle.path / ENGINES
    return None if os.access(folder if folder.is_dir() else bundle.path, os.W_OK) else "the bundle cannot be written to"


class EngineWriter:
    """A hidden folder in which one engine is prepared; `finish` puts it in place, whole or not at all.

    Without `finish` only the log of the build is kept, as `failed_log`. Raises InputError if nothing can be written.
    """

    def __init__(self, place: EnginePlace, name: str) -> None:
        """name: Graph and precision, for the log file of a build that fails."""
        self._place = place
        self._name = name
        self._stack = ExitStack()
        self._folder: Path
        self.failed_log = place.folder / f"{name}.failed.log"

    @property
    def log(self) -> Path:
        """Where to write the log of the build."""
        return self._folder / LOG_FILE

    def __enter__(self) -> EngineWriter:
        # Engines in the cache are executed: other users must not be able to add any.
        mode = 0o700 if self._place.place == "cache" else 0o777
        with _write_errors(self._place.folder):
            if self._place.folder.is_file():
                raise InputError(f"{self._place.folder} is a file, not a folder", "move it away")
            self._place.folder.mkdir(mode, parents=True, exist_ok=True)
            self._folder = self._stack.enter_context(staging_dir(self._place.folder / self._name))
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        if kind is not None and self.log.exists():
            with suppress(OSError):
                os.replace(self.log, self.failed_log)
        self._stack.close()

    def finish(self, record: EngineRecord, content: bytes) -> Path:
        """Writes engine and record; an engine of the same key is replaced. Returns the path of the engine."""
        target = self._place.folder / record.key
        with _write_errors(target):
            (self._folder / record.engine.file).write_bytes(content)
            (self._folder / RECORD_FILE).write_bytes(record.to_bytes())
            put_in_place(self._folder, target)
            self.failed_log.unlink(missing_ok=True)
        return target / record.engine.file


@contextmanager
def _write_errors(target: Path) -> Iterator[None]:
    try:
        with os_errors(target, "write"):
            yield
    except InputError as exc:
        raise InputError(exc.problem, f"{exc.hint}; SPMDEPLOY_CACHE names another cache") from exc


def remove_stale_engines(bundle: Bundle, host: EngineHost | None = None) -> list[StoredEngine]:
    """Removes engines with problems and those that will never run here again; returns what they were.

    Engines for targets, and those whose library or driver is currently missing, are kept, as are engines that were
    shipped with the bundle or are in a zip.

    Raises:
        InputError: Something cannot be removed.
    """
    removed = []
    for engine in find_engines(bundle, host):
        if engine.shipped or not (engine.problems or engine.permanent):
            continue
        if engine.place == "bundle" and not bundle.is_folder:
            continue
        with _write_errors(engine.path):
            _remove(engine)
        removed.append(engine)
    return removed


def _remove(engine: StoredEngine) -> None:
    """Removes the file, with the last engine of a folder also record, log and folder, and nothing else."""
    folder = engine.path.parent
    engine.path.unlink(missing_ok=True)
    if engine.record is not None or not any(folder.glob(f"*{ENGINE_SUFFIX}")):
        for name in (RECORD_FILE, LOG_FILE):
            (folder / name).unlink(missing_ok=True)
        with suppress(OSError):  # other files are in the folder
            folder.rmdir()

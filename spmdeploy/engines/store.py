"""Finds, checks, writes and removes engines, in the engines/ of a bundle or in the user's cache.

Both hold a folder for each engine, named by the key of its record, with the engine, engine.json and the log of the
build. The cache is used where a bundle cannot be written to. Engines can always be built again from the graphs: one
that does not fit is never loaded, and `clean` reports why before it removes any.

A bundle may be shipped with engines, which SHA256SUMS then lists: they are never changed, added to or removed.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from spmdeploy.bundle.bundle import Bundle
from spmdeploy.bundle.storage import ENGINES, SUMS, FileStore, FolderStore, open_storage
from spmdeploy.engines.library import local_host
from spmdeploy.engines.record import (
    BUILD_AGAIN,
    ENGINE_SUFFIX,
    RECORD_FILE,
    EngineHost,
    EngineRecord,
    Verification,
    incompatibilities,
    operating_system,
    permanent_incompatibilities,
)
from spmdeploy.errors import BundleError, InputError, UnavailableError, UsageError
from spmdeploy.files import atomic_write, os_errors, sha256, user_cache

MAX_RECORD_BYTES = 1 << 20
logger = logging.getLogger("spmdeploy")

Place = Literal["bundle", "cache"]


@dataclass(frozen=True)
class StoredEngine:
    """A stored engine with its record, checked without loading it."""

    path: Path
    """For messages; there is no such file if the bundle is a zip."""
    place: Place
    record: EngineRecord | None
    """None if there is none that can be read."""
    problems: tuple[str, ...]
    """Why it must not be loaded: corrupt, renamed, or built from a graph that the bundle no longer holds."""
    incompatibilities: tuple[str, ...]
    """Why it cannot run on the machine that it was checked for."""
    permanent: tuple[str, ...]
    """Those incompatibilities that only another engine can resolve."""
    shipped: bool
    """Whether SHA256SUMS lists it, which makes it a part of the bundle."""
    _store: FileStore = field(repr=False)
    _folder: str = field(repr=False)

    @property
    def fit(self) -> bool:
        """Whether the engine is intact and made for this machine."""
        return not self.problems and not self.incompatibilities

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, with the engine's record where it can be read."""
        record = None if self.record is None else self.record.to_json()
        result = {
            "shipped": self.shipped,
            "fit": self.fit,
            "faults": list(self.problems),
            "differences": list(self.incompatibilities),
        }
        return {"path": str(self.path), "place": self.place, **result, "record": record}

    @property
    def reasons(self) -> tuple[str, ...]:
        """All problems and incompatibilities."""
        return self.problems + self.incompatibilities

    def read(self) -> bytes:
        """The content of the engine, after checking its hash.

        Raises:
            BundleError: It is not `fit`; lists every reason.
        """
        self.require_compatible()
        return self.content()

    def content(self) -> bytes:
        """Like `read`, also for engines of another machine.

        Raises:
            BundleError: The engine has problems.
        """
        if self.record is None or self.problems:
            raise _unfit(self.path, self.problems)
        record = self.record
        name = self._folder + record.engine.file
        try:
            with self._store.open(name) as stream:
                content = stream.read(record.engine.bytes)
        except OSError as exc:
            raise _unfit(self.path, (f"it cannot be read: {exc.strerror or exc}",)) from exc
        if fault := _content_problem(record, len(content), hashlib.sha256(content).hexdigest()):
            raise _unfit(self.path, (fault,))
        return content

    def require_compatible(self) -> EngineRecord:
        """The record of an engine that is `fit`.

        Raises:
            BundleError: It is not; gives every reason.
        """
        if self.record is None or not self.fit:
            raise _unfit(self.path, self.reasons)
        return self.record

    def with_verification(self, verification: Verification) -> StoredEngine:
        """Adds the result of the golden edits to engine.json.

        Raises:
            InputError: The file cannot be written.
        """
        record = replace(self.require_compatible(), verification=verification)
        path = self.path.with_name(RECORD_FILE)
        if self.shipped:
            raise InputError(
                f"{path}: cannot be written: it was shipped with the bundle", "shipped engines never change"
            )
        with atomic_write(path) as stream:
            stream.write(record.to_bytes())
        return replace(self, record=record)


def _unfit(path: Path, reasons: tuple[str, ...]) -> BundleError:
    return BundleError(f"{path} does not fit: {'; '.join(reasons)}", BUILD_AGAIN)


def find_engines(bundle: Bundle, host: EngineHost | None = None, hashing: bool = True) -> list[StoredEngine]:
    """Finds the engines of a bundle, in it and in the cache, fit or not, sorted by path.

    Args:
        host: The machine to check for; None for this one, which is examined only when there is an engine.
        hashing: Whether to hash the engines now; `StoredEngine.read` does so in any case.

    Raises:
        BundleError: The bundle cannot be read.
    """
    found: list[StoredEngine] = []
    for store, prefix, place in _stores(bundle):
        for folder, names in _folders(store, prefix):
            host = host or local_host()
            checked = _check_folder(bundle, store, folder, names, host, hashing, place)
            found += [engine for engine in checked if place == "bundle" or _concerns(bundle, engine.record)]
    return sorted(found, key=lambda engine: engine.path)


def named_engines(bundle: Bundle, names: Sequence[str]) -> list[StoredEngine]:
    """The engines with the given names, for any machine, each key once, sorted by key.

    Args:
        names: Whole keys, or parts between their dashes: sm86, edit, fp16, tensorrt_rtx, b8.

    Raises:
        UsageError: No engine has one of the names; lists the engines.
    """
    found = find_engines(bundle, EngineHost({}, None, *operating_system()), hashing=False)
    found.sort(key=lambda engine: (not engine.problems, engine.place == "bundle"))  # of equal keys the last one counts
    by_key = {engine.record.key: engine for engine in found if engine.record}
    named: dict[str, StoredEngine] = {}
    for name in names:
        keys = [key for key in by_key if name == key or name in key.split("-")]
        if not keys:
            available = ", ".join(sorted(by_key)) or "none"
            raise UsageError(f"{bundle.path}: no engine is {name!r}; there is {available}", "build it: spmdeploy build")
        named |= {key: by_key[key] for key in keys}
    return [named[key] for key in sorted(named)]


def _stores(bundle: Bundle) -> list[tuple[FileStore, str, Place]]:
    """Stores to search, and the prefix of engines in each."""
    with os_errors(bundle.path, "read", BundleError):
        stores: list[tuple[FileStore, str, Place]] = [(open_storage(bundle.path), ENGINES, "bundle")]
    try:
        cache = cache_folder()
        if cache.is_dir():
            stores.append((FolderStore(cache), "", "cache"))
    except (OSError, BundleError, UnavailableError) as exc:  # such as a home folder that this user may not enter
        logger.info("engines in the cache are not used: %s", exc)
    return stores


def _folders(store: FileStore, prefix: str) -> Iterator[tuple[str, list[str]]]:
    """Folders below `prefix` that hold an engine or a record, with the names in them; both "" or end with a slash."""
    folders: dict[str, list[str]] = {}
    for path in store.sizes:
        folder, _, name = path.rpartition("/")
        hidden = any(part.startswith(".") for part in path.removeprefix(prefix).split("/"))
        if path.startswith(prefix) and not hidden and (name == RECORD_FILE or name.endswith(ENGINE_SUFFIX)):
            folders.setdefault(folder and folder + "/", []).append(name)
    yield from sorted(folders.items())


def check_engine(path: Path, host: EngineHost | None = None) -> StoredEngine:
    """Checks one engine by its path, without its bundle, so not whether it is stale.

    Raises:
        InputError: There is no engine at the path.
    """
    if not path.is_file():
        raise InputError(f"there is no {path}", "give an engine with its engine.json beside it")
    try:
        store = FolderStore(path.parent)
    except OSError as exc:
        raise InputError(f"{path.parent}: cannot be read: {exc}", "may you read that folder?") from exc
    names = [name for name in store.sizes if name == RECORD_FILE or name.endswith(ENGINE_SUFFIX)]
    checked = _check_folder(None, store, "", names, host or local_host(), True, "bundle")
    return next(engine for engine in checked if engine.path == path)


def _check_folder(
    bundle: Bundle | None,
    store: FileStore,
    folder: str,
    names: list[str],
    host: EngineHost,
    hashing: bool,
    place: Place,
) -> Iterator[StoredEngine]:
    """The engine that the folder's record describes, then engine files that it does not describe."""
    shown = store.shown / folder
    engines = sorted(name for name in names if name.endswith(ENGINE_SUFFIX))
    covered = {} if bundle is None or place == "cache" else bundle.files()
    shipped = any(folder + name in covered for name in names)
    if links := sorted(name for name in names if folder + name in store.outside - covered.keys()):
        leads_out = f"{links[0]} is a link that leads out of {store.shown}, and no hash covers it"
        for name in engines or [RECORD_FILE]:
            yield StoredEngine(shown / name, place, None, (leads_out,), (), (), shipped, store, folder)
        return
    record, fault = _read_record(store, folder) if RECORD_FILE in names else (None, f"no {RECORD_FILE} beside it")
    if record is None:
        for name in engines or [RECORD_FILE]:
            yield StoredEngine(shown / name, place, None, (str(fault),), (), (), shipped, store, folder)
        return
    problems = tuple(_problems(bundle, store, folder, record, hashing))
    if bundle is not None and place == "bundle":
        problems += tuple(_unsigned(bundle, store, folder, record))
    if others := [name for name in engines if name != record.engine.file]:
        if record.engine.file not in engines:
            problems = (f"{record.engine.file} is missing; was it renamed to {', '.join(others)}?", *problems)
    elif not engines:
        problems = (f"{record.engine.file} is missing", *problems)
    reasons, permanent = incompatibilities(record, host), permanent_incompatibilities(record, host)
    yield StoredEngine(shown / record.engine.file, place, record, problems, reasons, permanent, shipped, store, folder)
    for name in others:
        unlisted = f"{RECORD_FILE} beside it describes {record.engine.file}, not this file"
        yield StoredEngine(shown / name, place, None, (unlisted,), (), (), shipped, store, folder)


def _read_record(store: FileStore, folder: str) -> tuple[EngineRecord | None, str | None]:
    """The record, or why it cannot be read."""
    name = folder + RECORD_FILE
    if store.sizes[name] > MAX_RECORD_BYTES:
        return None, f"{RECORD_FILE} has {store.sizes[name]} bytes, more than {MAX_RECORD_BYTES}"
    try:
        with store.open(name) as stream:
            return EngineRecord.from_bytes(stream.read(store.sizes[name]), RECORD_FILE), None
    except BundleError as exc:
        return None, exc.problem
    except OSError as exc:
        return None, f"{RECORD_FILE} cannot be read: {exc.strerror or exc}"


def _problems(
    bundle: Bundle | None, store: FileStore, folder: str, record: EngineRecord, hashing: bool
) -> Iterator[str]:
    if (store.shown / folder).absolute().name != record.key:
        yield f"{RECORD_FILE} belongs to the folder {record.key}: moved or altered"
    if bundle is not None:
        yield from _stale(bundle, record)
    name = folder + record.engine.file
    if name in store.sizes:
        size = store.sizes[name]
        digest = _digest(store, name) if hashing and size == record.engine.bytes else record.engine.sha256
        if fault := _content_problem(record, size, digest):
            yield fault


def _unsigned(bundle: Bundle, store: FileStore, folder: str, record: EngineRecord) -> Iterator[str]:
    """Where an engine in the bundle contradicts SHA256SUMS or, if a signature is required, is not listed there."""
    covered = bundle.files()
    digests = {folder + RECORD_FILE: _digest(store, folder + RECORD_FILE)}
    digests[folder + record.engine.file] = record.engine.sha256
    if covered.keys().isdisjoint(digests):
        if bundle.signature is not None:
            yield f"the signature that is required does not cover it: {SUMS} does not list it"
        return
    for name, digest in digests.items():
        if name not in covered or bundle.digest(name) != digest:
            yield f"tampered with or damaged: {SUMS} lists another {name.removeprefix(folder)}"


def _stale(bundle: Bundle, record: EngineRecord) -> Iterator[str]:
    there = bundle.files()
    for source in (record.onnx, record.weights):
        if source is None:
            continue
        now = bundle.digest(source.file) if source.file in there else None
        if now is None:
            yield f"stale: built from {source.file}, which the bundle does not hold"
        elif now != source.sha256:
            yield f"stale: built from another {source.file}: SHA-256 {source.sha256[:12]}…, here {now[:12]}…"


def _content_problem(record: EngineRecord, size: int, digest: str) -> str | None:
    if size != record.engine.bytes:
        fault = "truncated" if size < record.engine.bytes else "tampered with or damaged"
        return f"{fault}: {size} bytes, but {RECORD_FILE} says {record.engine.bytes}"
    if digest != record.engine.sha256:
        expected = f"{RECORD_FILE} says {record.engine.sha256[:12]}…"
        return f"tampered with or damaged: SHA-256 is {digest[:12]}…, but {expected}"
    return None


def _digest(store: FileStore, name: str) -> str:
    try:
        with store.open(name) as stream:
            return sha256(stream, store.sizes[name])
    except (OSError, BundleError) as exc:
        return f"unreadable ({exc})"


def _concerns(bundle: Bundle, record: EngineRecord | None) -> bool:
    """Whether an engine in the cache belongs to this bundle, by graph or by name, or to no bundle."""
    if record is None or record.bundle == bundle.manifest.name:
        return True
    return record.onnx.sha256 in {graph.sha256 for graph in bundle.manifest.graphs}


def cache_folder() -> Path:
    """The folder for engines of bundles that cannot be written to.

    Raises:
        UnavailableError: No home folder is known.
    """
    return user_cache() / "engines"

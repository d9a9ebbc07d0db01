"""Packs bundles into one file, unpacks them, and extracts the parts that a device needs."""

from __future__ import annotations

import dataclasses
import hashlib
import stat
import unicodedata
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from spmdeploy.bundle.bundle import Bundle, open_bundle
from spmdeploy.bundle.manifest import EDIT, EDIT_ON_CPU, GraphRecord, Manifest
from spmdeploy.bundle.signature import SecretKey, sign
from spmdeploy.bundle.storage import ENGINES, MANIFEST, PACK_AGAIN, SIGNATURE, SUMS, WHAT_IT_IS
from spmdeploy.bundle.writer import check_replaceable, format_checksums
from spmdeploy.engines.record import RECORD_FILE
from spmdeploy.engines.store import named_engines
from spmdeploy.errors import BundleError, InputError, UsageError
from spmdeploy.files import atomic_replace_dir, atomic_write
from spmdeploy.types import Progress

CARD = "card.md"


class _File(NamedTuple):
    """A file to write into a zip. Its content is read only then, as all files may not fit into memory."""

    name: str
    sha256: str
    read: Callable[[], bytes]


def _from_bytes(name: str, content: bytes) -> _File:
    return _File(name, hashlib.sha256(content).hexdigest(), lambda: content)


def _no_progress(done: int, total: int) -> None:
    pass


def pack(
    bundle: Bundle,
    target: str | Path,
    overwrite: bool = False,
    key: SecretKey | None = None,
    progress: Progress = _no_progress,
) -> Path:
    """Writes a bundle as one uncompressed zip, checking every hash; equal bundles give equal files.

    Files that SHA256SUMS does not list, such as engines built on this machine, are left out.

    Args:
        key: Signs the result; None keeps a signature that the bundle has.

    Raises:
        BundleError: The bundle is corrupt.
        InputError: The target cannot be written.
    """
    signature = bundle.read_signature() if key is None else _sign(bundle.sums, bundle.manifest, key)
    files = [_File(name, bundle.digest(name), partial(bundle.read, name)) for name in bundle.files()]
    return _write_zip(target, overwrite, bundle.sums, signature, files, progress)


def unpack(bundle: Bundle, folder: str | Path, overwrite: bool = False, progress: Progress = _no_progress) -> Bundle:
    """Writes the files that SHA256SUMS lists, and its signature, into a new folder, after checking all hashes.

    Args:
        bundle: A bundle in one file.
        folder: Path of the new bundle.
        overwrite: Replace an intact bundle at that path.
        progress: Called with the number of files written and their total.

    Returns:
        The new bundle, opened.

    Raises:
        BundleError: The bundle is corrupt; nothing has been written.
        InputError: The folder cannot be written.
    """
    if bundle.is_folder:
        raise InputError(f"{bundle.path}: a folder already", "unpack takes the one file that pack writes")
    _check_names_differ(bundle.files(), bundle.path)
    bundle.check_all()
    signature = bundle.read_signature()
    with atomic_replace_dir(folder, overwrite, check_replaceable) as building:
        _write_new(building / SUMS, bundle.sums)
        if signature is not None:
            _write_new(building / SIGNATURE, signature)
        for number, name in enumerate(bundle.files(), start=1):
            _write_new(building / name, bundle.read(name))
            progress(number, len(bundle.files()))
    return open_bundle(folder)


def _check_names_differ(names: Iterable[str], shown: Path) -> None:
    """Refuses names that are equal on a case-insensitive file system."""
    folded = Counter(unicodedata.normalize("NFC", name).casefold() for name in names)
    twice = next((name for name, count in folded.items() if count > 1), None)
    within = next((name for name in folded for above in PurePosixPath(name).parents if str(above) in folded), None)
    if twice or within:
        fault = f"two entries are {twice!r} where case is ignored" if twice else f"{within!r} is inside a file"
        raise BundleError(f"{shown}: {fault}", PACK_AGAIN)


def _write_new(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "xb") as stream:
        stream.write(content)


def _sign(sums: bytes, manifest: Manifest, key: SecretKey) -> bytes:
    return sign(sums, key, f"spmdeploy bundle {manifest.name} of {manifest.created}")


def extract_subset(
    bundle: Bundle,
    target: str | Path,
    keep: Sequence[str],
    engines: Sequence[str] = (),
    overwrite: bool = False,
    key: SecretKey | None = None,
    progress: Progress = _no_progress,
) -> Bundle:
    """Packs some graphs and engines of a bundle, together with all files that are neither.

    Files keep their hashes; manifest and card no longer name the graphs that are left out. A signature of the bundle
    does not fit the result and is left out.

    Args:
        keep: Precisions (fp16), graphs (edit), both (edit.fp32), or cpu for all graphs made for CPUs.
        engines: Keys or parts of them (sm86), in the bundle or the cache; the result's SHA256SUMS lists them.
        key: Signs the result.

    Raises:
        UsageError: No graph to edit with would be left, or an engine was built from a graph that is left out.
    """
    kept = _kept_graphs(bundle, keep)
    needed = {name for record in kept for name in record.files}
    dropped = {name for record in bundle.manifest.graphs for name in record.files} - needed
    limits = {record.precision: bundle.manifest.limits[record.precision] for record in kept}
    manifest = dataclasses.replace(bundle.manifest, graphs=kept, limits=limits)
    files = _engine_files(bundle, engines, dropped)
    for name in bundle.files():
        if name == MANIFEST:
            files.append(_from_bytes(name, manifest.to_bytes()))
        elif name == CARD:
            files.append(_from_bytes(name, _card_without(bundle.read(name), dropped)))
        elif name not in dropped and not name.startswith(ENGINES):
            files.append(_File(name, bundle.digest(name), partial(bundle.read, name)))
    sums = format_checksums({file.name: file.sha256 for file in files})
    signature = None if key is None else _sign(sums, manifest, key)
    return open_bundle(_write_zip(target, overwrite, sums, signature, files, progress))


def _engine_files(bundle: Bundle, names: Sequence[str], dropped: Iterable[str]) -> list[_File]:
    """Engines and their records."""
    files = []
    for engine in named_engines(bundle, names):
        record = engine.record
        assert record is not None
        if record.onnx.file in dropped:
            problem = f"the engine {record.key} was built from {record.onnx.file}, which is left out"
            raise UsageError(f"{bundle.path}: {problem}", "keep that graph too, or leave the engine out")
        folder = f"{ENGINES}{record.key}/"
        files.append(_from_bytes(folder + RECORD_FILE, record.to_bytes()))
        files.append(_File(folder + record.engine.file, record.engine.sha256, engine.content))
    return files


def _kept_graphs(bundle: Bundle, keep: Sequence[str]) -> tuple[GraphRecord, ...]:
    graphs = bundle.manifest.graphs
    available = ", ".join(f"{record.graph}.{record.precision}" for record in graphs)
    for name in keep:
        if not any(name in _names(record) for record in graphs):
            raise UsageError(f"{bundle.path}: holds no graph {name}; there is {available}", "keep fp16 or cpu")
    kept = tuple(record for record in graphs if not _names(record).isdisjoint(keep))
    if not any(record.graph in (EDIT, EDIT_ON_CPU) for record in kept):
        left = ", ".join(keep) or "nothing"
        problem = f"{left} leaves no graph to edit with; there is {available}"
        raise UsageError(problem, "keep an edit graph too")
    return kept


def _names(record: GraphRecord) -> set[str]:
    names = {record.precision, record.graph, f"{record.graph}.{record.precision}"}
    return names | {"cpu"} if record.graph.endswith("_cpu") else names


def _card_without(card: bytes, dropped: Iterable[str]) -> bytes:
    """The card without table rows about dropped files."""
    lines = card.decode("utf-8", "surrogateescape").splitlines(keepends=True)
    marks = [f"`{name}`" for name in dropped]
    kept = [line for line in lines if not (line.startswith("|") and any(mark in line for mark in marks))]
    return "".join(kept).encode("utf-8", "surrogateescape")


def _write_zip(
    target: str | Path,
    overwrite: bool,
    sums: bytes,
    signature: bytes | None,
    files: Sequence[_File],
    progress: Progress,
) -> Path:
    """Writes the zip, SHA256SUMS and signature first, so that other files can be checked while they are read."""
    target = Path(target)
    if target.suffix.lower() in WHAT_IT_IS:
        raise InputError(f"{target}: {target.suffix} is no suffix of a bundle", "call it NAME.spm")
    with atomic_write(target, overwrite, check=check_replaceable) as stream:
        try:
            # Without zip64, which `open_bundle` refuses: the two halves of such a header may contradict each other.
            with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED, allowZip64=False) as archive:
                archive.writestr(_entry(SUMS), sums)
                if signature is not None:
                    archive.writestr(_entry(SIGNATURE), signature)
                for number, file in enumerate(sorted(files), start=1):
                    archive.writestr(_entry(file.name), file.read())
                    progress(number, len(files))
        except zipfile.LargeZipFile as exc:
            raise BundleError(
                f"{target}: more than 2 GiB, too large for one zip", "slim it or copy the folder"
            ) from exc
    return target


def _entry(name: str) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
    entry.create_system = 3  # Unix, on every platform
    entry.external_attr = (stat.S_IFREG | 0o644) << 16
    return entry

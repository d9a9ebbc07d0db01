"""A bundle on its way to a device: packed into one file, unpacked again, and slimmed to what the device needs."""

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

"""Told how many files are done, and how many there are."""
CARD = "card.md"


class _File(NamedTuple):
    """A file on its way into a zip, read when its turn comes: all of them at once might not fit the memory."""

    name: str
    sha256: str
    read: Callable[[], bytes]


def _made(name: str, content: bytes) -> _File:
    return _File(name, hashlib.sha256(content).hexdigest(), lambda: content)


def _no_progress(done: int, total: int) -> None:
    pass


# ----------------------------------------------------------------------------------------------------- pack and unpack


def pack(
    bundle: Bundle,
    target: str | Path,
    overwrite: bool = False,
    key: SecretKey | None = None,
    progress: Progress = _no_progress,
) -> Path:
    """Writes a bundle as one uncompressed zip, hashing every file on the way: the same bytes for the same bundle.

    key: signs it; without one a signature that is in it already goes along. What SHA256SUMS does not cover stays
    behind: the engines that this machine built for itself. Raises BundleError, or InputError where nothing can be
    written.
    """
    signature = bundle.read_signature() if key is None else _sign(bundle.sums, bundle.manifest, key)
    files = [_File(name, bundle.digest(name), partial(bundle.read, name)) for name in bundle.files()]
    return _write_zip(target, overwrite, bundle.sums, signature, files, progress)


def unpack(bundle: Bundle, folder: str | Path, overwrite: bool = False, progress: Progress = _no_progress) -> Bundle:
    """Writes what SHA256SUMS covers, and its signature, into a new folder, after all of it has been checked.

    Nothing is re-made: hashes and signature stay what they were. Surplus files stay behind. Raises BundleError before
    anything is written, or InputError where nothing can be.
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
    """Names that are one and the same to a file system that knows no case would overwrite each other."""
    folded = Counter(unicodedata.normalize("NFC", name).casefold() for name in names)
    twice = next((name for name, count in folded.items() if count > 1), None)
    within = next((name for name in folded for above in PurePosixPath(name).parents if str(above) in folded), None)
    if twice or within:
        fault = f"two entries are {twice!r} where case is ignored" if twice else f"{within!r} lies inside a file"
        raise BundleError(f"{shown}: {fault}", PACK_AGAIN)


def _write_new(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "xb") as stream:
        stream.write(content)


def _sign(sums: bytes, manifest: Manifest, key: SecretKey) -> bytes:
    return sign(sums, key, f"spmdeploy bundle {manifest.name} of {manifest.created}")


# ------------------------------------------------------------------------------------------------------------- slim


def extract_subset(
    bundle: Bundle,
    target: str | Path,
    keep: Sequence[str],
    engines: Sequence[str] = (),
    overwrite: bool = False,
    key: SecretKey | None = None,
    progress: Progress = _no_progress,
) -> Bundle:
    """Packs only the graphs that `keep` names and the engines that `engines` names; all that is neither goes along.

    keep: precisions (fp16), graphs (edit), both at once (edit.fp32), or cpu for all graphs made for CPUs. engines: keys
    or parts of them (sm86), from the bundle or the cache; SHA256SUMS lists them from then on. Files that stay keep
    their hashes; manifest and card no longer name the graphs that went. key: signs the result; an older signature no
    longer fits.
    Raises UsageError where nothing would be left to edit with, or for an engine of a graph that goes.
    """
    kept = _kept_graphs(bundle, keep)
    needed = {name for record in kept for name in record.files}
    dropped = {name for record in bundle.manifest.graphs for name in record.files} - needed
    limits = {record.precision: bundle.manifest.limits[record.precision] for record in kept}
    manifest = dataclasses.replace(bundle.manifest, graphs=kept, limits=limits)
    files = _engine_files(bundle, engines, dropped)
    for name in bundle.files():
        if name == MANIFEST:
            files.append(_made(name, manifest.to_bytes()))
        elif name == CARD:
            files.append(_made(name, _card_without(bundle.read(name), dropped)))
        elif name not in dropped and not name.startswith(ENGINES):
            files.append(_File(name, bundle.digest(name), partial(bundle.read, name)))
    sums = format_checksums({file.name: file.sha256 for file in files})
    signature = None if key is None else _sign(sums, manifest, key)
    return open_bundle(_write_zip(target, overwrite, sums, signature, files, progress))


def _engine_files(bundle: Bundle, words: Sequence[str], dropped: Iterable[str]) -> list[_File]:
    """Engines and their records."""
    files = []
    for engine in named_engines(bundle, words):
        record = engine.record
        assert record is not None
        if record.onnx.file in dropped:
            problem = f"the engine {record.key} was built from {record.onnx.file}, which goes"
            raise UsageError(f"{bundle.path}: {problem}", "keep that graph too, or leave the engine out")
        folder = f"{ENGINES}{record.key}/"
        files.append(_made(folder + RECORD_FILE, record.to_bytes()))
        files.append(_File(folder + record.engine.file, record.engine.sha256, engine.content))
    return files


def _kept_graphs(bundle: Bundle, keep: Sequence[str]) -> tuple[GraphRecord, ...]:
    graphs = bundle.manifest.graphs
    there = ", ".join(f"{record.graph}.{record.precision}" for record in graphs)
    for word in keep:
        if not any(word in _names(record) for record in graphs):
            raise UsageError(f"{bundle.path}: holds no graph {word}; there is {there}", "keep fp16, say, or cpu")
    kept = tuple(record for record in graphs if not _names(record).isdisjoint(keep))
    if not any(record.graph in (EDIT, EDIT_ON_CPU) for record in kept):
        left = ", ".join(keep) or "nothing"
        raise UsageError(f"{left} leaves no device anything to edit with; there is {there}", "keep an edit graph too")
    return kept


def _names(record: GraphRecord) -> set[str]:
    names = {record.precision, record.graph, f"{record.graph}.{record.precision}"}
    return names | {"cpu"} if record.graph.endswith("_cpu") else names


def _card_without(card: bytes, dropped: Iterable[str]) -> bytes:
    """The card less the rows of its tables that are about dropped files."""
    lines = card.decode("utf-8", "surrogateescape").splitlines(keepends=True)
    marks = [f"`{name}`" for name in dropped]
    kept = [line for line in lines if not (line.startswith("|") and any(mark in line for mark in marks))]
    return "".join(kept).encode("utf-8", "surrogateescape")


# -------------------------------------------------------------------------------------------------------------- the zip


def _write_zip(
    target: str | Path,
    overwrite: bool,
    sums: bytes,
    signature: bytes | None,
    files: Sequence[_File],
    progress: Progress,
) -> Path:
    """SHA256SUMS and its signature first, so that whoever reads on from the start may judge the rest as it comes."""
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
        except zipfile.LargeZipFile as error:
            raise BundleError(
                f"{target}: more than 2 GiB, too large for one zip", "slim it or copy the folder"
            ) from error
    return target


def _entry(name: str) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
    entry.create_system = 3  # Unix, wherever it is packed
    entry.external_attr = (stat.S_IFREG | 0o644) << 16
    return entry

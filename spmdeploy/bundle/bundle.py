"""Opens, reads and verifies `.spm` bundles.

A bundle is a folder, or an uncompressed zip of one:

    manifest.json      description (`Manifest`)
    graphs/*.onnx      the graphs
    graphs/*.weights   weights that several graphs share
    golden/NAME/       an edit to repeat: image, labels, mask, expected, optionally instances and refined, all PNG
    card.md            model card
    engines/           engines that a device built for itself, with records of their own, and engines that were shipped
    SHA256SUMS         `sha256sum -c SHA256SUMS` covers every file but itself, its signature and engines built later
    SHA256SUMS.minisig optional: a signature over SHA256SUMS, and so over everything that is shipped

Opening checks structure, names and sizes. Content is hashed when it is read, and exactly the bytes that were hashed
are returned. The hashes find damage and mix-ups; tampering is found by the signature alone, because an attacker who
can change a file can change SHA256SUMS too.
"""

from __future__ import annotations

import hashlib
import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, NamedTuple

from spmdeploy.bundle.external_data import external_locations
from spmdeploy.bundle.manifest import (
    EDIT,
    ON_CPU,
    REFINE,
    GraphRecord,
    Manifest,
    check_version,
)
from spmdeploy.bundle.storage import (
    COPY_AGAIN,
    ENGINES,
    FETCH_LFS,
    GOLDEN_IMAGES,
    GOLDEN_REFINED,
    LFS_POINTER,
    MANIFEST,
    MAX_FILE_BYTES,
    SIGNATURE,
    SUMS,
    FileStore,
    FolderStore,
    corrupt_bundle_error,
    open_storage,
)
from spmdeploy.errors import BundleError
from spmdeploy.files import is_safe_relative_path, os_errors, quote_path, sha256
from spmdeploy.model import is_checkpoint
from spmdeploy.serialization import shorten

if TYPE_CHECKING:
    from spmdeploy.bundle.signature import PublicKey, Signature

MAX_TEXT_BYTES = 4 << 20  # manifest.json and SHA256SUMS, read before anything is trusted
_WEIGHTS = ((EDIT, "fp32"), (ON_CPU[EDIT], "fp32"))  # the graphs that weights can be read back from


class GraphFiles(NamedTuple):
    """The content of a graph and of its external data files."""

    content: bytes
    weights: Mapping[str, bytes] = {}
    """Contents of the external data files, by the names that the graph has for them."""


@dataclass(frozen=True)
class Bundle:
    """An opened bundle; made by `open_bundle`. It holds no open file and may be used from several threads."""

    path: Path
    manifest: Manifest
    sums: bytes = field(repr=False)
    """The content of SHA256SUMS, which a signature covers."""
    signature: Signature | None
    """The signature that was required when opening; None if none was required, though there may be one."""
    _store: FileStore = field(repr=False)
    _digests: Mapping[str, str] = field(repr=False)

    @property
    def is_folder(self) -> bool:
        """Whether it is a folder, whose files have paths, and not a zip."""
        return isinstance(self._store, FolderStore)

    def is_on_disk(self, record: GraphRecord) -> bool:
        """Whether a graph has a path (`path_of_graph`).

        It has none in a zip, or if one of its files is a link out of the bundle: libraries refuse such external data.
        """
        return self.is_folder and self._store.outside.isdisjoint(record.files)

    def files(self) -> dict[str, int]:
        """The files that SHA256SUMS covers and their sizes in bytes, sorted by name."""
        return {name: self._store.sizes[name] for name in sorted(self._digests)}

    def digest(self, name: str) -> str:
        """The SHA-256 that SHA256SUMS lists for a file, in hexadecimal.

        Raises:
            BundleError: It lists none.
        """
        if name not in self._digests:
            raise BundleError(f"{self.path}: its {SUMS} lists no {name!r}", "spmdeploy inspect lists what there is")
        return self._digests[name]

    def graph_digests(self, record: GraphRecord) -> str:
        """What identifies a graph: the SHA-256 of its file and that of its weights, if they have one, after a space."""
        return " ".join(self.digest(name) for name in record.files)

    @property
    def unlisted_files(self) -> tuple[str, ...]:
        """Files that SHA256SUMS does not list, except its signature and engines/. They are never read."""
        known = {SUMS, SIGNATURE, *self._digests}
        return tuple(sorted(name for name in self._store.sizes if name not in known and not name.startswith(ENGINES)))

    def graph(self, graph: str, precision: str) -> GraphRecord:
        """The record of one graph.

        Raises:
            BundleError: The bundle has no such graph; lists those that it has.
        """
        for record in self.manifest.graphs:
            if (record.graph, record.precision) == (graph, precision):
                return record
        available = ", ".join(f"{record.graph} {record.precision}" for record in self.manifest.graphs) or "none"
        raise BundleError(
            f"{self.path}: no graph {graph!r} in {precision}; there is {available}",
            f"choose one of these, or {self.add_graphs}",
        )

    @property
    def add_graphs(self) -> str:
        """How to get a bundle with all graphs in both precisions: the whole command, for hints."""
        source = next((one for one in self.manifest.graphs if (one.graph, one.precision) in _WEIGHTS), None)
        if source is None:
            return (
                "export again from the checkpoint, because the FP32 weights are not in this bundle: "
                "spmdeploy export WEIGHTS --classes CLASSES --output NEW.spm"
            )
        half = " --half-weights" if source.weights_dtype == "float16" else ""
        return f"add it: spmdeploy export {quote_path(self.path)} --output NEW.spm{half}"

    def read(self, name: str) -> bytes:
        """The content of a file that SHA256SUMS covers: exactly the bytes that were hashed.

        Raises:
            BundleError: The file is missing or does not have its hash.
        """
        expected = self.digest(name)
        with _bundle_errors(self.path / name), self._store.open(name) as stream:
            content = stream.read(self._store.sizes[name])
        _compare(self.path / name, hashlib.sha256(content).hexdigest(), expected)
        return content

    def read_graph(self, record: GraphRecord) -> GraphFiles:
        """A graph and its external weights, read as by `read`.

        Raises:
            BundleError: As `read`, or the graph refers to weights in another file: libraries open any file that a graph
                names.
        """
        content = self.read(record.file)
        self._check_locations(record, content)
        weights = {} if record.weights is None else {PurePosixPath(record.weights).name: self.read(record.weights)}
        return GraphFiles(content, weights)

    def path_of_graph(self, record: GraphRecord) -> Path:
        """The path of a graph, in the folder of its weights; checked as by `read_graph`, used as that of `path_of`."""
        self._check_locations(record, self.read(record.file))
        for name in record.files[1:]:
            self.path_of(name)
        return self.path_of(record.file)

    def _check_locations(self, record: GraphRecord, content: bytes) -> None:
        shown = self.path / record.file
        try:
            locations = external_locations(content)
        except ValueError as exc:
            raise corrupt_bundle_error(shown, f"no ONNX graph: {exc}") from exc
        allowed = set() if record.weights is None else {PurePosixPath(record.weights).name.encode()}
        if other := sorted(locations - allowed):
            name = shorten(other[0].decode("utf-8", "replace"))
            raise corrupt_bundle_error(shown, f"asks for weights in {name}, which the manifest does not name")

    def read_signature(self) -> bytes | None:
        """The signature file in the bundle, checked or not."""
        with _bundle_errors(self.path / SIGNATURE):
            return _read_text(self._store, SIGNATURE) if SIGNATURE in self._store.sizes else None

    def path_of(self, name: str) -> Path:
        """The path of a file that has just been hashed, for libraries that cannot take bytes; not of one in a zip.

        The file may be replaced between the hash and its use: prefer `read`.
        """
        if not isinstance(self._store, FolderStore):
            raise BundleError(f"{self.path}: {name} is inside a zip and has no path", "unpack the zip into a folder")
        self._check(name)
        return self._store.root / name

    def check_all(self) -> tuple[str, ...]:
        """Hashes every file and returns `unlisted_files`. Raises one BundleError that names every corrupt file."""
        problems = []
        for name in self._digests:
            try:
                self._check(name)
            except BundleError as exc:
                problems.append(exc.problem)
        if problems:
            raise BundleError("; ".join(problems), COPY_AGAIN)
        return self.unlisted_files

    def _check(self, name: str) -> None:
        expected = self.digest(name)
        with _bundle_errors(self.path / name), self._store.open(name) as stream:
            actual = sha256(stream, self._store.sizes[name])
        _compare(self.path / name, actual, expected)


def is_bundle(path: Path) -> bool:
    """Whether a path is to be read as a bundle, not as weights: a folder, or a zip that torch.save did not write.

    False for what is neither a file nor a folder; zipfile would read a device to its end.
    """
    return path.is_dir() or (path.is_file() and zipfile.is_zipfile(path) and not is_checkpoint(path))


def open_bundle(path: str | Path, signed_with: PublicKey | None = None) -> Bundle:
    """Opens a folder or an uncompressed zip and makes the cheap checks.

    Checked are names, links, zip headers, the manifest and its hash, and presence and size of all required files.
    Graphs and images are hashed when they are read.

    Args:
        path: The folder or zip.
        signed_with: Requires a signature by this key, which is checked before anything else is read.

    Raises:
        BundleError: The bundle is incomplete, corrupt, unsafe, or not signed as required.
    """
    path = Path(path)
    with _bundle_errors(path):
        return open_store(open_storage(path), signed_with)


def open_store(store: FileStore, signed_with: PublicKey | None = None) -> Bundle:
    """Opens a bundle whose files are listed already, and checks it as `open_bundle` does.

    Args:
        store: The files; nothing in them is trusted.
        signed_with: A key with which the bundle must be signed; None: the signature is not checked.

    Raises:
        BundleError: A record is missing, corrupt or of a later schema, or the signature is not by this key.
    """
    shown = store.shown / MANIFEST
    content = _read_text(store, MANIFEST)
    if signed_with is None:  # otherwise the signature is checked before anything else
        check_version(content, str(shown))  # first: a later version may store its hashes differently
    sums = _read_text(store, SUMS)
    signature = None if signed_with is None else _check_signature(store, sums, signed_with)
    digests = _parse_sums(sums, store.shown / SUMS)
    if MANIFEST not in digests:
        raise corrupt_bundle_error(store.shown / SUMS, f"does not list {MANIFEST}")
    _compare(shown, hashlib.sha256(content).hexdigest(), digests[MANIFEST])
    manifest = Manifest.from_bytes(content, str(shown))
    _check_presence(store, digests)
    _check_graphs(store, digests, manifest)
    _check_golden(store, digests, manifest)
    return Bundle(store.shown, manifest, sums, signature, store, digests)


def _check_signature(store: FileStore, sums: bytes, key: PublicKey) -> Signature:
    if SIGNATURE not in store.sizes:
        raise BundleError(
            f"{store.shown}: not signed, but a signature by the key {key.name} is required",
            "get the signed bundle, or sign it: spmdeploy bundle pack BUNDLE OUT.spm --sign KEY",
        )
    from spmdeploy.bundle.signature import check_signature

    return check_signature(sums, _read_text(store, SIGNATURE), key, store.shown / SIGNATURE)


def _read_text(store: FileStore, name: str) -> bytes:
    if name not in store.sizes:
        raise corrupt_bundle_error(store.shown / name, "missing")
    if store.sizes[name] > MAX_TEXT_BYTES:
        raise corrupt_bundle_error(store.shown / name, f"{store.sizes[name]} bytes, more than {MAX_TEXT_BYTES}")
    with store.open(name) as stream:
        return stream.read(store.sizes[name])


def _parse_sums(written: bytes, shown: Path) -> dict[str, str]:
    """The digests in a SHA256SUMS, by name."""
    digests: dict[str, str] = {}
    for number, line in enumerate(written.decode("utf-8", "replace").removesuffix("\n").split("\n"), start=1):
        parsed = re.fullmatch(r"([0-9a-f]{64}) [ *](.+)", line)
        if parsed is None or not is_safe_relative_path(parsed[2]) or parsed[2] in digests:
            raise corrupt_bundle_error(
                shown, f"line {number} is {line[:100]!r}: no SHA-256, an unsafe name, or one twice"
            )
        digests[parsed[2]] = parsed[1]
    return digests


def _check_presence(store: FileStore, digests: Mapping[str, str]) -> None:
    for name in digests:
        if name not in store.sizes:
            raise corrupt_bundle_error(store.shown / name, f"missing, though {SUMS} lists it")
        if store.sizes[name] > MAX_FILE_BYTES:
            raise corrupt_bundle_error(store.shown / name, f"{store.sizes[name]} bytes, more than {MAX_FILE_BYTES}")


def _check_graphs(store: FileStore, digests: Mapping[str, str], manifest: Manifest) -> None:
    for record in manifest.graphs:
        for name in record.files:
            if name not in digests:
                raise corrupt_bundle_error(store.shown / name, f"named in {MANIFEST}, but {SUMS} does not list it")
        shown = store.shown / record.file
        size = store.sizes[record.file]
        if size != record.bytes:
            _check_no_pointer(store, record.file)
            fault = "truncated" if size < record.bytes else "tampered with or damaged"
            raise corrupt_bundle_error(shown, f"{fault}: {size} bytes, but {MANIFEST} says {record.bytes}")
        _compare(shown, digests[record.file], record.sha256, MANIFEST)


def _check_no_pointer(store: FileStore, name: str) -> None:
    if store.sizes[name] < 1024:
        with store.open(name) as stream:
            if stream.read(len(LFS_POINTER)) == LFS_POINTER:
                raise BundleError(f"{store.shown / name}: a pointer of Git LFS, not the file", FETCH_LFS)


def _check_golden(store: FileStore, digests: Mapping[str, str], manifest: Manifest) -> None:
    refines = any(record.graph in (REFINE, ON_CPU[REFINE]) for record in manifest.graphs)
    for edit in manifest.golden:
        for image in (*GOLDEN_IMAGES, *([GOLDEN_REFINED] if refines else [])):
            if f"{edit.folder}/{image}" not in digests:
                raise corrupt_bundle_error(
                    store.shown / edit.folder / image, f"missing from the golden edit {edit.name}"
                )


def _compare(shown: Path, actual: str, expected: str, listed_in: str = SUMS) -> None:
    if actual != expected:
        difference = f"SHA-256 is {actual[:12]}…, but {listed_in} says {expected[:12]}…"
        raise corrupt_bundle_error(shown, f"tampered with or damaged: {difference}")


@contextmanager
def _bundle_errors(subject: Path) -> Iterator[None]:
    with os_errors(subject, "read", BundleError):
        yield

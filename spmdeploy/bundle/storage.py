"""Reads the files of a bundle from a folder or an uncompressed zip, refusing unsafe names, links and malformed zips."""

from __future__ import annotations

import glob
import os
import stat
import struct
import zipfile
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import islice
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol

from spmdeploy.errors import BundleError
from spmdeploy.files import ASIDE, MAX_NAME_LENGTH, is_safe_relative_path

MANIFEST, SUMS, ENGINES = "manifest.json", "SHA256SUMS", "engines/"
SIGNATURE = f"{SUMS}.minisig"  # optional: the name that `minisign -S -m SHA256SUMS` gives it
GOLDEN_IMAGES = ("image.png", "labels.png", "mask.png", "expected.png")
GOLDEN_REFINED = "refined.png"  # where there is a refine graph
GOLDEN_INSTANCES = "instances.png"  # optional: without it the labels are used

MAX_ENTRIES = 4096  # a bundle has dozens; more is another folder, or an attack
MAX_FILE_BYTES = (2 << 30) - 1  # an ONNX file cannot be larger: the limit of protobuf

COPY_AGAIN = "copy the bundle again from where it came from, or export it again"
EXPORT_FIRST = "turn weights into a bundle: spmdeploy export CHECKPOINT --output NAME.spm --classes cityscapes"
LFS_POINTER, FETCH_LFS = b"version https://git-lfs.github.com/", "fetch it with git lfs pull"
WHOLE_BUNDLE = "this is one part of a bundle; name the .spm folder that it came from"
PACK_AGAIN = "make the zip inside the bundle's folder: zip -0 -X -r ../NAME.spm.zip ."


def corrupt_bundle_error(subject: str | Path, problem: object) -> BundleError:
    """The error for damaged content; the hint is to copy or export the bundle again."""
    return BundleError(f"{subject}: {problem}", COPY_AGAIN)


class FileStore(Protocol):
    """The files of a bundle. Nothing in it is trusted."""

    shown: Path
    """The path that messages name."""
    sizes: dict[str, int]
    """Size in bytes of every file, by its name."""
    outside: set[str]
    """Names of links that lead out of the bundle."""

    def open(self, name: str) -> AbstractContextManager[BinaryIO]:
        """A stream positioned at the first byte of a file in `sizes`; it may continue after the last one."""


WHAT_IT_IS = {
    ".onnx": ("one graph", WHOLE_BUNDLE),
    ".engine": ("one engine", WHOLE_BUNDLE),
    ".plan": ("one engine", WHOLE_BUNDLE),
    ".trt": ("one engine", WHOLE_BUNDLE),
    ".json": ("a JSON file", WHOLE_BUNDLE),
    ".safetensors": ("a checkpoint", EXPORT_FIRST),
    ".pth": ("a checkpoint", EXPORT_FIRST),
    ".pt": ("a checkpoint", EXPORT_FIRST),
}


def open_storage(path: Path) -> FileStore:
    """Opens a folder or zip.

    Raises:
        BundleError: It is no bundle; names the kind of file if it is a known one.
    """
    if path.is_dir():
        if not os.path.lexists(path / MANIFEST):
            raise _no_manifest(path, os.listdir(path))
        return FolderStore(path)
    if not path.is_file():
        raise BundleError(f"{path}: no such bundle", _interrupted_overwrite(path))
    if path.suffix.lower() in WHAT_IT_IS:
        what, hint = WHAT_IT_IS[path.suffix.lower()]
        raise BundleError(f"{path}: {what}, not a bundle", hint)
    with open(path, "rb") as stream:
        start = stream.read(64)
    if start[:4] in (b"PK\3\4", b"PK\5\6"):
        return ZipStore(path)
    if start.startswith(LFS_POINTER):
        raise BundleError(f"{path}: a pointer of Git LFS, not the file", FETCH_LFS)
    if start.lstrip()[:1] == b"<":
        raise BundleError(f"{path}: a web page, not a bundle", "download the file itself")
    raise BundleError(f"{path}: not a bundle: neither a folder nor a zip (starts with {start[:4]!r})", EXPORT_FIRST)


def _interrupted_overwrite(path: Path) -> str:
    aside = next(path.parent.glob(f".{glob.escape(path.name)}.*{ASIDE}"), None)
    return EXPORT_FIRST if aside is None else f"an interrupted overwrite left the old one at {aside}: move it back"


def _no_manifest(path: Path, names: list[str]) -> BundleError:
    if SUMS in names:
        return corrupt_bundle_error(path / MANIFEST, "missing")
    if any(name.endswith(f"/{MANIFEST}") for name in names):
        return BundleError(f"{path}: not a bundle: the {MANIFEST} is one folder too deep", PACK_AGAIN)
    what = "without a manifest.json" if names else "empty"
    return BundleError(f"{path}: not a bundle: it is {what}", EXPORT_FIRST)


class FolderStore:
    """A folder, in which files and folders may be links, as package managers and download caches make them.

    `outside` has the names of those that lead out of the folder; these may be read only if a hash covers their content.
    Messages name `shown`.
    """

    def __init__(self, root: Path, shown: Path | None = None) -> None:
        self.root, self.shown = root, shown or root
        self._real_root = Path(os.path.realpath(root))
        self.outside: set[str] = set()
        self.sizes = dict(self._listing())

    @contextmanager
    def open(self, name: str) -> Iterator[BinaryIO]:
        with open(self.root / name, "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            if size != self.sizes[name]:
                fault = f"{size} bytes, but {self.sizes[name]} when the bundle was opened"
                raise corrupt_bundle_error(self.shown / name, fault)
            yield stream

    def _listing(self) -> Iterator[tuple[str, int]]:
        pending, seen, listed = [self.root], 0, set()
        while pending:
            folder = pending.pop()
            try:
                status = os.stat(folder)
                with os.scandir(folder) as entries:
                    found = list(islice(entries, MAX_ENTRIES + 1 - seen))
            except FileNotFoundError:
                if folder == self.root:
                    raise
                continue  # the folder of an engine that is being replaced
            if (status.st_dev, status.st_ino) in listed:
                shown = self.shown / folder.relative_to(self.root)
                raise BundleError(f"{shown}: a link to a folder that is in the bundle already", "take it out")
            listed.add((status.st_dev, status.st_ino))
            seen += len(found)
            if seen > MAX_ENTRIES:
                raise BundleError(f"{self.shown}: more than {MAX_ENTRIES} files", "name the .spm folder alone")
            for entry in found:
                if entry.is_dir():
                    pending.append(Path(entry.path))
                elif size := self._size(Path(entry.path)):
                    yield size

    def _size(self, path: Path) -> tuple[str, int] | None:
        """Name and size of a file; None if it no longer exists."""
        name = path.relative_to(self.root).as_posix()
        target = Path(os.path.realpath(path))  # Path.resolve raises RuntimeError for a link to itself
        if not target.is_file():
            if not os.path.lexists(path):
                return None
            raise BundleError(f"{self.shown / name}: no regular file", "take it out of the bundle")
        if self._real_root not in target.parents:
            self.outside.add(name)
        return name, target.stat().st_size


class ZipStore:
    """An uncompressed zip: each file is one range of bytes, found once and read without zipfile after that.

    The central directory and the local headers must agree, and no two entries may overlap: programs that trust one or
    the other would see different files, and zip bombs are made of overlaps.
    """

    def __init__(self, path: Path) -> None:
        self.shown = path
        self.outside: set[str] = set()
        with open(path, "rb") as archive:
            directory_start = _directory_start(archive, path)
            entries = _read_directory(archive, path)
            spans = sorted(_span(archive, entry, path) for entry in entries)
        _check_spans(spans, directory_start, path)
        self._starts = {span.name: span.data for span in spans if not span.name.endswith("/")}
        self.sizes = {span.name: span.end - span.data for span in spans if span.name in self._starts}

    @contextmanager
    def open(self, name: str) -> Iterator[BinaryIO]:
        with open(self.shown, "rb") as stream:
            stream.seek(self._starts[name])
            yield stream


class _Span(NamedTuple):
    """Offsets in the archive: `header` to `data` is the local header, `data` to `end` the content."""

    header: int
    data: int
    end: int
    name: str


def _zip_error(path: Path, problem: str, entry: str | None = None) -> BundleError:
    return BundleError(f"{path}: {problem}" if entry is None else f"{path}: entry {entry!r} {problem}", PACK_AGAIN)


def _directory_start(archive: BinaryIO, path: Path) -> int:
    """The offset of the central directory. Checked before zipfile loads it, as a hostile one could exhaust memory."""
    size = archive.seek(0, os.SEEK_END)
    archive.seek(max(0, size - 42))
    locator, _, record = archive.read(42).rpartition(b"PK\5\6")
    if len(record) != 18:
        raise corrupt_bundle_error(path, "truncated, or something follows the zip: it does not end with its directory")
    length, start, comment = (int(number) for number in struct.unpack("<2LH", record[8:]))
    if locator[:4] == b"PK\6\7" or comment or start + length != size - 22:
        raise _zip_error(path, "more than 4 GiB, or something precedes the zip in the file")
    if length > MAX_ENTRIES * (MAX_NAME_LENGTH + 128):
        raise _zip_error(path, f"more than {MAX_ENTRIES} entries")
    return start


def _read_directory(archive: BinaryIO, path: Path) -> list[zipfile.ZipInfo]:
    try:
        with zipfile.ZipFile(archive) as opened:
            entries = opened.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error) as exc:
        raise _zip_error(path, f"the directory of the zip cannot be read: {exc}") from exc
    names = [entry.orig_filename for entry in entries]
    if MANIFEST not in names:
        raise _no_manifest(path, names)
    if len(names) > MAX_ENTRIES:
        raise _zip_error(path, f"more than {MAX_ENTRIES} entries")
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise _zip_error(path, "is there twice", twice[0])
    return entries


def _check_entry(entry: zipfile.ZipInfo, path: Path) -> None:
    """Checks an entry of the central directory. orig_filename: zipfile itself cuts names at a NUL."""
    name, kind = entry.orig_filename, stat.S_IFMT(entry.external_attr >> 16)
    faults = (
        (not is_safe_relative_path(name.removesuffix("/")), "has a name that leads outside or is not plain"),
        (entry.flag_bits & 0x2041, "is encrypted"),
        (kind not in (0, stat.S_IFREG, stat.S_IFDIR), "is a link or a device, not a file"),
        (entry.compress_type != zipfile.ZIP_STORED, "is compressed; a bundle's zip is not"),
        (entry.compress_size != entry.file_size, f"has {entry.compress_size} bytes for {entry.file_size} uncompressed"),
        (entry.file_size > MAX_FILE_BYTES, f"claims {entry.file_size} bytes, more than {MAX_FILE_BYTES}"),
        (name.endswith("/") and entry.file_size, "is a folder with content"),
    )
    for wrong, problem in faults:
        if wrong:
            raise _zip_error(path, problem, name)


def _span(archive: BinaryIO, entry: zipfile.ZipInfo, path: Path) -> _Span:
    """The range of an entry, after its local header has been compared with the central directory."""
    _check_entry(entry, path)
    archive.seek(entry.header_offset)
    header = archive.read(30)
    if len(header) < 30 or header[:4] != b"PK\3\4":
        raise _zip_error(path, "has no header where the directory says", entry.orig_filename)
    flags, method, crc, packed, size, name_length, extra_length = struct.unpack("<6x2H4x3L2H", header)
    name = archive.read(name_length).decode("utf-8" if flags & 0x800 else "cp437", "replace")
    expected = (
        entry.flag_bits,
        entry.compress_type,
        entry.CRC,
        entry.compress_size,
        entry.file_size,
        entry.orig_filename,
    )
    if (flags, method, crc, packed, size, name) != expected:
        raise _zip_error(path, "has a header that differs from the directory", entry.orig_filename)
    data = entry.header_offset + 30 + name_length + extra_length
    return _Span(entry.header_offset, data, data + size, name)


def _check_spans(spans: list[_Span], directory_start: int, path: Path) -> None:
    following = [span.header for span in spans[1:]] + [directory_start]
    for span, limit in zip(spans, following, strict=True):
        if span.end > limit:
            raise _zip_error(path, "runs into the entry behind it or the directory", span.name)

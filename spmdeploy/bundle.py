"""The `.spm` bundle: what is in it, what proves it whole, and how one is written.

A bundle is a folder, or an uncompressed zip of one:

    manifest.json      what it is (`Manifest`)
    graphs/*.onnx      the product
    golden/NAME/       an edit to repeat: image, labels, mask, expected and perhaps instances, all PNG
    card.md            for people
    engines/           caches that a device builds for itself, with records of their own
    SHA256SUMS         `sha256sum -c SHA256SUMS` covers every file but itself and engines/

Opening checks structure, names and sizes; content is hashed when it is read, and the bytes that were hashed are the
bytes handed out. The hashes find damage and mix-ups: whoever can rewrite SHA256SUMS can rewrite the rest with it.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
import struct
import sys
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import MISSING, dataclass, field, fields
from datetime import date
from functools import cache
from itertools import islice
from pathlib import Path, PurePosixPath
from types import UnionType
from typing import (
    Annotated,
    Any,
    BinaryIO,
    Literal,
    NamedTuple,
    NoReturn,
    Protocol,
    Self,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from spmdeploy.errors import BundleError, InputError, SpmDeployError
from spmdeploy.labels import ClassTable

SCHEMA_FAMILY, SCHEMA_VERSION = "spmdeploy.bundle/", 1
SCHEMA = f"{SCHEMA_FAMILY}{SCHEMA_VERSION}"
MANIFEST, SUMS, ENGINES = "manifest.json", "SHA256SUMS", "engines/"
GOLDEN_PICTURES = ("image.png", "labels.png", "mask.png", "expected.png")
GOLDEN_INSTANCES = "instances.png"  # optional: without it the labels stand in

MAX_ENTRIES = 4096  # a bundle has dozens; more is somebody's home folder, or an attack
MAX_NAME_LENGTH = 240  # characters: unpacks below any folder on every file system
MAX_TEXT_BYTES = 4 << 20  # manifest.json and SHA256SUMS, read before anything is trusted
MAX_FILE_BYTES = (2 << 30) - 1  # an ONNX file cannot be larger: the limit of protobuf

Precision = Literal["fp32", "fp16"]

COPY_AGAIN = "copy the bundle again from where it came from, or export it again"
EXPORT_FIRST = "turn weights into a bundle: spmdeploy export CHECKPOINT --output NAME.spm --classes cityscapes"
WHOLE_BUNDLE = "this is one part of a bundle; give the .spm folder that it came from"
PACK_AGAIN = "make the zip inside the bundle's folder: zip -0 -X -r ../NAME.spm.zip ."


# --------------------------------------------------------------------------------------------------- faults and names


def _damaged(subject: str | Path, problem: object) -> BundleError:
    return BundleError(f"{subject}: {problem}", COPY_AGAIN)


def is_inside(name: str) -> bool:
    """Whether `name` is a plain relative path with / between its parts, safe to join to a folder on any system."""
    parts = name.split("/")
    # ":" covers drive letters and NTFS streams; isprintable covers NUL, newlines, lone surrogates, direction overrides.
    plain = name.isprintable() and "\\" not in name and ":" not in name
    return plain and len(name) <= MAX_NAME_LENGTH and not {"", ".", ".."} & set(parts)


def _is_digest(text: str) -> bool:
    return re.fullmatch(r"[0-9a-f]{64}", text) is not None


def _is_name_part(text: str) -> bool:
    return is_inside(text) and "/" not in text


# ------------------------------------------------------------------------------------------------------- manifest

InsideName = Annotated[str, (is_inside, "a relative path inside the bundle")]
NamePart = Annotated[str, (_is_name_part, "a plain name without /")]
Digest = Annotated[str, (_is_digest, "a SHA-256 in 64 lower-case hexadecimal digits")]


@dataclass(frozen=True)
class Record:
    """Base of the manifest's frozen dataclasses: the annotations of the fields are what is accepted from JSON.

    Fields with a default may be missing; further fields are passed over, so that a later 1.x may add some.
    """

    @classmethod
    def from_json(cls, value: object, source: str) -> Self:
        """Raises BundleError naming `source`, the field and its value."""
        try:
            record: Self = _decode_record(cls, value, "")
        except _WrongField as exc:
            raise _damaged(source, exc) from exc
        return record

    def to_json(self) -> dict[str, Any]:
        return {item.name: _encode(getattr(self, item.name)) for item in fields(self)}


@dataclass(frozen=True)
class GeneratorFacts(Record):
    """The size of the network that the graphs were made from."""

    classes: int
    width: int
    hidden: int
    parameters: int
    gflop: float
    """Operations of one 256x256 edit, in units of 1e9."""


@dataclass(frozen=True)
class GraphRecord(Record):
    """One ONNX file and what was measured on it when it was written."""

    graph: str
    """What it computes: "edit"."""
    precision: Precision
    file: InsideName
    bytes: int
    sha256: Digest
    opset: int
    weights_dtype: Literal["float32", "float16"]
    """How the weights are stored; an FP32 graph may keep halves and cast them."""
    fp16_share: float
    """Share of the operations that compute in FP16, 0..1."""
    fp32_operations: Mapping[str, int]
    """Operations that compute in FP32, by ONNX operator."""
    parity: Mapping[str, float | None]
    """Figures of the comparison with torch in FP32. None: infinite (the PSNR of equal pictures)."""


@dataclass(frozen=True)
class GoldenEdit(Record):
    """An edit with the picture that torch in FP32 makes of it."""

    name: NamePart
    folder: InsideName
    note: str
    """Where the photo is from and under which licence."""


@dataclass(frozen=True)
class ParityLimits(Record):
    """What any backend must keep to, inside the mask, against the expected picture of a golden edit."""

    max_grey: float
    mean_grey: float
    min_psnr_db: float


@dataclass(frozen=True)
class SourceFacts(Record):
    """The checkpoint that the bundle was exported from."""

    file: str
    sha256: Digest
    format: str


@dataclass(frozen=True)
class Manifest(Record):
    """manifest.json."""

    name: NamePart
    created: date
    tools: Mapping[str, str]
    """Versions of what made it: spmdeploy, torch, onnx, ..."""
    classes: ClassTable
    channel_order: Literal["RGB", "BGR"]
    """The order that the source weights were trained in. The graphs take and give RGB in any case."""
    native_size: int
    """Height and width of the pictures that the graphs take."""
    generator: GeneratorFacts
    graphs: tuple[GraphRecord, ...]
    golden: tuple[GoldenEdit, ...]
    limits: Mapping[Precision, ParityLimits]
    source: SourceFacts
    licence: str
    """Terms of the weights, in words."""
    training: Mapping[str, object] | None = None
    """What is known of the training run, as it was recorded."""

    @classmethod
    def from_json(cls, value: object, source: str) -> Self:
        """Raises BundleError naming `source` and the field; for a schema that is not ours or newer, saying that."""
        _check_schema(value, source)
        manifest = super().from_json(value, source)
        if fault := manifest._contradiction():
            raise _damaged(source, fault)
        return manifest

    def to_json(self) -> dict[str, Any]:
        return {"schema": SCHEMA, **super().to_json()}

    def _contradiction(self) -> str | None:
        if len(self.classes) != self.generator.classes:
            return f"generator.classes is {self.generator.classes}, but classes lists {len(self.classes)}"
        for words, keys in (
            ("graph", [f"{record.graph} {record.precision}" for record in self.graphs]),
            ("golden edit", [edit.name for edit in self.golden]),
        ):
            if repeated := _repeated(keys):
                return f"the {words} {repeated} is there twice"
        unlimited = {record.precision for record in self.graphs} - self.limits.keys()
        return f"limits has none for {min(unlimited)}, the precision of a graph" if unlimited else None


def _repeated(names: list[str]) -> str | None:
    return next((name for name, count in Counter(names).items() if count > 1), None)


def _check_schema(value: object, source: str) -> None:
    schema = value.get("schema") if isinstance(value, dict) else None
    number = re.fullmatch(re.escape(SCHEMA_FAMILY) + r"([1-9][0-9]{0,5})", schema) if isinstance(schema, str) else None
    if number is None:
        raise BundleError(f"{source}: not a bundle's: its schema is {schema!r}, not {SCHEMA}", EXPORT_FIRST)
    if int(number[1]) > SCHEMA_VERSION:
        raise BundleError(f"{source}: {schema} is newer than {SCHEMA}, which this version reads", "upgrade spmdeploy")


# ------------------------------------------------------------------------------------- JSON to dataclass and back


class _WrongField(ValueError):
    """A field that is missing or of the wrong type; becomes a BundleError where the file's name is known."""


@cache
def _field_types(kind: Any) -> dict[str, Any]:
    hints = get_type_hints(kind, include_extras=True)
    return {item.name: hints[item.name] for item in fields(kind)}


def _decode(kind: Any, value: object, where: str) -> Any:
    """`value` from JSON as the annotation `kind` wants it; `where` is the field's path. Raises _WrongField."""
    return DECODERS.get(get_origin(kind) or kind, _decode_record)(kind, value, where)


def _decode_record(kind: Any, value: object, where: str) -> Any:
    given = _expect(dict, value, where or "the manifest", "an object")
    optional = {item.name for item in fields(kind) if item.default is not MISSING}
    missing = [name for name in _field_types(kind) if name not in given and name not in optional]
    if missing:
        raise _WrongField(f"{_within(where, missing[0])} is missing")
    wanted = {name: wanted for name, wanted in _field_types(kind).items() if name in given}
    return kind(**{name: _decode(wanted[name], given[name], _within(where, name)) for name in wanted})


def _within(where: str, name: object) -> str:
    return f"{where}.{name}" if where else str(name)


def _expect(kind: type, value: object, where: str, words: str) -> Any:
    # The exact type: bool is an int to Python, but true is no number in a manifest.
    return value if type(value) is kind else _refuse(where, value, words)


def _refuse(where: str, value: object, words: str) -> NoReturn:
    shown = repr(value)
    raise _WrongField(f"{where} is {shown if len(shown) <= 60 else shown[:57] + '...'}, not {words}")


def _decode_text(kind: Any, value: object, where: str) -> Any:
    return _expect(str, value, where, "text")


def _decode_count(kind: Any, value: object, where: str) -> Any:
    words = "a whole number from 0"
    count = _expect(int, value, where, words)
    return count if count >= 0 else _refuse(where, value, words)


def _decode_number(kind: Any, value: object, where: str) -> Any:
    limit = sys.float_info.max  # comparing refuses NaN and infinities, and whole numbers too large for a float
    words = "a finite number"
    number = value if type(value) is int else _expect(float, value, where, words)
    return float(number) if -limit <= number <= limit else _refuse(where, value, words)


def _decode_date(kind: Any, value: object, where: str) -> Any:
    words = "a date YYYY-MM-DD"
    text = _expect(str, value, where, words)
    with suppress(ValueError):
        day = date.fromisoformat(text)
        if day.isoformat() == text:  # from Python 3.11 on it reads week dates and more
            return day
    _refuse(where, value, words)


def _decode_choice(kind: Any, value: object, where: str) -> Any:
    return value if value in get_args(kind) else _refuse(where, value, " or ".join(get_args(kind)))


def _decode_checked(kind: Any, value: object, where: str) -> Any:
    accepts, words = kind.__metadata__[0]
    text = _decode(kind.__origin__, value, where)
    return text if accepts(text) else _refuse(where, value, words)


def _decode_optional(kind: Any, value: object, where: str) -> Any:
    return None if value is None else _decode(get_args(kind)[0], value, where)


def _decode_list(kind: Any, value: object, where: str) -> Any:
    items = _expect(list, value, where, "a list")
    return tuple(_decode(get_args(kind)[0], item, f"{where}[{i}]") for i, item in enumerate(items))


def _decode_mapping(kind: Any, value: object, where: str) -> Any:
    key_kind, item_kind = get_args(kind)
    entries = _expect(dict, value, where, "an object").items()
    named = f"a key of {where}"
    return {_decode(key_kind, key, named): _decode(item_kind, item, _within(where, key)) for key, item in entries}


def _decode_classes(kind: Any, value: object, where: str) -> Any:
    try:
        return ClassTable.from_json(_expect(dict, value, where, "an object"), where)
    except SpmDeployError as exc:
        raise _WrongField(exc.problem) from exc


def _decode_anything(kind: Any, value: object, where: str) -> Any:
    return value


DECODERS: Mapping[Any, Callable[[Any, object, str], Any]] = {
    str: _decode_text,
    int: _decode_count,
    float: _decode_number,
    date: _decode_date,
    object: _decode_anything,
    Literal: _decode_choice,
    Annotated: _decode_checked,
    UnionType: _decode_optional,
    Union: _decode_optional,
    tuple: _decode_list,
    Mapping: _decode_mapping,
    ClassTable: _decode_classes,
}


def _encode(value: Any) -> Any:
    if isinstance(value, Record | ClassTable):
        return value.to_json()
    if isinstance(value, date):
        return value.isoformat()
    if isinstance(value, tuple):
        return [_encode(item) for item in value]
    return {key: _encode(item) for key, item in value.items()} if isinstance(value, Mapping) else value


def _parse_json(data: bytes) -> object:
    """Strict JSON: no NaN, no key twice. Raises ValueError."""
    try:
        return json.loads(data, object_pairs_hook=_unrepeated, parse_constant=_refuse_constant)
    except RecursionError as exc:
        raise ValueError("nested too deeply") from exc


def _unrepeated(pairs: list[tuple[str, object]]) -> dict[str, object]:
    if twice := _repeated([key for key, _ in pairs]):
        raise ValueError(f"the key {twice!r} is there twice")
    return dict(pairs)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


# ------------------------------------------------------------------------------------------ the files: folder, zip


class _Store(Protocol):
    """Where a bundle's bytes lie. `sizes` has every file by its name, in bytes; nothing in it is trusted."""

    shown: Path
    """The path to name in messages."""
    sizes: dict[str, int]

    def open(self, name: str) -> AbstractContextManager[BinaryIO]:
        """A stream that stands at the first byte of a file in `sizes`; it may go on behind the last one."""


class _Folder:
    def __init__(self, root: Path, shown: Path | None = None) -> None:
        self.root, self.shown = root, shown or root
        self.sizes = dict(self._listing())

    @contextmanager
    def open(self, name: str) -> Iterator[BinaryIO]:
        with open(self.root / name, "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            if size != self.sizes[name]:
                raise _damaged(self.shown / name, f"{size} bytes, but {self.sizes[name]} when the bundle was opened")
            yield stream

    def _listing(self) -> Iterator[tuple[str, int]]:
        pending, seen = [self.root], 0
        while pending:
            with os.scandir(pending.pop()) as entries:
                found = list(islice(entries, MAX_ENTRIES + 1 - seen))
            seen += len(found)
            if seen > MAX_ENTRIES:
                raise BundleError(f"{self.shown}: more than {MAX_ENTRIES} files", "give the .spm folder alone")
            for entry in found:
                if entry.is_dir(follow_symlinks=False):
                    pending.append(Path(entry.path))
                else:
                    yield self._name(entry), entry.stat().st_size

    def _name(self, entry: os.DirEntry[str]) -> str:
        name = Path(entry.path).relative_to(self.root).as_posix()
        target = Path(os.path.realpath(entry.path))  # Path.resolve raises RuntimeError for a link to itself
        if Path(os.path.realpath(self.root)) not in target.parents:
            raise BundleError(f"{self.shown / name}: a link to {target}, outside the bundle", COPY_AGAIN)
        if not target.is_file():
            raise BundleError(f"{self.shown / name}: no regular file", "take it out of the bundle")
        return name


class _Zip:
    """An uncompressed zip: each file is one stretch of the archive, found once and read without zipfile after that.

    The central directory and the local headers must tell the same story, and no two entries may share a byte: programs
    that trust one or the other would see different files, and overlaps are how zip bombs are made.
    """

    def __init__(self, path: Path) -> None:
        self.shown = path
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


def _zip_fault(path: Path, problem: str, entry: str | None = None) -> BundleError:
    return BundleError(f"{path}: {problem}" if entry is None else f"{path}: entry {entry!r} {problem}", PACK_AGAIN)


def _directory_start(archive: BinaryIO, path: Path) -> int:
    """Where the central directory starts. Read before zipfile loads all of it: a hostile one can fill the memory."""
    size = archive.seek(0, os.SEEK_END)
    archive.seek(max(0, size - 42))
    locator, _, record = archive.read(42).rpartition(b"PK\5\6")
    if len(record) != 18:
        raise _damaged(path, "truncated, or something follows the zip: it does not end with its directory")
    length, start, comment = (int(number) for number in struct.unpack("<2LH", record[8:]))
    if locator[:4] == b"PK\6\7" or comment or start + length != size - 22:
        raise _zip_fault(path, "more than 4 GiB, or something precedes the zip in the file")
    if length > MAX_ENTRIES * (MAX_NAME_LENGTH + 128):
        raise _zip_fault(path, f"more than {MAX_ENTRIES} entries")
    return start


def _read_directory(archive: BinaryIO, path: Path) -> list[zipfile.ZipInfo]:
    try:
        with zipfile.ZipFile(archive) as opened:
            entries = opened.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error) as exc:
        raise _zip_fault(path, f"the directory of the zip cannot be read: {exc}") from exc
    names = [entry.orig_filename for entry in entries]
    if MANIFEST not in names:
        raise _no_manifest(path, names)
    if len(names) > MAX_ENTRIES:
        raise _zip_fault(path, f"more than {MAX_ENTRIES} entries")
    if twice := _repeated(names):
        raise _zip_fault(path, "is there twice", twice)
    return entries


def _check_entry(entry: zipfile.ZipInfo, path: Path) -> None:
    """What the central directory says of an entry. orig_filename: zipfile itself cuts names at a NUL."""
    name, kind = entry.orig_filename, stat.S_IFMT(entry.external_attr >> 16)
    faults = (
        (not is_inside(name.removesuffix("/")), "has a name that leads outside or is not plain"),
        (entry.flag_bits & 0x2041, "is encrypted"),
        (kind not in (0, stat.S_IFREG, stat.S_IFDIR), "is a link or a device, not a file"),
        (entry.compress_type != zipfile.ZIP_STORED, "is compressed; a bundle's zip is not"),
        (entry.compress_size != entry.file_size, f"has {entry.compress_size} bytes for {entry.file_size} uncompressed"),
        (entry.file_size > MAX_FILE_BYTES, f"claims {entry.file_size} bytes, more than {MAX_FILE_BYTES}"),
        (name.endswith("/") and entry.file_size, "is a folder with content"),
    )
    for wrong, words in faults:
        if wrong:
            raise _zip_fault(path, words, name)


def _span(archive: BinaryIO, entry: zipfile.ZipInfo, path: Path) -> _Span:
    """Where an entry lies, after its local header has been compared with the central directory."""
    _check_entry(entry, path)
    archive.seek(entry.header_offset)
    header = archive.read(30)
    if len(header) < 30 or header[:4] != b"PK\3\4":
        raise _zip_fault(path, "has no header where the directory says", entry.orig_filename)
    flags, method, crc, packed, size, name_length, extra_length = struct.unpack("<6x2H4x3L2H", header)
    name = archive.read(name_length).decode("utf-8" if flags & 0x800 else "cp437", "replace")
    told = (entry.flag_bits, entry.compress_type, entry.CRC, entry.compress_size, entry.file_size, entry.orig_filename)
    if (flags, method, crc, packed, size, name) != told:
        raise _zip_fault(path, "has a header that differs from the directory", entry.orig_filename)
    data = entry.header_offset + 30 + name_length + extra_length
    return _Span(entry.header_offset, data, data + size, name)


def _check_spans(spans: list[_Span], directory_start: int, path: Path) -> None:
    following = [span.header for span in spans[1:]] + [directory_start]
    for span, limit in zip(spans, following, strict=True):
        if span.end > limit:
            raise _zip_fault(path, "runs into the entry behind it or the directory", span.name)


# ---------------------------------------------------------------------------------------------------------- opening

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


@dataclass(frozen=True)
class Bundle:
    """An opened bundle; made by `open_bundle`. It holds no open file and may be used from several threads."""

    path: Path
    manifest: Manifest
    _store: _Store = field(repr=False)
    _digests: Mapping[str, str] = field(repr=False)

    @property
    def is_folder(self) -> bool:
        """Whether the files have paths (`path_of`); those in a zip have none."""
        return isinstance(self._store, _Folder)

    def files(self) -> dict[str, int]:
        """The files that SHA256SUMS covers and their sizes in bytes, sorted by name."""
        return {name: self._store.sizes[name] for name in sorted(self._digests)}

    def digest(self, name: str) -> str:
        """The SHA-256 that SHA256SUMS lists for a file. Raises BundleError if it lists none."""
        if name not in self._digests:
            raise BundleError(f"{self.path}: its {SUMS} lists no {name!r}", "spmdeploy inspect lists what there is")
        return self._digests[name]

    @property
    def surplus(self) -> tuple[str, ...]:
        """Files that SHA256SUMS does not cover, engines/ apart. Nothing reads them."""
        known = {SUMS, *self._digests}
        return tuple(sorted(name for name in self._store.sizes if name not in known and not name.startswith(ENGINES)))

    def graph(self, graph: str, precision: str) -> GraphRecord:
        """The record of one graph. Raises BundleError listing those that there are."""
        for record in self.manifest.graphs:
            if (record.graph, record.precision) == (graph, precision):
                return record
        there = ", ".join(f"{record.graph} {record.precision}" for record in self.manifest.graphs) or "none at all"
        raise BundleError(
            f"{self.path}: no graph {graph!r} in {precision}; there is {there}",
            f"ask for one that is there, or export again with --precision {precision}",
        )

    def read(self, name: str) -> bytes:
        """The content of a file that SHA256SUMS covers: exactly the bytes that were hashed. Raises BundleError."""
        expected = self.digest(name)
        with _bundle_errors(self.path / name), self._store.open(name) as stream:
            content = stream.read(self._store.sizes[name])
        _compare(self.path / name, hashlib.sha256(content).hexdigest(), expected)
        return content

    def path_of(self, name: str) -> Path:
        """The path of a file, hashed just now, for libraries that cannot take bytes. Only of a bundle that is a folder.

        Between the hash and the use somebody may replace the file: prefer `read`.
        """
        if not isinstance(self._store, _Folder):
            raise BundleError(f"{self.path}: {name} lies inside a zip and has no path", "unpack the zip into a folder")
        self._check(name)
        return self._store.root / name

    def check_all(self) -> tuple[str, ...]:
        """Hashes every file and returns the surplus ones. Raises one BundleError that names every damaged file."""
        faults = []
        for name in self._digests:
            try:
                self._check(name)
            except BundleError as exc:
                faults.append(exc.problem)
        if faults:
            raise BundleError("; ".join(faults), COPY_AGAIN)
        return self.surplus

    def _check(self, name: str) -> None:
        expected = self.digest(name)
        with _bundle_errors(self.path / name), self._store.open(name) as stream:
            actual = _digest(stream, self._store.sizes[name])
        _compare(self.path / name, actual, expected)


def open_bundle(path: str | Path) -> Bundle:
    """Opens a folder or an uncompressed zip and checks everything that is cheap to check.

    That is: names, links, zip headers, the manifest and its hash, and that every file it needs is there in the size it
    should have. Graphs and pictures are hashed when they are read. Raises BundleError.
    """
    path = Path(path)
    with _bundle_errors(path):
        return _open_store(_find_store(path))


def _open_store(store: _Store) -> Bundle:
    shown = store.shown / MANIFEST
    written = _read_text(store, MANIFEST)
    # The version comes first: a later one may keep its hashes differently.
    with suppress(ValueError):
        _check_schema(_parse_json(written), str(shown))
    digests = _parse_sums(_read_text(store, SUMS), store.shown / SUMS)
    if MANIFEST not in digests:
        raise _damaged(store.shown / SUMS, f"does not list {MANIFEST}")
    _compare(shown, hashlib.sha256(written).hexdigest(), digests[MANIFEST])
    try:
        manifest = Manifest.from_json(_parse_json(written), str(shown))
    except ValueError as exc:
        raise _damaged(shown, f"not valid JSON: {exc}") from exc
    _check_presence(store, digests)
    _check_graphs(store, digests, manifest)
    _check_golden(store, digests, manifest)
    return Bundle(store.shown, manifest, store, digests)


def _find_store(path: Path) -> _Store:
    if path.is_dir():
        if not os.path.lexists(path / MANIFEST):
            raise _no_manifest(path, os.listdir(path))
        return _Folder(path)
    if not path.is_file():
        raise BundleError(f"{path}: no such bundle", _interrupted_overwrite(path))
    if path.suffix.lower() in WHAT_IT_IS:
        what, hint = WHAT_IT_IS[path.suffix.lower()]
        raise BundleError(f"{path}: {what}, not a bundle", hint)
    with open(path, "rb") as stream:
        start = stream.read(4)
    if start in (b"PK\3\4", b"PK\5\6"):
        return _Zip(path)
    raise BundleError(f"{path}: not a bundle: neither a folder nor a zip (starts with {start!r})", EXPORT_FIRST)


def _interrupted_overwrite(path: Path) -> str:
    aside = next(path.parent.glob(f".{glob.escape(path.name)}.*{ASIDE}"), None)
    return EXPORT_FIRST if aside is None else f"an interrupted overwrite left the old one at {aside}: move it back"


def _no_manifest(path: Path, names: list[str]) -> BundleError:
    if SUMS in names:
        return _damaged(path / MANIFEST, "missing")
    if any(name.endswith(f"/{MANIFEST}") for name in names):
        return BundleError(f"{path}: not a bundle: the {MANIFEST} lies one folder too deep", PACK_AGAIN)
    what = "without a manifest.json" if names else "empty"
    return BundleError(f"{path}: not a bundle: it is {what}", EXPORT_FIRST)


def _read_text(store: _Store, name: str) -> bytes:
    if name not in store.sizes:
        raise _damaged(store.shown / name, "missing")
    if store.sizes[name] > MAX_TEXT_BYTES:
        raise _damaged(store.shown / name, f"{store.sizes[name]} bytes, more than {MAX_TEXT_BYTES}")
    with store.open(name) as stream:
        return stream.read(store.sizes[name])


def _parse_sums(written: bytes, shown: Path) -> dict[str, str]:
    """The digests in a SHA256SUMS, by name."""
    digests: dict[str, str] = {}
    for number, line in enumerate(written.decode("utf-8", "replace").removesuffix("\n").split("\n"), start=1):
        parsed = re.fullmatch(r"([0-9a-f]{64}) [ *](.+)", line)
        if parsed is None or not is_inside(parsed[2]) or parsed[2] in digests:
            raise _damaged(shown, f"line {number} is {line[:100]!r}: no SHA-256, an unsafe name, or one twice")
        digests[parsed[2]] = parsed[1]
    return digests


def _check_presence(store: _Store, digests: Mapping[str, str]) -> None:
    for name in digests:
        if name not in store.sizes:
            raise _damaged(store.shown / name, f"missing, though {SUMS} lists it")
        if store.sizes[name] > MAX_FILE_BYTES:
            raise _damaged(store.shown / name, f"{store.sizes[name]} bytes, more than {MAX_FILE_BYTES}")


def _check_graphs(store: _Store, digests: Mapping[str, str], manifest: Manifest) -> None:
    for record in manifest.graphs:
        shown = store.shown / record.file
        if record.file not in digests:
            raise _damaged(shown, f"named in {MANIFEST}, but {SUMS} does not list it")
        size = store.sizes[record.file]
        if size != record.bytes:
            words = "truncated" if size < record.bytes else "tampered with or damaged"
            raise _damaged(shown, f"{words}: {size} bytes, but {MANIFEST} says {record.bytes}")
        _compare(shown, digests[record.file], record.sha256, MANIFEST)


def _check_golden(store: _Store, digests: Mapping[str, str], manifest: Manifest) -> None:
    for edit in manifest.golden:
        for picture in GOLDEN_PICTURES:
            if f"{edit.folder}/{picture}" not in digests:
                raise _damaged(store.shown / edit.folder / picture, f"missing from the golden edit {edit.name}")


def _compare(shown: Path, actual: str, expected: str, said_by: str = SUMS) -> None:
    if actual != expected:
        words = f"SHA-256 is {actual[:12]}…, but {said_by} says {expected[:12]}…"
        raise _damaged(shown, f"tampered with or damaged: {words}")


def _digest(stream: BinaryIO, size: int) -> str:
    """SHA-256 of the next `size` bytes."""
    digest = hashlib.sha256()
    while size > 0 and (chunk := stream.read(min(size, 1 << 20))):
        digest.update(chunk)
        size -= len(chunk)
    return digest.hexdigest()


def _measure(path: Path) -> tuple[int, str]:
    with open(path, "rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        return size, _digest(stream, size)


@contextmanager
def _bundle_errors(subject: Path) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise _damaged(exc.filename or subject, f"cannot be read: {exc.strerror or exc}") from exc


# ---------------------------------------------------------------------------------------------------------- writing

BUILDING, ASIDE = ".building", ".previous"


class BundleWriter:
    """Builds a bundle in a hidden folder beside `target`, which appears whole or not at all.

        with BundleWriter(target) as writer:
            onnx.save(model, writer.path("graphs/edit.fp32.onnx"))
            size, digest = writer.measure("graphs/edit.fp32.onnx")
            bundle = writer.finish(manifest)

    Without `finish` the block leaves nothing behind, exception or not, but what `keep_rejected` moved out.
    An existing target is refused; with `overwrite` it is replaced if it is an intact bundle and nothing else.
    Raises InputError where the target cannot be written, BundleError for a manifest that does not fit the files.
    """

    def __init__(self, target: str | Path, overwrite: bool = False) -> None:
        self.target = _real_target(target)
        self.overwrite = overwrite
        self._folder = _hidden_beside(self.target)

    def __enter__(self) -> BundleWriter:
        _check_vacant(self.target, self.overwrite)
        with _write_errors(self.target):
            self._folder.mkdir()
        return self

    def __exit__(self, *exception: object) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    def path(self, name: str) -> Path:
        """Where to write the file `name`; the folders above it are made."""
        if not is_inside(name) or name in (MANIFEST, SUMS):
            raise BundleError(f"{self.target}: no file in it may be named {name!r}", "use a plain relative name")
        path = self._folder / name
        with _write_errors(self.target):
            path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def add_bytes(self, name: str, content: bytes) -> None:
        """Writes a new file. Raises BundleError if the name is taken."""
        with _write_errors(self.target), open(self._vacant_path(name), "xb") as stream:
            stream.write(content)

    def add_file(self, name: str, source: str | Path) -> None:
        """Copies the content of `source` into a new file. Raises BundleError if the name is taken."""
        path = self._vacant_path(name)
        with _write_errors(self.target):
            shutil.copyfile(source, path)

    def measure(self, name: str) -> tuple[int, str]:
        """Size in bytes and SHA-256 of a file as it is now, for its record in the manifest."""
        with _write_errors(self.target):
            return _measure(self.path(name))

    def keep_rejected(self, name: str) -> Path:
        """Moves a file that must not ship out to `TARGET.FILE.rejected`, for a look at it; replaces an earlier one."""
        kept = self.target.with_name(f"{self.target.name}.{PurePosixPath(name).name}.rejected")
        with _write_errors(kept):
            os.replace(self.path(name), kept)
        return kept

    def finish(self, manifest: Manifest) -> Bundle:
        """Writes manifest and SHA256SUMS, opens the result as a reader would, and puts it at the target."""
        with _write_errors(self.target):
            (self._folder / MANIFEST).write_bytes(_manifest_bytes(manifest, self.target))
            self._write_sums()
            _open_store(_Folder(self._folder, shown=self.target))
            _put_in_place(self._folder, self.target, self.overwrite)
        return open_bundle(self.target)

    def _vacant_path(self, name: str) -> Path:
        path = self.path(name)
        if path.exists():
            raise BundleError(f"{self.target}: {name} is in it already", "add every file once")
        return path

    def _write_sums(self) -> None:
        digests = {}
        for name in _Folder(self._folder, shown=self.target).sizes:
            if not name.startswith(ENGINES):
                digests[name] = _measure(self._folder / name)[1]
                _flush_to_disk(self._folder / name)
        (self._folder / SUMS).write_bytes(_sums_bytes(digests))
        _flush_to_disk(self._folder / SUMS)


def pack(bundle: Bundle, zip_path: str | Path, overwrite: bool = False) -> Path:
    """Writes a bundle as one uncompressed zip, hashing every file on the way: the same bytes for the same bundle.

    engines/ stays behind, SHA256SUMS does not cover it. Raises BundleError, or InputError where nothing can be written.
    """
    target = _real_target(zip_path)
    building = _hidden_beside(target)
    _check_vacant(target, overwrite)
    try:
        with _write_errors(target):
            _write_zip(bundle, building)
            _flush_to_disk(building)
            _put_in_place(building, target, overwrite)
    finally:
        building.unlink(missing_ok=True)
    return target


def _write_zip(bundle: Bundle, path: Path) -> None:
    digests = {name: bundle.digest(name) for name in bundle.files()}
    try:
        # Without zip64, which `open_bundle` refuses: the two halves of such a header may contradict each other.
        with zipfile.ZipFile(path, "x", zipfile.ZIP_STORED, allowZip64=False) as archive:
            archive.writestr(_zip_entry(SUMS), _sums_bytes(digests))
            for name in digests:
                archive.writestr(_zip_entry(name), bundle.read(name))
    except zipfile.LargeZipFile as exc:
        raise BundleError(f"{bundle.path}: too large for one zip: more than 2 GiB", "copy the folder instead") from exc


def _zip_entry(name: str) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
    entry.create_system = 3  # Unix, wherever it is packed
    entry.external_attr = (stat.S_IFREG | 0o644) << 16
    return entry


def _manifest_bytes(manifest: Manifest, target: Path) -> bytes:
    """manifest.json, proved to be readable by the code that will read it."""
    Manifest.from_json(manifest.to_json(), str(target / MANIFEST))
    return (json.dumps(manifest.to_json(), indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _sums_bytes(digests: Mapping[str, str]) -> bytes:
    return "".join(f"{digests[name]}  {name}\n" for name in sorted(digests)).encode()


def _real_target(path: str | Path) -> Path:
    """Absolute; behind a link, what it points to, so that this is replaced and the link stays."""
    return Path(os.path.realpath(path) if os.path.islink(path) else os.path.abspath(path))


def _hidden_beside(target: Path) -> Path:
    return target.with_name(f".{target.name}.{secrets.token_hex(4)}{BUILDING}")


def _check_vacant(target: Path, overwrite: bool) -> None:
    """Raises InputError unless `target` is free or, with `overwrite`, an intact bundle with nothing else in it."""
    if not os.path.lexists(target):
        return
    if not overwrite:
        raise InputError(f"{target}: exists already", "choose another name, or pass --overwrite to replace it")
    try:
        surplus = open_bundle(target).surplus
    except BundleError as exc:
        raise InputError(f"{target}: not replaced, no intact bundle: {exc.problem}", "remove it yourself") from exc
    if surplus:
        raise InputError(f"{target}: not replaced, {surplus[0]} is no part of the bundle in it", "move that file away")


def _put_in_place(built: Path, target: Path, overwrite: bool) -> None:
    """Renames `built` to `target`. The old one is moved aside before and deleted after: one is always whole."""
    _check_vacant(target, overwrite)  # again: somebody else may have written it while this one was built
    aside = built.with_suffix(ASIDE)
    replaces = os.path.lexists(target)
    if replaces:
        os.rename(target, aside)
    try:
        os.rename(built, target)
    except BaseException:
        if replaces:
            os.rename(aside, target)
        raise
    _flush_to_disk(target.parent)
    if replaces:
        _remove(aside)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)  # what cannot be deleted stays, hidden; the new bundle is in place
    else:
        path.unlink(missing_ok=True)


def _flush_to_disk(path: Path) -> None:
    """Without it a power cut after an overwrite could leave a bundle of empty files, and the old one deleted."""
    if os.name != "posix":  # elsewhere folders and files opened for reading cannot be flushed
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _write_errors(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        hint = "does the folder exist, may you write there, and is there room?"
        raise InputError(f"{target}: cannot be written: {exc}", hint) from exc

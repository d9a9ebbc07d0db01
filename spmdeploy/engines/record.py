"""engine.json, the record beside every engine, and the comparison of a record with the machine at hand.

An engine file is code for one library version and one kind of GPU, and says nothing readable of either: everything
that is needed to judge it without loading it stands in the record. No engine library is imported here.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import date
from typing import Any, Literal

from spmdeploy.bundle.manifest import as_precision
from spmdeploy.errors import BundleError
from spmdeploy.serialization import (
    FieldError,
    Fields,
    as_count,
    as_date,
    as_digest,
    as_flag,
    as_inside_name,
    as_number,
    as_plain_name,
    as_text,
    list_of,
    one_of,
    or_none,
    parse,
    schema_version,
)
from spmdeploy.types import Precision

SCHEMA_FAMILY, SCHEMA_VERSION = "spmdeploy.engine/", 1
SCHEMA = f"{SCHEMA_FAMILY}{SCHEMA_VERSION}"
RECORD_FILE = "engine.json"
ENGINE_SUFFIX = ".engine"

EngineRuntime = Literal["tensorrt", "tensorrt-rtx"]
ENGINE_RUNTIMES: tuple[EngineRuntime, ...] = ("tensorrt", "tensorrt-rtx")
BATCH = -1
"""Stands for the batch in the shape of a port."""

BUILD_AGAIN = "build the engines again on the machine that runs them: spmdeploy build BUNDLE"


@dataclass(frozen=True)
class Gpu:
    """A GPU as the driver names it."""

    name: str
    compute_capability: str
    """Major and minor number, as in 8.6."""

    @property
    def target(self) -> str:
        """The same as the name of a target: sm86."""
        return "sm" + self.compute_capability.replace(".", "")

    def __str__(self) -> str:
        return f"{self.name} ({self.target})"


@dataclass(frozen=True)
class BuilderFacts:
    """The machine that built the engine. None: it had none, or could not tell."""

    os: str
    """Linux or Windows."""
    architecture: str
    """x86_64 or aarch64."""
    driver: str | None
    cuda: str | None
    """The newest CUDA that the driver supports."""
    spmdeploy: str


@dataclass(frozen=True)
class BatchRange:
    """The batch sizes that the engine takes, and the one that it is optimized for."""

    min: int
    opt: int
    max: int

    def __str__(self) -> str:
        return f"{self.min} to {self.max}, best at {self.opt}"


@dataclass(frozen=True)
class Port:
    """An input or output."""

    name: str
    dtype: str
    """As numpy names it."""
    shape: tuple[int, ...]
    """`BATCH` (-1) for the batch."""


@dataclass(frozen=True)
class MeasuredPrecision:
    """What the engine computes in, as far as it could be read back."""

    fp16_share: float | None
    """Of the layers that the built engine computes in floating point, the share in FP16: 0..1, by the inspector."""
    unread: str | None
    """Why the inspector could not tell."""
    network_fp16_share: float
    """The same of the typed network that was built; a strongly typed engine computes in exactly these types."""

    def __str__(self) -> str:
        if self.fp16_share is not None:
            return f"{self.fp16_share:.0%} FP16 in the engine"
        return f"{self.network_fp16_share:.0%} FP16 in the typed network"


@dataclass(frozen=True)
class SourceFile:
    """A file that the engine was built from."""

    file: str
    """Its name inside the bundle."""
    sha256: str


@dataclass(frozen=True)
class EngineFile:
    """The engine itself, beside the record."""

    file: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Verification:
    """The golden edits of the bundle, repeated with this engine; the worst figures among them."""

    passed: bool
    on: date
    gpu: str
    max_grey: float
    mean_grey: float
    psnr_db: float | None
    """None: infinite."""


@dataclass(frozen=True)
class EngineRecord:
    """engine.json."""

    bundle: str
    """The name of the bundle that the graph is from."""
    graph: str
    precision: Precision
    """As asked for; `computes_in` is what came out."""
    runtime: EngineRuntime
    version: str
    """The library's, in full."""
    gpu: Gpu | None
    """The GPU that the engine was built on and for; None where it was built for `targets`."""
    targets: tuple[str, ...]
    """Compute capabilities that it was built for without looking at a GPU, as in sm86."""
    builder: BuilderFacts
    strongly_typed: bool
    """Whether the types in the graph bind the engine."""
    fallback: str | None
    """Why it is not strongly typed."""
    flags: tuple[str, ...]
    """The builder flags that were set, by name: their numbers differ between versions."""
    batch: BatchRange
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    computes_in: MeasuredPrecision
    onnx: SourceFile
    weights: SourceFile | None
    """The file that the ONNX file keeps its weights in, where it does."""
    engine: EngineFile
    build_seconds: float
    timing_cache: bool
    """Whether measurements from an earlier build were at hand."""
    created: date
    verification: Verification | None = None
    """None until the golden edits have run on a GPU."""

    @classmethod
    def from_bytes(cls, content: bytes, source: str) -> EngineRecord:
        """Raises BundleError naming `source` and the field; for a schema that is not ours or newer, saying that."""
        try:
            value = parse(content)
        except ValueError as exc:
            raise BundleError(f"{source}: not valid JSON: {exc}", BUILD_AGAIN) from exc
        number = schema_version(value, SCHEMA_FAMILY)
        if number is None:
            raise BundleError(f"{source}: not the record of an engine: its schema is not {SCHEMA}", BUILD_AGAIN)
        if number > SCHEMA_VERSION:
            newer = f"{SCHEMA_FAMILY}{number} is newer than {SCHEMA}, which this version reads"
            raise BundleError(f"{source}: {newer}", "upgrade spmdeploy, or build the engine again")
        try:
            record = _record(value)
        except FieldError as exc:
            raise BundleError(f"{source}: {exc}", BUILD_AGAIN) from exc
        if fault := record._contradiction():
            raise BundleError(f"{source}: {fault}", BUILD_AGAIN)
        return record

    def to_bytes(self) -> bytes:
        """What `from_bytes` reads."""
        return (json.dumps(self.to_json(), indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()

    def to_json(self) -> dict[str, Any]:
        value = {"schema": SCHEMA, **dataclasses.asdict(self), "created": self.created.isoformat()}
        if self.verification is not None:
            value["verification"]["on"] = self.verification.on.isoformat()
        return value

    @property
    def made_for(self) -> str:
        """The GPU or the targets, in words."""
        return str(self.gpu) if self.gpu else ", ".join(self.targets)

    @property
    def key(self) -> str:
        """The name of the engine's folder: readable parts, then a digest of everything that tells engines apart."""
        made_for = (self.gpu.name,) if self.gpu else self.targets
        words = (self.graph, self.precision, f"b{self.batch.max}", self.runtime, self.version, *made_for)
        identity = (
            *(self.runtime, self.version, self.graph, self.precision, dataclasses.asdict(self.batch)),
            *(self.gpu and dataclasses.asdict(self.gpu), self.targets, self.builder.os, self.builder.architecture),
            *(self.onnx.sha256, self.weights and self.weights.sha256),
        )
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        return f"{slug(*words)[:100]}-{digest[:12]}"

    def _contradiction(self) -> str | None:
        if (self.gpu is None) == (not self.targets):
            return "it names both a GPU and targets, or neither"
        if self.targets and self.runtime == "tensorrt":
            return "TensorRT builds for the GPU at hand, but the record lists targets"
        if not 1 <= self.batch.min <= self.batch.opt <= self.batch.max:
            return f"its batch sizes are {self.batch}"
        if not self.engine.file.endswith(ENGINE_SUFFIX):
            return f"engine.file is {self.engine.file!r}, not *{ENGINE_SUFFIX}"
        return None


def slug(*words: str) -> str:
    """Words as a name for a file, whatever is in them."""
    return "-".join(re.sub(r"[^a-z0-9.]+", "_", word.lower()).strip("_.") for word in words)


# ------------------------------------------------------------------------------------------------ against a machine


@dataclass(frozen=True)
class EngineHost:
    """What decides on this machine whether an engine can run on it."""

    versions: Mapping[EngineRuntime, str]
    """Of the engine libraries that can be loaded here."""
    gpu: Gpu | None
    """The device that is to run the engine; None where there is none."""
    os: str
    architecture: str

    @classmethod
    def with_gpu(cls, gpu: Gpu | None, versions: Mapping[EngineRuntime, str]) -> EngineHost:
        """This machine, as far as Python itself knows it."""
        return cls(versions, gpu, *operating_system())


def operating_system() -> tuple[str, str]:
    """Operating system and architecture, in the same words whatever the platform calls them."""
    machine = platform.machine().lower()
    return platform.system(), {"amd64": "x86_64", "arm64": "aarch64"}.get(machine, machine)


def differences(record: EngineRecord, host: EngineHost) -> tuple[str, ...]:
    """Every reason why this engine cannot run on this machine, with both values; empty when it can.

    TensorRT engines are bound to version, GPU model, operating system and architecture. TensorRT-RTX engines for
    targets are bound to version and compute capability; they are portable between Windows and Linux by its
    documentation ("CPU-Only AOT and TensorRT-RTX Engines"), which nobody has tried here.
    """
    return tuple(words for words, _ in _compared(record, host))


def permanent_incompatibilities(record: EngineRecord, host: EngineHost) -> tuple[str, ...]:
    """Those differences that nothing but another engine can mend.

    A library that is not installed or a driver that is not loaded may come back, and an engine for targets was made for
    other machines on purpose.
    """
    return tuple(words for words, lasting in _compared(record, host) if lasting)


def _compared(record: EngineRecord, host: EngineHost) -> Iterator[tuple[str, bool]]:
    """Differences in words, and whether each is lasting."""
    here = host.versions.get(record.runtime)
    if record.version != here:
        yield f"{record.runtime}: built with {record.version}, here {here or 'not installed'}", here is not None
    if record.gpu is None:
        if host.gpu is None or host.gpu.target not in record.targets:
            yield f"GPU: built for {record.made_for}, here {host.gpu or 'none'}", False
        return
    if record.gpu != host.gpu:
        yield f"GPU: built on {record.gpu}, here {host.gpu or 'none'}", host.gpu is not None
    if record.builder.os != host.os:
        yield f"operating system: built on {record.builder.os}, here {host.os}", True
    if record.builder.architecture != host.architecture:
        yield f"architecture: built on {record.builder.architecture}, here {host.architecture}", True


# ------------------------------------------------------------------------------------------------ record by record


def _record(value: object) -> EngineRecord:
    fields = Fields(value, "")
    take = fields.take
    return EngineRecord(
        bundle=take("bundle", as_plain_name),
        graph=take("graph", as_plain_name),
        precision=take("precision", as_precision),
        runtime=take("runtime", one_of(*ENGINE_RUNTIMES)),
        version=take("version", as_text),
        gpu=take("gpu", or_none(_gpu)),
        targets=take("targets", list_of(as_text)),
        builder=take("builder", _builder),
        strongly_typed=take("strongly_typed", as_flag),
        fallback=take("fallback", or_none(as_text)),
        flags=take("flags", list_of(as_text)),
        batch=take("batch", _batch),
        inputs=take("inputs", list_of(_port)),
        outputs=take("outputs", list_of(_port)),
        computes_in=take("computes_in", _reading),
        onnx=take("onnx", _source),
        weights=take("weights", or_none(_source)),
        engine=take("engine", _engine_file),
        build_seconds=take("build_seconds", as_number),
        timing_cache=take("timing_cache", as_flag),
        created=take("created", as_date),
        verification=take("verification", or_none(_verification)),
    )


def _gpu(value: object, where: str) -> Gpu:
    take = Fields(value, where).take
    return Gpu(name=take("name", as_text), compute_capability=take("compute_capability", as_text))


def _builder(value: object, where: str) -> BuilderFacts:
    take = Fields(value, where).take
    return BuilderFacts(
        os=take("os", as_text),
        architecture=take("architecture", as_text),
        driver=take("driver", or_none(as_text)),
        cuda=take("cuda", or_none(as_text)),
        spmdeploy=take("spmdeploy", as_text),
    )


def _batch(value: object, where: str) -> BatchRange:
    take = Fields(value, where).take
    return BatchRange(min=take("min", as_count), opt=take("opt", as_count), max=take("max", as_count))


def _port(value: object, where: str) -> Port:
    take = Fields(value, where).take
    return Port(name=take("name", as_text), dtype=take("dtype", as_text), shape=take("shape", list_of(_dimension)))


def _dimension(value: object, where: str) -> int:
    return BATCH if type(value) is int and value == BATCH else as_count(value, where)


def _reading(value: object, where: str) -> MeasuredPrecision:
    take = Fields(value, where).take
    return MeasuredPrecision(
        fp16_share=take("fp16_share", or_none(as_number)),
        unread=take("unread", or_none(as_text)),
        network_fp16_share=take("network_fp16_share", as_number),
    )


def _source(value: object, where: str) -> SourceFile:
    take = Fields(value, where).take
    return SourceFile(file=take("file", as_inside_name), sha256=take("sha256", as_digest))


def _engine_file(value: object, where: str) -> EngineFile:
    take = Fields(value, where).take
    return EngineFile(file=take("file", as_plain_name), bytes=take("bytes", as_count), sha256=take("sha256", as_digest))


def _verification(value: object, where: str) -> Verification:
    take = Fields(value, where).take
    return Verification(
        passed=take("passed", as_flag),
        on=take("on", as_date),
        gpu=take("gpu", as_text),
        max_grey=take("max_grey", as_number),
        mean_grey=take("mean_grey", as_number),
        psnr_db=take("psnr_db", or_none(as_number)),
    )

"""Records of TensorRT engines (engine.json), and their comparison with a machine.

An engine file is code for one library version and one kind of GPU, and neither can be read from it: the record holds
everything that is needed to check an engine without loading it. No engine library is imported here.
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
from typing import Annotated, Any, Literal

import msgspec

from spmdeploy.errors import BundleError
from spmdeploy.files import is_safe_relative_path
from spmdeploy.serialization import Count, Finite, Schema, Sha256, format_json, shorten
from spmdeploy.types import Precision

BUILD_AGAIN = "build the engines again on the machine that runs them: spmdeploy build BUNDLE"
SCHEMA = Schema("spmdeploy.engine/", 1, "the record of an engine", BundleError, BUILD_AGAIN)
RECORD_FILE = "engine.json"
ENGINE_SUFFIX = ".engine"

EngineRuntime = Literal["tensorrt", "tensorrt-rtx"]
ENGINE_RUNTIMES: tuple[EngineRuntime, ...] = ("tensorrt", "tensorrt-rtx")
BATCH = -1
"""The batch dimension in the shape of a port."""


@dataclass(frozen=True)
class Gpu:
    """A GPU, named as by the driver."""

    name: str
    compute_capability: str
    """Major and minor number, as in 8.6."""

    @property
    def target(self) -> str:
        """The name as a build target: sm86."""
        return "sm" + self.compute_capability.replace(".", "")

    def __str__(self) -> str:
        return f"{self.name} ({self.target})"


@dataclass(frozen=True)
class BuilderFacts:
    """The machine that built the engine; None for what it did not have or report."""

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
    """The batch sizes that the engine accepts, and the one that it is optimized for."""

    min: Count
    opt: Count
    max: Count

    def __str__(self) -> str:
        return f"{self.min} to {self.max}, best at {self.opt}"


@dataclass(frozen=True)
class Port:
    """An input or output."""

    name: str
    dtype: str
    """As numpy names it."""
    shape: tuple[Annotated[int, msgspec.Meta(ge=BATCH, le=2**63 - 1)], ...]
    """`BATCH` (-1) for the batch."""


@dataclass(frozen=True)
class MeasuredPrecision:
    """The precision that the engine computes in, as far as it could be read back."""

    fp16_share: Finite | None
    """Of the layers that the built engine computes in floating point, the share in FP16: 0..1, by the inspector."""
    unread: str | None
    """Why the inspector did not report it."""
    network_fp16_share: Finite
    """The same share of the typed network; a strongly typed engine computes in exactly these types."""

    def __str__(self) -> str:
        if self.fp16_share is not None:
            return f"{self.fp16_share:.0%} FP16 in the engine"
        return f"{self.network_fp16_share:.0%} FP16 in the typed network"


@dataclass(frozen=True)
class SourceFile:
    """A file that the engine was built from."""

    file: str
    """Its name inside the bundle."""
    sha256: Sha256


@dataclass(frozen=True)
class EngineFile:
    """The engine file in the folder of the record."""

    file: str
    bytes: Count
    sha256: Sha256


@dataclass(frozen=True)
class Verification:
    """Result of running the bundle's golden edits with this engine: the largest deviation among them."""

    passed: bool
    on: date
    gpu: str
    max_grey: Finite
    mean_grey: Finite
    psnr_db: Finite | None
    """None: infinite."""


@dataclass(frozen=True)
class EngineRecord:
    """engine.json."""

    bundle: str
    """The name of the bundle that the graph is from."""
    graph: str
    precision: Precision
    """As requested; `computes_in` is what was measured."""
    runtime: EngineRuntime
    version: str
    """Full version of the library."""
    gpu: Gpu | None
    """The GPU that the engine was built on and for; None where it was built for `targets`."""
    targets: tuple[str, ...]
    """Compute capabilities that it was built for without a GPU, as in sm86."""
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
    """The external data file of the ONNX file, if it has one."""
    engine: EngineFile
    build_seconds: Finite
    timing_cache: bool
    """Whether measurements from an earlier build were used."""
    created: date
    verification: Verification | None = None
    """None until the golden edits have run on a GPU."""
    profiles: tuple[BatchRange, ...] = ()
    """Of each optimization profile; empty: there is one, for `batch`."""

    @property
    def batch_profiles(self) -> tuple[BatchRange, ...]:
        """The batch sizes of each optimization profile of the engine, in its order."""
        return self.profiles or (self.batch,)

    @classmethod
    def from_bytes(cls, content: bytes, source: str) -> EngineRecord:
        """Reads engine.json.

        Args:
            content: Of the file.
            source: Named in errors.

        Raises:
            BundleError: It is no such record; names the field where one is wrong.
        """
        record = SCHEMA.convert(SCHEMA.parse(content, source), cls, source)
        if problem := record._problem():
            raise BundleError(f"{source}: {problem}", BUILD_AGAIN)
        return record

    def to_bytes(self) -> bytes:
        """The content of engine.json."""
        return format_json(self.to_json())

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, as in engine.json; times in ISO 8601."""
        value = {"schema": SCHEMA.name, **dataclasses.asdict(self), "created": self.created.isoformat()}
        if self.verification is not None:
            value["verification"]["on"] = self.verification.on.isoformat()
        return value

    @property
    def target(self) -> str:
        """The GPU or the targets, for messages."""
        return str(self.gpu) if self.gpu else ", ".join(self.targets)

    @property
    def key(self) -> str:
        """The name of the engine's folder: readable parts, then a digest of everything that distinguishes engines."""
        targets = (self.gpu.name,) if self.gpu else self.targets
        parts = (self.graph, self.precision, f"b{self.batch.max}", self.runtime, self.version, *targets)
        identity = (
            *(self.runtime, self.version, self.graph, self.precision, dataclasses.asdict(self.batch)),
            *(self.gpu and dataclasses.asdict(self.gpu), self.targets, self.builder.os, self.builder.architecture),
            *(self.onnx.sha256, self.weights and self.weights.sha256),
            *(dataclasses.asdict(profile) for profile in self.profiles),
        )
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        return f"{slug(*parts)[:100]}-{digest[:12]}"

    def _problem(self) -> str | None:
        """Checks that types cannot express: unsafe names, and fields that contradict each other."""
        for where, name in (("bundle", self.bundle), ("graph", self.graph), ("engine.file", self.engine.file)):
            if not is_safe_relative_path(name) or "/" in name:
                return f"{where} is {shorten(name)}, not a plain name without /"
        for where, source in (("onnx", self.onnx), ("weights", self.weights)):
            if source is not None and not is_safe_relative_path(source.file):
                return f"{where}.file is {shorten(source.file)}, not a relative path inside the bundle"
        if (self.gpu is None) == (not self.targets):
            return "it names both a GPU and targets, or neither"
        if self.targets and self.runtime == "tensorrt":
            return "TensorRT builds for the GPU of its machine, but the record lists targets"
        if not 1 <= self.batch.min <= self.batch.opt <= self.batch.max:
            return f"its batch sizes are {self.batch}"
        if not self.engine.file.endswith(ENGINE_SUFFIX):
            return f"engine.file is {self.engine.file!r}, not *{ENGINE_SUFFIX}"
        return None


def slug(*parts: str) -> str:
    """Joins texts into a file name: lower-case letters, digits, dots and underscores, parts separated by dashes."""
    return "-".join(re.sub(r"[^a-z0-9.]+", "_", part.lower()).strip("_.") for part in parts)


@dataclass(frozen=True)
class EngineHost:
    """The properties of a machine that decide whether an engine can run on it."""

    versions: Mapping[EngineRuntime, str]
    """Of the engine libraries that can be loaded."""
    gpu: Gpu | None
    """The device that is to run the engine; None where there is none."""
    os: str
    architecture: str

    @classmethod
    def with_gpu(cls, gpu: Gpu | None, versions: Mapping[EngineRuntime, str]) -> EngineHost:
        """This machine's operating system and architecture, with the given GPU and library versions."""
        return cls(versions, gpu, *operating_system())


def operating_system() -> tuple[str, str]:
    """Operating system and architecture under the same names on all platforms."""
    machine = platform.machine().lower()
    return platform.system(), {"amd64": "x86_64", "arm64": "aarch64"}.get(machine, machine)


def incompatibilities(record: EngineRecord, host: EngineHost) -> tuple[str, ...]:
    """Every reason why this engine cannot run on this machine, with both values; empty when it can.

    TensorRT engines are bound to version, GPU model, operating system and architecture. TensorRT-RTX engines for
    targets are bound to version and compute capability; they are portable between Windows and Linux by its
    documentation ("CPU-Only AOT and TensorRT-RTX Engines"), which has not been tested here.
    """
    return tuple(reason for reason, _ in _compare(record, host))


def permanent_incompatibilities(record: EngineRecord, host: EngineHost) -> tuple[str, ...]:
    """Those incompatibilities that only another engine can resolve.

    A library that is not installed or a driver that is not loaded may come back, and an engine for targets is meant for
    other machines.
    """
    return tuple(reason for reason, permanent in _compare(record, host) if permanent)


def _compare(record: EngineRecord, host: EngineHost) -> Iterator[tuple[str, bool]]:
    """Incompatibilities as text, and whether each is permanent."""
    here = host.versions.get(record.runtime)
    if record.version != here:
        yield f"{record.runtime}: built with {record.version}, here {here or 'not installed'}", here is not None
    if record.gpu is None:
        if host.gpu is None or host.gpu.target not in record.targets:
            yield f"GPU: built for {record.target}, here {host.gpu or 'none'}", False
        return
    if record.gpu != host.gpu:
        yield f"GPU: built on {record.gpu}, here {host.gpu or 'none'}", host.gpu is not None
    if record.builder.os != host.os:
        yield f"operating system: built on {record.builder.os}, here {host.os}", True
    if record.builder.architecture != host.architecture:
        yield f"architecture: built on {record.builder.architecture}, here {host.architecture}", True

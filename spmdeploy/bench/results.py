"""The record of a benchmark run: every sample, and where it was measured. See docs/benchmarks.md.

The dataclasses are the schema: written field by field, read back strictly by their types.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from spmdeploy.bench.fidelity import Parity
from spmdeploy.bench.machine import BackgroundLoad, Machine, State
from spmdeploy.bench.profile import LayerGroup
from spmdeploy.bench.roofline import PeakRates, RooflineBound
from spmdeploy.bench.schedule import WarmUp
from spmdeploy.errors import InputError
from spmdeploy.serialization import Schema
from spmdeploy.stats import Ratio, Summary

MEASURE = "write records with `spmdeploy bench --output FILE.json`"
SCHEMA = Schema("spmdeploy.bench/", 1, "a benchmark record", InputError, MEASURE)

Scope = Literal["engine", "frame", "edit", "cold-start"]
Status = Literal["measured", "unavailable", "differs", "crashed"]


@dataclass(frozen=True)
class ModelInfo:
    """What was edited with."""

    name: str
    weights: str
    """Where they are from: a bundle, or random ones of a preset."""
    graphs: dict[str, str]
    """SHA-256 of each graph by name and precision."""
    classes: int
    width: int
    hidden: int
    parameters: int
    gflop: float
    """Counted operations of one 256×256 edit of the plain generator, in units of 1e9."""


@dataclass(frozen=True)
class Protocol:
    """How it was measured; the constants are those of `contest`."""

    command: str
    """To be typed for the same run; paths are left out."""
    masks: str
    """The rule by which masks were made."""
    warm_up: str
    measuring: str
    seconds: float | None
    """Asked for with --duration; None: 200 iterations (20 cold starts) and 10 seconds, whichever is longer."""


@dataclass(frozen=True)
class BackendInfo:
    """What really computes, as the session says."""

    device: str
    precision: str
    provider: str
    threads: int | None
    """Of one call, where the library says; else its default, a thread for each core."""
    file_bytes: int | None
    """Of the graph or engine that was loaded."""
    weights_bytes: int
    """Of all parameters, in the precision of the arithmetic."""


@dataclass(frozen=True)
class RowMemoryUsage:
    """Bytes; None where nobody tells."""

    ready: int | None
    """Resident set of the backend's own process when it had loaded and run nothing."""
    peak: int | None
    """Largest resident set of that process while the row was measured."""
    device: int | None
    """Of that process on the GPU, by NVML."""
    activations: int | None
    """What the library says it needs beside the weights: TensorRT always, ONNX Runtime and PyTorch with --profile."""
    loaded: int | None = None
    """The files of the graphs or engines that were loaded by then: `refine` among them once a large edit used it."""


@dataclass(frozen=True)
class Result:
    """One backend in one case. Unless it was measured, it holds a reason and no time."""

    scope: Scope
    backend: str
    asked_precision: str
    size: int
    """Height and width of the picture."""
    mask: str
    batch: int
    streams: int
    status: Status
    reason: str | None
    ran: BackendInfo | None
    masked_share: float | None
    parity: Parity | None
    first_ms: float | None
    """The very first run, which may compile."""
    warm_up: WarmUp | None
    latency_ms: Summary | None
    ratio: Ratio | None
    edits_per_second: float | None
    megapixels_per_second: float | None
    joules_per_edit: float | None
    memory: RowMemoryUsage | None
    floor: RooflineBound | None
    phases_ms: dict[str, float]
    """Medians by phase."""
    notes: dict[str, str | int]
    parts: tuple[LayerGroup, ...]
    samples_ms: tuple[tuple[float, ...], ...]
    """Every iteration, in the turns in which they were taken."""

    @property
    def identity(self) -> tuple[object, ...]:
        """What two rows must share to be the same case."""
        return self.scope, self.backend, self.asked_precision, self.size, self.mask, self.batch, self.streams

    @property
    def case(self) -> tuple[object, ...]:
        """What rows of one group share."""
        return self.scope, self.size, self.mask, self.batch, self.streams


@dataclass(frozen=True)
class Record:
    """One run."""

    spmdeploy: str
    created: str
    """Date and time, UTC."""
    subject: ModelInfo
    protocol: Protocol
    machine: Machine
    before: State
    after: State
    others: BackgroundLoad
    rates: tuple[PeakRates, ...]
    rows: tuple[Result, ...]
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """What `from_json` reads."""
        return {"schema": SCHEMA.name, **dataclasses.asdict(self)}

    @classmethod
    def from_json(cls, value: object, source: str) -> Record:
        """Raises InputError naming `source` and the field."""
        return SCHEMA.convert(value, cls, source)


def read_record(path: Path) -> Record:
    """Raises InputError."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}", MEASURE) from error
    return Record.from_json(SCHEMA.parse(content, str(path)), str(path))


def record_text(record: Record) -> str:
    """The file: a line a field, but for the samples, where a row's turns share a line."""
    rows = [row.samples_ms for row in record.rows]
    value = record.to_json()
    for place, row in enumerate(value["rows"]):
        row["samples_ms"] = str(place)
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)
    for place, samples in enumerate(rows):
        # Inside a text the quotes would be escaped, so that this finds the field and nothing else.
        text = text.replace(f'"samples_ms": "{place}"', f'"samples_ms": {json.dumps(samples)}')
    return text + "\n"

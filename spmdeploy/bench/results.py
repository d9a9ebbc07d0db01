"""The record of a benchmark run: every sample, and where it was measured. See docs/benchmarks.md.

The dataclasses are the schema.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from spmdeploy.bench.machine import BackgroundLoad, Machine, State
from spmdeploy.bench.parity import Parity
from spmdeploy.bench.profile import LayerGroup
from spmdeploy.bench.roofline import PeakRates, RooflineBound
from spmdeploy.bench.schedule import WarmUp
from spmdeploy.errors import InputError
from spmdeploy.inputs import regular_file
from spmdeploy.serialization import Schema
from spmdeploy.stats import Ratio, Summary

MEASURE = "write records with `spmdeploy bench --output FILE.json`"
SCHEMA = Schema("spmdeploy.bench/", 1, "a benchmark record", InputError, MEASURE)

Scope = Literal["engine", "cached-layout", "edit", "cold-start"]
Status = Literal["measured", "unavailable", "differs", "crashed"]


@dataclass(frozen=True)
class ModelInfo:
    """The model that was measured."""

    name: str
    weights: str
    """Their source: the bundle, or random ones of a preset."""
    graphs: dict[str, str]
    """SHA-256 of each graph by name and precision."""
    classes: int
    width: int
    hidden: int
    parameters: int
    gflop: float
    """Counted operations of one 256×256 edit of the plain generator, in units of 1e9."""


@dataclass(frozen=True)
class Methodology:
    """How it was measured; constants are those of `schedule`."""

    command: str
    """Repeats the run; without folders."""
    masks: str
    """Rule for the masks."""
    warm_up: str
    measuring: str
    seconds: float | None
    """Value of --duration; None: 200 iterations (20 cold starts) and 10 seconds, whichever is longer."""


@dataclass(frozen=True)
class BackendInfo:
    """What computed, as reported by the opened session."""

    device: str
    precision: str
    provider: str
    threads: int | None
    """Threads of one call; None: the library's default, one for each core."""
    file_bytes: int | None
    """Size of the loaded graph or engine."""
    weights_bytes: int
    """Size of all parameters in the precision of the arithmetic."""


@dataclass(frozen=True)
class MemoryUsage:
    """Memory of the backend's process in bytes; None if unavailable."""

    ready: int | None
    """Resident set after loading, before the first run."""
    peak: int | None
    """Largest resident set while the row was measured."""
    device: int | None
    """GPU memory of the process after the row, by NVML."""
    activations: int | None = None
    """Memory besides the weights, by the library: TensorRT always, ONNX Runtime and PyTorch with --profile."""
    loaded: int | None = None
    """Size of the graph or engine files loaded by then: includes `refine` once a large edit used it."""


@dataclass(frozen=True)
class Result:
    """One backend in one case: measured figures, or the reason why there are none."""

    scope: Scope
    backend: str
    asked_precision: str
    size: int
    """Height and width of the image."""
    mask: str
    batch: int
    streams: int
    status: Status
    reason: str | None
    ran: BackendInfo | None
    masked_share: float | None
    parity: Parity | None
    first_ms: float | None
    """The first run, which may compile."""
    warm_up: WarmUp | None
    latency_ms: Summary | None
    ratio: Ratio | None
    edits_per_second: float | None
    megapixels_per_second: float | None
    joules_per_edit: float | None
    memory: MemoryUsage | None
    floor: RooflineBound | None
    phases_ms: dict[str, float]
    """Medians by phase."""
    notes: dict[str, str | int]
    parts: tuple[LayerGroup, ...]
    samples_ms: tuple[tuple[float, ...], ...]
    """Every iteration, by turns."""

    @property
    def identity(self) -> tuple[object, ...]:
        """Key of the same row in another record."""
        return self.scope, self.backend, self.asked_precision, self.size, self.mask, self.batch, self.streams

    @property
    def case(self) -> tuple[object, ...]:
        """Key of the group of rows that did the same work."""
        return self.scope, self.size, self.mask, self.batch, self.streams


@dataclass(frozen=True)
class Record:
    """One run."""

    spmdeploy: str
    created: str
    """Date and time, UTC."""
    subject: ModelInfo
    protocol: Methodology
    machine: Machine
    before: State
    after: State
    others: BackgroundLoad
    rates: tuple[PeakRates, ...]
    rows: tuple[Result, ...]
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Inverse of `from_json`."""
        return {"schema": SCHEMA.name, **dataclasses.asdict(self)}

    @classmethod
    def from_json(cls, value: object, source: str) -> Record:
        """Raises InputError naming `source` and the field."""
        return SCHEMA.convert(_with_current_names(value), cls, source)


def _with_current_names(value: object) -> object:
    """Replaces names of earlier versions: the scope `frame` is now `cached-layout`."""
    rows = value.get("rows") if isinstance(value, dict) else None
    if not isinstance(value, dict) or not isinstance(rows, list):
        return value
    renamed = [
        row | {"scope": "cached-layout"} if isinstance(row, dict) and row.get("scope") == "frame" else row
        for row in rows
    ]
    return value | {"rows": renamed}


def read_record(path: Path) -> Record:
    """Reads a record from a JSON file.

    Raises:
        InputError: It cannot be read, or is no record; names the field.
    """
    try:
        content = regular_file(path).read_bytes()
    except OSError as exc:
        raise InputError(f"{path}: cannot be read: {exc.strerror}", MEASURE) from exc
    return Record.from_json(SCHEMA.parse(content, str(path)), str(path))


def record_text(record: Record) -> str:
    """The file: one line for each field, but all samples of a row in one line."""
    rows = [row.samples_ms for row in record.rows]
    value = record.to_json()
    for place, row in enumerate(value["rows"]):
        row["samples_ms"] = str(place)
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)
    for place, samples in enumerate(rows):
        # Quotes inside a text are escaped, so this only finds the field.
        text = text.replace(f'"samples_ms": "{place}"', f'"samples_ms": {json.dumps(samples)}')
    return text + "\n"

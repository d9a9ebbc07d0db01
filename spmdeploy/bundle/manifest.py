"""manifest.json of a bundle: its records, and their strict reading from JSON."""

from __future__ import annotations

import dataclasses
import json
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from pathlib import PurePosixPath
from typing import Any

from spmdeploy.bundle.storage import EXPORT_FIRST, damaged
from spmdeploy.errors import BundleError, SpmDeployError
from spmdeploy.labels import ClassTable
from spmdeploy.serialization import (
    FieldError,
    Fields,
    Reader,
    as_anything,
    as_count,
    as_date,
    as_digest,
    as_inside_name,
    as_number,
    as_object,
    as_plain_name,
    as_text,
    list_of,
    mapping_of,
    one_of,
    or_none,
    parse,
    repeated,
    schema_version,
)
from spmdeploy.types import MODULATIONS, STAGE_COUNTS, ChannelOrder, Modulation, Precision, StageCount, WeightsDtype

SCHEMA_FAMILY, SCHEMA_VERSION = "spmdeploy.bundle/", 1
SCHEMA = f"{SCHEMA_FAMILY}{SCHEMA_VERSION}"


@dataclass(frozen=True)
class GeneratorFacts:
    """The size of the network that the graphs were made from."""

    classes: int
    width: int
    hidden: int
    parameters: int
    gflop: float
    """Operations of one 256x256 edit, in units of 1e9."""
    modulation: Modulation = "spm"
    stages: StageCount = 3


EDIT = "edit"
"""The graph for every library: engines are built from it."""
EDIT_ON_CPU = "edit_cpu"
"""The same inputs and outputs for ONNX Runtime on the CPU: shapes depend on the mask, which spares work."""
REFINE = "refine"
"""The last stage alone, which carries a result up to twice its size. A generator of one stage has none."""
REFINE_ON_CPU = "refine_cpu"
"""The same, as `EDIT_ON_CPU` is to `EDIT`."""
ON_CPU = {EDIT: EDIT_ON_CPU, REFINE: REFINE_ON_CPU}


@dataclass(frozen=True)
class GraphRecord:
    """One ONNX file and what was measured on it when it was written."""

    graph: str
    """What it computes and for whom: `EDIT`, `EDIT_ON_CPU`, `REFINE` or `REFINE_ON_CPU`."""
    precision: Precision
    file: str
    """A name inside the bundle."""
    bytes: int
    sha256: str
    opset: int
    weights_dtype: WeightsDtype
    """How the weights are stored; an FP32 graph may keep halves and cast them."""
    fp16_share: float
    """Share of the operations that compute in FP16, 0..1."""
    fp32_operations: dict[str, int]
    """Operations that compute in FP32, by ONNX operator."""
    parity: dict[str, float | None]
    """Figures of the comparison with torch in FP32. None: infinite (the PSNR of equal pictures)."""
    weights: str | None = None
    """The file beside it that holds its large weights, shared with other graphs; None: it holds them itself."""

    @property
    def files(self) -> tuple[str, ...]:
        """Every file of the bundle that it takes to load it; graphs may share some."""
        return (self.file,) if self.weights is None else (self.file, self.weights)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class GoldenEdit:
    """An edit with the picture that torch in FP32 makes of it."""

    name: str
    folder: str
    note: str
    """Where the photo is from and under which licence."""


@dataclass(frozen=True)
class ParityLimits:
    """What any backend must keep to, inside the mask, against the expected picture of a golden edit."""

    max_grey: float
    mean_grey: float
    min_psnr_db: float


@dataclass(frozen=True)
class SourceFacts:
    """The checkpoint that the bundle was exported from."""

    file: str
    sha256: str
    format: str


@dataclass(frozen=True)
class Manifest:
    """manifest.json."""

    name: str
    """The bundle's, usable as that of a file."""
    created: date
    tools: dict[str, str]
    """Versions of what made it: spmdeploy, torch, onnx, ..."""
    classes: ClassTable
    channel_order: ChannelOrder
    """The order that the source weights were trained in. The graphs take and give RGB in any case."""
    native_size: int
    """Height and width of the pictures that the graphs take."""
    generator: GeneratorFacts
    graphs: tuple[GraphRecord, ...]
    golden: tuple[GoldenEdit, ...]
    limits: dict[Precision, ParityLimits]
    source: SourceFacts
    licence: str
    """Terms of the weights, in words."""
    training: dict[str, object] | None = None
    """What is known of the training run, as it was recorded."""

    @classmethod
    def from_bytes(cls, content: bytes, source: str) -> Manifest:
        """Raises BundleError as `from_json`, and for what is not strict JSON: NaN, a key that is there twice."""
        try:
            value = parse(content)
        except ValueError as exc:
            raise damaged(source, f"not valid JSON: {exc}") from exc
        return cls.from_json(value, source)

    @classmethod
    def from_json(cls, value: object, source: str) -> Manifest:
        """Raises BundleError naming `source` and the field; for a schema that is not ours or newer, saying that."""
        _check_schema(value, source)
        try:
            manifest = _manifest(value, "")
        except FieldError as exc:
            raise damaged(source, exc) from exc
        if fault := manifest._contradiction():
            raise damaged(source, fault)
        return manifest

    def to_bytes(self) -> bytes:
        return (json.dumps(self.to_json(), indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()

    def to_json(self) -> dict[str, Any]:
        """What `from_json` reads."""
        return {
            "schema": SCHEMA,
            **dataclasses.asdict(self),
            "created": self.created.isoformat(),
            "classes": self.classes.to_json(),
            "graphs": [record.to_json() for record in self.graphs],
            "golden": [dataclasses.asdict(edit) for edit in self.golden],
        }

    def _contradiction(self) -> str | None:
        if len(self.classes) != self.generator.classes:
            return f"generator.classes is {self.generator.classes}, but classes lists {len(self.classes)}"
        for words, keys in (
            ("graph", [f"{record.graph} {record.precision}" for record in self.graphs]),
            ("golden edit", [edit.name for edit in self.golden]),
        ):
            if twice := repeated(keys):
                return f"the {words} {twice} is there twice"
        for record in self.graphs:
            if record.weights and PurePosixPath(record.weights).parent != PurePosixPath(record.file).parent:
                return f"the weights {record.weights} do not lie beside {record.file}"
        unlimited = {record.precision for record in self.graphs} - self.limits.keys()
        return f"limits has none for {min(unlimited)}, the precision of a graph" if unlimited else None


# --------------------------------------------------------------------------------------------------------- the schema


def check_version(content: bytes, source: str) -> None:
    """Raises BundleError if manifest.json is another program's or a later version's. Looks at nothing else."""
    with suppress(ValueError):
        _check_schema(parse(content), source)


def _check_schema(value: object, source: str) -> None:
    number = schema_version(value, SCHEMA_FAMILY)
    if number is None:
        schema = value.get("schema") if isinstance(value, dict) else None
        raise BundleError(f"{source}: not a bundle's: its schema is {schema!r}, not {SCHEMA}", EXPORT_FIRST)
    if number > SCHEMA_VERSION:
        newer = f"{SCHEMA_FAMILY}{number}"
        raise BundleError(f"{source}: {newer} is newer than {SCHEMA}, which this version reads", "upgrade spmdeploy")


# ------------------------------------------------------------------------------------------------ record by record


def _manifest(value: object, where: str) -> Manifest:
    fields = Fields(value, where)
    take = fields.take
    return Manifest(
        name=take("name", as_plain_name),
        created=take("created", as_date),
        tools=take("tools", mapping_of(as_text, as_text)),
        classes=take("classes", _class_table),
        channel_order=take("channel_order", one_of("RGB", "BGR")),
        native_size=take("native_size", as_count),
        generator=take("generator", _generator_facts),
        graphs=take("graphs", list_of(_graph_record)),
        golden=take("golden", list_of(_golden_edit)),
        limits=take("limits", mapping_of(as_precision, _parity_limits)),
        source=take("source", _source_facts),
        licence=take("licence", as_text),
        training=fields.take_optional("training", mapping_of(as_text, as_anything)),
    )


def _generator_facts(value: object, where: str) -> GeneratorFacts:
    fields = Fields(value, where)
    take = fields.take
    return GeneratorFacts(
        classes=take("classes", as_count),
        width=take("width", as_count),
        hidden=take("hidden", as_count),
        parameters=take("parameters", as_count),
        gflop=take("gflop", as_number),
        # Bundles from before there was a choice do not name it.
        modulation=fields.take_optional("modulation", one_of(*MODULATIONS)) or "spm",
        stages=fields.take_optional("stages", one_of(*STAGE_COUNTS)) or 3,
    )


def _graph_record(value: object, where: str) -> GraphRecord:
    fields = Fields(value, where)
    take = fields.take
    return GraphRecord(
        graph=take("graph", as_text),
        precision=take("precision", as_precision),
        file=take("file", as_inside_name),
        bytes=take("bytes", as_count),
        sha256=take("sha256", as_digest),
        opset=take("opset", as_count),
        weights_dtype=take("weights_dtype", one_of("float32", "float16")),
        fp16_share=take("fp16_share", as_number),
        fp32_operations=take("fp32_operations", mapping_of(as_text, as_count)),
        parity=take("parity", mapping_of(as_text, or_none(as_number))),
        weights=fields.take_optional("weights", as_inside_name),
    )


def _golden_edit(value: object, where: str) -> GoldenEdit:
    take = Fields(value, where).take
    return GoldenEdit(
        name=take("name", as_plain_name), folder=take("folder", as_inside_name), note=take("note", as_text)
    )


def _parity_limits(value: object, where: str) -> ParityLimits:
    take = Fields(value, where).take
    return ParityLimits(
        max_grey=take("max_grey", as_number),
        mean_grey=take("mean_grey", as_number),
        min_psnr_db=take("min_psnr_db", as_number),
    )


def _source_facts(value: object, where: str) -> SourceFacts:
    take = Fields(value, where).take
    return SourceFacts(file=take("file", as_text), sha256=take("sha256", as_digest), format=take("format", as_text))


def _class_table(value: object, where: str) -> ClassTable:
    try:
        return ClassTable.from_json(as_object(value, where), where)
    except SpmDeployError as exc:
        raise FieldError(exc.problem) from exc


as_precision: Reader[Precision] = one_of("fp32", "fp16")

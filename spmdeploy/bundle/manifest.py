"""Records of a bundle's manifest.json."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from pathlib import PurePosixPath
from typing import Any

from spmdeploy.bundle.storage import COPY_AGAIN, corrupt_bundle_error
from spmdeploy.errors import BundleError, SpmDeployError
from spmdeploy.files import is_safe_relative_path
from spmdeploy.labels import ClassTable
from spmdeploy.serialization import Count, Finite, Schema, Sha256, format_json, parse_json, shorten
from spmdeploy.types import ChannelOrder, Modulation, Precision, StageCount, WeightsDtype

SCHEMA = Schema("spmdeploy.bundle/", 2, "the manifest of a bundle", BundleError, COPY_AGAIN)


@dataclass(frozen=True)
class GeneratorFacts:
    """Size of the network that the graphs were exported from."""

    classes: Count
    width: Count
    hidden: Count
    parameters: Count
    gflop: Finite
    """Operations of one 256x256 edit, in units of 1e9."""
    modulation: Modulation = "spm"
    stages: StageCount = 3


EDIT = "edit"
"""The graph for all libraries; engines are built from it."""
EDIT_ON_CPU = "edit_cpu"
"""The same inputs and outputs for ONNX Runtime on the CPU: shapes depend on the mask, which saves work."""
REFINE = "refine"
"""The last stage alone, which refines a result at twice its size. A generator of one stage has none."""
REFINE_ON_CPU = "refine_cpu"
"""The same, as `EDIT_ON_CPU` is to `EDIT`."""
LAYOUT = "layout"
"""The part of `edit` that depends on labels, instances and mask alone (since schema 2). Its outputs are the cached
tensors."""
PICTURE = "picture"
"""The rest of `edit`: image and cached tensors to the result (since schema 2)."""
LAYOUT_ON_CPU, PICTURE_ON_CPU = "layout_cpu", "picture_cpu"
"""The parts of `EDIT_ON_CPU`."""
ON_CPU = {EDIT: EDIT_ON_CPU, REFINE: REFINE_ON_CPU, LAYOUT: LAYOUT_ON_CPU, PICTURE: PICTURE_ON_CPU}
PARTS = {EDIT: (LAYOUT, PICTURE), EDIT_ON_CPU: (LAYOUT_ON_CPU, PICTURE_ON_CPU)}
"""The two parts of a graph, for repeated edits with one layout."""


@dataclass(frozen=True)
class GraphRecord:
    """One ONNX file and its measurements at export."""

    graph: str
    """`EDIT`, `REFINE`, `LAYOUT`, `PICTURE` or one of their forms in `ON_CPU`."""
    precision: Precision
    file: str
    """A name inside the bundle."""
    bytes: Count
    sha256: Sha256
    opset: Count
    weights_dtype: WeightsDtype
    """How the weights are stored; an FP32 graph may keep halves and cast them."""
    fp16_share: Finite
    """Share of the operations that compute in FP16, 0..1."""
    fp32_operations: dict[str, Count]
    """Operations that compute in FP32, by ONNX operator."""
    parity: dict[str, Finite | None]
    """Comparison with torch in FP32. None: infinite (the PSNR of equal images)."""
    weights: str | None = None
    """The external data file in the same folder, which other graphs may share; None if it has none."""

    @property
    def files(self) -> tuple[str, ...]:
        """The files that it is loaded from; graphs may share some."""
        return (self.file,) if self.weights is None else (self.file, self.weights)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, as in manifest.json."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class GoldenEdit:
    """An edit with its result by torch in FP32."""

    name: str
    folder: str
    note: str
    """Source and license of the photo."""


@dataclass(frozen=True)
class ParityLimits:
    """Maximum deviation of a backend from the expected image of a golden edit, inside the mask."""

    max_grey: Finite
    mean_grey: Finite
    min_psnr_db: Finite


@dataclass(frozen=True)
class SourceFacts:
    """The checkpoint that the bundle was exported from."""

    file: str
    sha256: Sha256
    format: str


@dataclass(frozen=True)
class Manifest:
    """manifest.json."""

    name: str
    """Usable as the name of a file."""
    created: date
    tools: dict[str, str]
    """Versions of spmdeploy, torch, onnx, ... that made it."""
    classes: ClassTable
    channel_order: ChannelOrder
    """The order that the source weights were trained in. The graphs use RGB in any case."""
    native_size: Count
    """Height and width of the graphs' images."""
    generator: GeneratorFacts
    graphs: tuple[GraphRecord, ...]
    golden: tuple[GoldenEdit, ...]
    limits: dict[Precision, ParityLimits]
    source: SourceFacts
    licence: str
    """Terms of the weights."""
    training: dict[str, object] | None = None
    """The record of the training run, if there is one."""

    @classmethod
    def from_bytes(cls, content: bytes, source: str) -> Manifest:
        """Reads manifest.json.

        Args:
            content: Of the file.
            source: Named in errors.

        Raises:
            BundleError: It is no manifest; names the field where one is wrong.
        """
        return cls.from_json(SCHEMA.parse(content, source), source)

    @classmethod
    def from_json(cls, value: object, source: str) -> Manifest:
        """The same from parsed JSON."""
        fields = SCHEMA.check(value, source)
        if isinstance(fields.get("classes"), dict):
            try:
                fields = {**fields, "classes": ClassTable.from_json(fields["classes"], "classes")}
            except SpmDeployError as exc:
                raise corrupt_bundle_error(source, exc.problem) from exc
        manifest = SCHEMA.convert(fields, cls, source)
        if problem := manifest._problem():
            raise corrupt_bundle_error(source, problem)
        return manifest

    def to_bytes(self) -> bytes:
        """The content of manifest.json."""
        return format_json(self.to_json())

    def to_json(self) -> dict[str, Any]:
        """JSON value that `from_json` reads."""
        return {
            "schema": SCHEMA.name,
            **dataclasses.asdict(self),
            "created": self.created.isoformat(),
            "classes": self.classes.to_json(),
            "graphs": [record.to_json() for record in self.graphs],
            "golden": [dataclasses.asdict(edit) for edit in self.golden],
        }

    def _problem(self) -> str | None:
        """Checks that types cannot express: unsafe names, and records that contradict each other."""
        for where, name, plain in self._names():
            if not is_safe_relative_path(name) or (plain and "/" in name):
                expected = "a plain name without /" if plain else "a relative path inside the bundle"
                return f"{where} is {shorten(name)}, not {expected}"
        if len(self.classes) != self.generator.classes:
            return f"generator.classes is {self.generator.classes}, but classes lists {len(self.classes)}"
        for what, keys in (
            ("graph", [f"{record.graph} {record.precision}" for record in self.graphs]),
            ("golden edit", [edit.name for edit in self.golden]),
        ):
            if twice := [key for key, count in Counter(keys).items() if count > 1]:
                return f"the {what} {twice[0]} is there twice"
        for record in self.graphs:
            if record.weights and PurePosixPath(record.weights).parent != PurePosixPath(record.file).parent:
                return f"the weights {record.weights} are not in the folder of {record.file}"
        unlimited = {record.precision for record in self.graphs} - self.limits.keys()
        return f"limits has none for {min(unlimited)}, the precision of a graph" if unlimited else None

    def _names(self) -> Iterator[tuple[str, str, bool]]:
        """Every name and path with the path of its field, and whether it must be without slashes."""
        yield "name", self.name, True
        for i, record in enumerate(self.graphs):
            yield f"graphs[{i}].file", record.file, False
            if record.weights is not None:
                yield f"graphs[{i}].weights", record.weights, False
        for i, edit in enumerate(self.golden):
            yield f"golden[{i}].name", edit.name, True
            yield f"golden[{i}].folder", edit.folder, False


def check_version(content: bytes, source: str) -> None:
    """Raises BundleError if manifest.json is of another program or of a later schema; checks nothing else."""
    with suppress(ValueError):
        SCHEMA.check(parse_json(content), source)

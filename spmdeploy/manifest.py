"""manifest.json of a bundle: its records, and their strict reading from JSON.

A value of the wrong type or range is refused by its path in the file. Unknown fields are passed over, so that a later
1.x may add some.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from typing import Any, Literal, NoReturn, TypeAlias, TypeVar

from spmdeploy.bundle_files import EXPORT_FIRST, damaged, is_inside
from spmdeploy.errors import BundleError, SpmDeployError
from spmdeploy.labels import ClassTable

SCHEMA_FAMILY, SCHEMA_VERSION = "spmdeploy.bundle/", 1
SCHEMA = f"{SCHEMA_FAMILY}{SCHEMA_VERSION}"

Precision = Literal["fp32", "fp16"]
WeightsDtype = Literal["float32", "float16"]
ChannelOrder = Literal["RGB", "BGR"]


@dataclass(frozen=True)
class GeneratorFacts:
    """The size of the network that the graphs were made from."""

    classes: int
    width: int
    hidden: int
    parameters: int
    gflop: float
    """Operations of one 256x256 edit, in units of 1e9."""


EDIT = "edit"
"""The graph for every library: engines are built from it."""
EDIT_ON_CPU = "edit_cpu"
"""The same inputs and outputs for ONNX Runtime on the CPU: shapes depend on the mask, which spares work."""


@dataclass(frozen=True)
class GraphRecord:
    """One ONNX file and what was measured on it when it was written."""

    graph: str
    """What it computes and for whom: `EDIT` or `EDIT_ON_CPU`."""
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
            value = _parse(content)
        except ValueError as exc:
            raise damaged(source, f"not valid JSON: {exc}") from exc
        return cls.from_json(value, source)

    @classmethod
    def from_json(cls, value: object, source: str) -> Manifest:
        """Raises BundleError naming `source` and the field; for a schema that is not ours or newer, saying that."""
        _check_schema(value, source)
        try:
            manifest = _manifest(value, "")
        except _WrongField as exc:
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
            if repeated := _repeated(keys):
                return f"the {words} {repeated} is there twice"
        unlimited = {record.precision for record in self.graphs} - self.limits.keys()
        return f"limits has none for {min(unlimited)}, the precision of a graph" if unlimited else None


def _repeated(names: Iterable[str]) -> str | None:
    return next((name for name, count in Counter(names).items() if count > 1), None)


# --------------------------------------------------------------------------------------------------------- the schema


def check_version(content: bytes, source: str) -> None:
    """Raises BundleError if manifest.json is another program's or a later version's. Looks at nothing else."""
    with suppress(ValueError):
        _check_schema(_parse(content), source)


def _check_schema(value: object, source: str) -> None:
    schema = value.get("schema") if isinstance(value, dict) else None
    number = re.fullmatch(re.escape(SCHEMA_FAMILY) + r"([1-9][0-9]{0,5})", schema) if isinstance(schema, str) else None
    if number is None:
        raise BundleError(f"{source}: not a bundle's: its schema is {schema!r}, not {SCHEMA}", EXPORT_FIRST)
    if int(number[1]) > SCHEMA_VERSION:
        raise BundleError(f"{source}: {schema} is newer than {SCHEMA}, which this version reads", "upgrade spmdeploy")


# ------------------------------------------------------------------------------------------------ record by record


def _manifest(value: object, where: str) -> Manifest:
    fields = _Fields(value, where)
    take = fields.take
    return Manifest(
        name=take("name", _plain_name),
        created=take("created", _date),
        tools=take("tools", _mapping(_text, _text)),
        classes=take("classes", _class_table),
        channel_order=take("channel_order", _one_of("RGB", "BGR")),
        native_size=take("native_size", _count),
        generator=take("generator", _generator_facts),
        graphs=take("graphs", _list(_graph_record)),
        golden=take("golden", _list(_golden_edit)),
        limits=take("limits", _mapping(_precision, _parity_limits)),
        source=take("source", _source_facts),
        licence=take("licence", _text),
        training=fields.take_optional("training", _mapping(_text, _anything)),
    )


def _generator_facts(value: object, where: str) -> GeneratorFacts:
    take = _Fields(value, where).take
    return GeneratorFacts(
        classes=take("classes", _count),
        width=take("width", _count),
        hidden=take("hidden", _count),
        parameters=take("parameters", _count),
        gflop=take("gflop", _number),
    )


def _graph_record(value: object, where: str) -> GraphRecord:
    take = _Fields(value, where).take
    return GraphRecord(
        graph=take("graph", _text),
        precision=take("precision", _precision),
        file=take("file", _inside_name),
        bytes=take("bytes", _count),
        sha256=take("sha256", _digest),
        opset=take("opset", _count),
        weights_dtype=take("weights_dtype", _one_of("float32", "float16")),
        fp16_share=take("fp16_share", _number),
        fp32_operations=take("fp32_operations", _mapping(_text, _count)),
        parity=take("parity", _mapping(_text, _number_or_none)),
    )


def _golden_edit(value: object, where: str) -> GoldenEdit:
    take = _Fields(value, where).take
    return GoldenEdit(name=take("name", _plain_name), folder=take("folder", _inside_name), note=take("note", _text))


def _parity_limits(value: object, where: str) -> ParityLimits:
    take = _Fields(value, where).take
    return ParityLimits(
        max_grey=take("max_grey", _number),
        mean_grey=take("mean_grey", _number),
        min_psnr_db=take("min_psnr_db", _number),
    )


def _source_facts(value: object, where: str) -> SourceFacts:
    take = _Fields(value, where).take
    return SourceFacts(file=take("file", _text), sha256=take("sha256", _digest), format=take("format", _text))


# ------------------------------------------------------------------------------------------------------ value by value

T = TypeVar("T")
K = TypeVar("K")
Reader: TypeAlias = Callable[[object, str], T]
"""Makes a value from JSON into a T; the second argument is its path in the file. Raises _WrongField."""


class _WrongField(Exception):
    """A field that is missing or not what it should be; becomes a BundleError where the file's name is known."""


class _Fields:
    """The fields of a JSON object, to be taken one by one."""

    def __init__(self, value: object, where: str) -> None:
        self._given = _object(value, where or "the manifest")
        self._prefix = f"{where}." if where else ""

    def take(self, name: str, read: Reader[T]) -> T:
        if name not in self._given:
            raise _WrongField(f"{self._prefix}{name} is missing")
        return read(self._given[name], self._prefix + name)

    def take_optional(self, name: str, read: Reader[T]) -> T | None:
        """None where the field is missing or null."""
        return None if self._given.get(name) is None else self.take(name, read)


def _refuse(value: object, where: str, expected: str) -> NoReturn:
    shown = repr(value)
    raise _WrongField(f"{where} is {shown if len(shown) <= 60 else shown[:57] + '...'}, not {expected}")


def _object(value: object, where: str) -> dict[str, object]:
    return value if isinstance(value, dict) else _refuse(value, where, "an object")


def _text(value: object, where: str) -> str:
    return value if isinstance(value, str) else _refuse(value, where, "text")


def _inside_name(value: object, where: str) -> str:
    name = _text(value, where)
    return name if is_inside(name) else _refuse(value, where, "a relative path inside the bundle")


def _plain_name(value: object, where: str) -> str:
    name = _text(value, where)
    return name if is_inside(name) and "/" not in name else _refuse(value, where, "a plain name without /")


def _digest(value: object, where: str) -> str:
    text = _text(value, where)
    if not re.fullmatch(r"[0-9a-f]{64}", text):
        _refuse(value, where, "a SHA-256 in 64 lower-case hexadecimal digits")
    return text


def _count(value: object, where: str) -> int:
    # type() instead of isinstance, here and in _number: True is an int to Python.
    return value if type(value) is int and value >= 0 else _refuse(value, where, "a whole number from 0")


def _number(value: object, where: str) -> float:
    limit = sys.float_info.max  # comparing refuses NaN and infinities, and whole numbers too large for a float
    if (type(value) is int or type(value) is float) and -limit <= value <= limit:
        return float(value)
    _refuse(value, where, "a finite number")


def _number_or_none(value: object, where: str) -> float | None:
    return None if value is None else _number(value, where)


def _date(value: object, where: str) -> date:
    with suppress(ValueError):
        day = date.fromisoformat(_text(value, where))
        if day.isoformat() == value:  # fromisoformat reads week dates and more
            return day
    _refuse(value, where, "a date YYYY-MM-DD")


def _class_table(value: object, where: str) -> ClassTable:
    try:
        return ClassTable.from_json(_object(value, where), where)
    except SpmDeployError as exc:
        raise _WrongField(exc.problem) from exc


def _anything(value: object, where: str) -> object:
    return value


def _one_of(*choices: T) -> Reader[T]:
    def read(value: object, where: str) -> T:
        for choice in choices:
            if value == choice:
                return choice
        _refuse(value, where, " or ".join(map(str, choices)))

    return read


_precision: Reader[Precision] = _one_of("fp32", "fp16")


def _list(read_item: Reader[T]) -> Reader[tuple[T, ...]]:
    def read(value: object, where: str) -> tuple[T, ...]:
        if not isinstance(value, list):
            _refuse(value, where, "a list")
        return tuple(read_item(item, f"{where}[{i}]") for i, item in enumerate(value))

    return read


def _mapping(read_key: Reader[K], read_item: Reader[T]) -> Reader[dict[K, T]]:
    def read(value: object, where: str) -> dict[K, T]:
        entries = _object(value, where).items()
        return {read_key(key, f"a key of {where}"): read_item(item, f"{where}.{key}") for key, item in entries}

    return read


# ---------------------------------------------------------------------------------------------------------- strict JSON


def _parse(content: bytes) -> object:
    """Strict JSON: no NaN, no key twice. Raises ValueError."""
    try:
        return json.loads(content, object_pairs_hook=_unrepeated, parse_constant=_refuse_constant)
    except RecursionError as exc:
        raise ValueError("nested too deeply") from exc


def _unrepeated(pairs: list[tuple[str, object]]) -> dict[str, object]:
    if twice := _repeated([key for key, _ in pairs]):
        raise ValueError(f"the key {twice!r} is there twice")
    return dict(pairs)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")

"""Reads JSON into dataclasses by their annotations, with schema versions and limits against hostile input.

Unknown fields are ignored, so that later versions of a schema may add some.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn, TypeVar

import msgspec

from spmdeploy.errors import SpmDeployError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T")

Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
Finite = Annotated[float, msgspec.Meta(ge=-sys.float_info.max, le=sys.float_info.max)]
"""Excludes NaN and infinities."""
Sha256 = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]

MAX_DEPTH = 64
"""Levels of nesting that `parse_json` accepts; recursive code such as dataclasses.asdict stays far from its limit."""


class FieldError(Exception):
    """A field that is missing or has the wrong type or value; the message starts with its path."""


@dataclass(frozen=True)
class Schema:
    """A kind of JSON file, identified by the field `schema`, and the error for a file that is not one."""

    family: str
    """Without the version: "spmdeploy.bundle/"."""
    version: int
    """The newest version that can be read."""
    description: str
    """Completes "not ...": "the manifest of a bundle"."""
    error: type[SpmDeployError]
    hint: str

    @property
    def name(self) -> str:
        """Value of the field `schema` in files that this version writes."""
        return f"{self.family}{self.version}"

    def parse(self, content: bytes, source: str) -> dict[str, Any]:
        """Parses a file and checks its schema, nothing else. Raises `error`, naming `source`."""
        try:
            value = parse_json(content)
        except ValueError as exc:
            raise self.error(f"{source}: not valid JSON: {exc}", self.hint) from exc
        return self.check(value, source)

    def check(self, value: object, source: str) -> dict[str, Any]:
        """The same for parsed JSON."""
        found = value.get("schema") if isinstance(value, dict) else None
        number = re.fullmatch(re.escape(self.family) + r"([1-9][0-9]{0,5})", found) if isinstance(found, str) else None
        if number is None:
            shown = shorten(found)
            raise self.error(f"{source}: not {self.description}: its schema is {shown}, not {self.name}", self.hint)
        if int(number[1]) > self.version:
            newer = f"{number[0]} is newer than {self.name}, which this version reads"
            raise self.error(f"{source}: {newer}", "upgrade spmdeploy")
        return typing.cast(dict[str, Any], value)

    def convert(self, value: object, kind: type[T], source: str) -> T:
        """Converts parsed JSON as `convert` does. Raises `error`, naming `source` and the field."""
        try:
            return convert(self.check(value, source), kind)
        except FieldError as exc:
            raise self.error(f"{source}: {exc}", self.hint) from exc


def parse_json(content: bytes | str) -> Any:
    """Parses JSON, refusing NaN, numbers out of range, repeated keys and deep nesting.

    Raises:
        ValueError: `content` is not JSON, or is refused.
    """
    try:
        value = json.loads(
            content,
            object_pairs_hook=_unique_keys,
            parse_constant=_refuse_constant,
            parse_float=_parse_float,
            parse_int=_parse_int,
        )
    except RecursionError as exc:
        raise ValueError("nested too deeply") from exc
    level = [value]
    for _ in range(MAX_DEPTH):
        if text := next((item for item in level if isinstance(item, str) and not _is_unicode(item)), None):
            raise ValueError(f"{shorten(text)} is not valid Unicode")
        level = [item for outer in level if isinstance(outer, dict | list) for item in _items(outer)]
        if not level:
            return value
    raise ValueError("nested too deeply")


def format_json(value: Mapping[str, Any]) -> bytes:
    """Formats a record for a file.

    Raises:
        ValueError: It has NaN or infinities, which JSON does not have.
    """
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def convert(value: object, kind: type[T]) -> T:
    """Converts parsed JSON to `kind`, a dataclass; fields without a default must be present.

    Raises:
        FieldError: A field is missing, or has the wrong type or value.
    """
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as exc:
        message, _, path = str(exc).partition(" - at `")
        raise FieldError(_describe(message, path.removesuffix("`"), value, kind)) from exc


def unknown_field(value: object, record: DataclassInstance) -> str | None:
    """The path of a field in parsed JSON that the dataclass converted from it does not have."""
    return _unknown(value, dataclasses.asdict(record))


def _unknown(value: object, known: object) -> str | None:
    if isinstance(value, dict) and isinstance(known, dict):
        if extra := value.keys() - known.keys():
            return str(min(extra))
        below = [(f"{key}.", item, known[key]) for key, item in value.items()]
    elif isinstance(value, list) and isinstance(known, list | tuple):
        below = [(f"[{i}].", item, known[i]) for i, item in enumerate(value)]
    else:
        return None
    found = ((prefix, _unknown(item, inner)) for prefix, item, inner in below)
    return next((f"{prefix}{name}".replace(".[", "[") for prefix, name in found if name), None)


def shorten(value: object, length: int = 60) -> str:
    """The repr of a value for a message, cut to `length` characters."""
    shown = repr(value)
    return shown if len(shown) <= length else f"{shown[: length - 3]}..."


def _items(outer: dict[str, object] | list[object]) -> typing.Iterable[object]:
    return (*outer, *outer.values()) if isinstance(outer, dict) else outer


def _is_unicode(text: str) -> bool:
    """Whether a text has no lone surrogates, which cannot be encoded."""
    return text.isascii() or not any(0xD800 <= ord(character) < 0xE000 for character in text)


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {shorten(max(keys, key=keys.count))} is there twice")
    return fields


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _parse_float(text: str) -> float:
    number = float(text)
    if number in (float("inf"), float("-inf")):
        raise ValueError(f"the number {text[:20]} is out of range")
    return number


def _parse_int(text: str) -> int:
    if len(text) > 20 or not -(2**63) <= int(text) < 2**64:
        raise ValueError(f"the number {text[:20]}... is out of range")
    return int(text)


def _describe(message: str, path: str, value: Any, kind: Any) -> str:
    """A message of msgspec with the path and value of the field: "graphs[0].opset is 'x', expected `int`"."""
    in_key = path.startswith("key` in `")
    where, value, kind = _follow(path, value, kind)
    if missing := re.fullmatch("Object missing required field `(.+)`", message):
        return f"{where}.{missing[1]} is missing".removeprefix(".")
    if in_key:
        kind, where = typing.get_args(kind)[0], f"a key of {where}"
        value = next(key for key in value if not _fits(key, kind))
    if typing.get_origin(kind) is Literal:
        message = f"expected {' or '.join(map(str, typing.get_args(kind)))}"
    return f"{where or 'the file'} is {shorten(value)}, {message[0].lower()}{message[1:]}"


def _follow(path: str, value: Any, kind: Any) -> tuple[str, Any, Any]:
    """Path, value and annotation of the field that a path of msgspec, as in "$.graphs[0].parity[...]", leads to."""
    where, kind = "", _without_none(kind)
    for name, index in re.findall(r"\.(\w+)|\[(\d+|\.\.\.)\]", path):
        if name:
            where, value, kind = f"{where}.{name}", value[name], typing.get_type_hints(kind, include_extras=True)[name]
        elif index != "...":
            where, value, kind = f"{where}[{index}]", value[int(index)], _kind_of_item(kind, int(index))
        else:  # msgspec does not name the key
            kind = typing.get_args(kind)[1]
            key = next(key for key, item in value.items() if not _fits(item, kind))
            where, value = f"{where}.{key}", value[key]
        kind = _without_none(kind)
    return where.removeprefix("."), value, kind


def _kind_of_item(kind: Any, index: int) -> Any:
    """The annotation of an item of a list, a tuple or a NamedTuple."""
    kind = getattr(kind, "__origin__", kind) if hasattr(kind, "__metadata__") else kind  # X of Annotated[X, ...]
    if hasattr(kind, "_fields"):
        return typing.get_type_hints(kind, include_extras=True)[kind._fields[index]]
    kinds = typing.get_args(kind)
    return kinds[index] if ... not in kinds and index < len(kinds) else kinds[0]


def _without_none(kind: Any) -> Any:
    """The annotation X of `X | None`; any other as it is."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        kinds = [each for each in typing.get_args(kind) if each is not types.NoneType]
        return kinds[0] if len(kinds) == 1 else kind
    return kind


def _fits(value: object, kind: Any) -> bool:
    try:
        msgspec.convert(value, kind)
    except msgspec.ValidationError:
        return False
    return True

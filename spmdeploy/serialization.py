"""Records from JSON, read strictly: a value of the wrong type or range is refused by its path in the file.

Unknown fields are passed over, so that a later 1.x may add some.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import date
from typing import NoReturn, TypeAlias, TypeVar

from spmdeploy.files import is_safe_relative_path

T = TypeVar("T")
K = TypeVar("K")
Reader: TypeAlias = Callable[[object, str], T]
"""Makes a value from JSON into a T; the second argument is its path in the file. Raises WrongField."""


class FieldError(Exception):
    """A field that is missing or not what it should be; becomes a BundleError where the file's name is known."""


def parse(content: bytes) -> object:
    """JSON without NaN and without a key that is there twice. Raises ValueError."""
    try:
        return json.loads(content, object_pairs_hook=_unrepeated, parse_constant=_refuse_constant)
    except RecursionError as exc:
        raise ValueError("nested too deeply") from exc


def repeated(names: Iterable[str]) -> str | None:
    """A name that is there more than once."""
    return next((name for name, count in Counter(names).items() if count > 1), None)


def schema_version(value: object, family: str) -> int | None:
    """The number behind `family` in the field `schema`; None for another family or what is no such object."""
    schema = value.get("schema") if isinstance(value, dict) else None
    number = re.fullmatch(re.escape(family) + r"([1-9][0-9]{0,5})", schema) if isinstance(schema, str) else None
    return None if number is None else int(number[1])


def _unrepeated(pairs: list[tuple[str, object]]) -> dict[str, object]:
    if twice := repeated([key for key, _ in pairs]):
        raise ValueError(f"the key {twice!r} is there twice")
    return dict(pairs)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


# ------------------------------------------------------------------------------------------------------ value by value


class Fields:
    """The fields of a JSON object, to be taken one by one."""

    def __init__(self, value: object, where: str) -> None:
        self._given = as_object(value, where or "the file")
        self._prefix = f"{where}." if where else ""

    def take(self, name: str, read: Reader[T]) -> T:
        if name not in self._given:
            raise FieldError(f"{self._prefix}{name} is missing")
        return read(self._given[name], self._prefix + name)

    def take_optional(self, name: str, read: Reader[T]) -> T | None:
        """None where the field is missing or null."""
        return None if self._given.get(name) is None else self.take(name, read)


def refuse(value: object, where: str, expected: str) -> NoReturn:
    shown = repr(value)
    raise FieldError(f"{where} is {shown if len(shown) <= 60 else shown[:57] + '...'}, not {expected}")


def as_object(value: object, where: str) -> dict[str, object]:
    return value if isinstance(value, dict) else refuse(value, where, "an object")


def as_text(value: object, where: str) -> str:
    return value if isinstance(value, str) else refuse(value, where, "text")


def as_flag(value: object, where: str) -> bool:
    return value if isinstance(value, bool) else refuse(value, where, "true or false")


def as_inside_name(value: object, where: str) -> str:
    name = as_text(value, where)
    return name if is_safe_relative_path(name) else refuse(value, where, "a relative path inside the bundle")


def as_plain_name(value: object, where: str) -> str:
    name = as_text(value, where)
    return name if is_safe_relative_path(name) and "/" not in name else refuse(value, where, "a plain name without /")


def as_digest(value: object, where: str) -> str:
    text = as_text(value, where)
    if not re.fullmatch(r"[0-9a-f]{64}", text):
        refuse(value, where, "a SHA-256 in 64 lower-case hexadecimal digits")
    return text


def as_count(value: object, where: str) -> int:
    # type() instead of isinstance, here and in as_number: True is an int to Python.
    return value if type(value) is int and value >= 0 else refuse(value, where, "a whole number from 0")


def as_number(value: object, where: str) -> float:
    limit = sys.float_info.max  # comparing refuses NaN and infinities, and whole numbers too large for a float
    if (type(value) is int or type(value) is float) and -limit <= value <= limit:
        return float(value)
    refuse(value, where, "a finite number")


def as_date(value: object, where: str) -> date:
    with suppress(ValueError):
        day = date.fromisoformat(as_text(value, where))
        if day.isoformat() == value:  # fromisoformat reads week dates and more
            return day
    refuse(value, where, "a date YYYY-MM-DD")


def as_anything(value: object, where: str) -> object:
    return value


def or_none(read: Reader[T]) -> Reader[T | None]:
    return lambda value, where: None if value is None else read(value, where)


def one_of(*choices: T) -> Reader[T]:
    def read(value: object, where: str) -> T:
        for choice in choices:
            if type(value) is type(choice) and value == choice:  # True is 1 to Python
                return choice
        refuse(value, where, " or ".join(map(str, choices)))

    return read


def list_of(read_item: Reader[T]) -> Reader[tuple[T, ...]]:
    def read(value: object, where: str) -> tuple[T, ...]:
        if not isinstance(value, list):
            refuse(value, where, "a list")
        return tuple(read_item(item, f"{where}[{i}]") for i, item in enumerate(value))

    return read


def mapping_of(read_key: Reader[K], read_item: Reader[T]) -> Reader[dict[K, T]]:
    def read(value: object, where: str) -> dict[K, T]:
        entries = as_object(value, where).items()
        return {read_key(key, f"a key of {where}"): read_item(item, f"{where}.{key}") for key, item in entries}

    return read

"""Strict JSON: limits on hostile input, schema versions, and messages that name file, field and value."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Annotated, Literal, NamedTuple

import pytest
from msgspec import Meta

from spmdeploy.errors import InputError
from spmdeploy.serialization import Count, FieldError, Finite, Schema, convert, format_json, parse_json, unknown_field

SCHEMA = Schema("spmdeploy.sample/", 2, "a sample", InputError, "write it again")


@dataclass(frozen=True)
class Part:
    size: Count
    kind: Literal["round", "square"] = "round"


@dataclass(frozen=True)
class Whole:
    name: str
    parts: tuple[Part, ...]
    scores: dict[str, Finite | None] = field(default_factory=dict)
    by_kind: dict[Literal["round", "square"], Part] = field(default_factory=dict)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000 + "]" * 100_000, "nested too deeply"),
        ("[" * 65 + "]" * 65, "nested too deeply"),
        ('{"a":' * 70 + "1" + "}" * 70, "nested too deeply"),
        ('{"a": 1, "b": 2, "a": 3}', "the key 'a' is there twice"),
        ("NaN", "NaN is not JSON"),
        ("[-Infinity]", "-Infinity is not JSON"),
        ("1e999", "the number 1e999 is out of range"),
        ("1" * 5000, "the number 11111111111111111111... is out of range"),
        ("18446744073709551616", "out of range"),
        ('{"a": ["\\ud800"]}', r"'\\ud800' is not valid Unicode"),
        ('{"\\udfff": 1}', r"'\\udfff' is not valid Unicode"),
        ("{", "Expecting property name"),
        ("", "Expecting value"),
    ],
)
def test_parse_json_hostile_text_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        parse_json(text)


def test_parse_json_ordinary_text_is_read() -> None:
    text = '{"a": [1, -2.5, 1e300, null, true, "\\u00e9"], "b": {"c": 18446744073709551615}}'
    assert parse_json(text.encode()) == json.loads(text)
    assert parse_json("[" * 64 + "]" * 64)


def test_parse_json_bytes_that_are_no_text_are_refused() -> None:
    with pytest.raises(ValueError, match="utf-8"):
        parse_json(b'"\xff"')


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": ...}, "name is missing"),
        ({"name": 5}, "name is 5, expected `str`, got `int`"),
        ({"parts": [{}]}, "parts[0].size is missing"),
        ({"parts": [{"size": 1}, {"size": -1}]}, "parts[1].size is -1, expected `int` >= 0"),
        ({"parts": [{"size": 1, "kind": "flat"}]}, "parts[0].kind is 'flat', expected round or square"),
        ({"parts": [{"size": True}]}, "parts[0].size is True, expected `int`, got `bool`"),
        ({"scores": {"a": 1, "b": "x" * 99}}, f"scores.b is '{'x' * 56}..., expected `float | null`, got `str`"),
        ({"scores": {"a": float("nan")}}, "scores.a is nan, expected `float` >= -1.7976931348623157e+308"),
        ({"by_kind": {"flat": {"size": 1}}}, "a key of by_kind is 'flat', expected round or square"),
        ({"by_kind": {"round": {"size": 1}, "square": {}}}, "by_kind.square.size is missing"),
        ({"parts": [3]}, "parts[0] is 3, expected `object`, got `int`"),
    ],
)
def test_convert_wrong_field_is_named_with_its_value(change: dict[str, object], message: str) -> None:
    fields = {"name": "x", "parts": [], **change}
    with pytest.raises(FieldError) as caught:
        convert({name: value for name, value in fields.items() if value is not ...}, Whole)
    assert str(caught.value) == message


class Sides(NamedTuple):
    left: int
    right: float


@dataclass(frozen=True)
class Tuples:
    sides: Sides | None = None
    pair: tuple[int, Part] | None = None
    some: Annotated[tuple[Part, ...], Meta(max_length=9)] = ()


def test_convert_wrong_item_of_a_tuple_is_named() -> None:
    for value, message in (
        ({"sides": [1, "x"]}, "sides[1] is 'x', expected `float`"),
        ({"pair": [1, {"size": -1}]}, "pair[1].size is -1, expected `int` >= 0"),
        ({"some": [{"size": 1}, {"size": "x"}]}, "some[1].size is 'x', expected `int`"),
    ):
        with pytest.raises(FieldError) as caught:
            convert(value, Tuples)
        assert str(caught.value).startswith(message)


def test_convert_other_value_than_an_object_is_refused() -> None:
    with pytest.raises(FieldError, match="the file is 3, expected `object`"):
        convert(3, Whole)


def test_convert_unknown_fields_are_ignored_and_found_by_unknown_field() -> None:
    value = {"name": "x", "parts": [{"size": 1}, {"size": 2, "color": "red"}], "scores": {"a": None}}
    whole = convert(value, Whole)
    assert whole == Whole("x", (Part(1), Part(2)), {"a": None})
    assert unknown_field(value, whole) == "parts[1].color"
    assert unknown_field({**value, "mood": 1}, whole) == "mood"
    assert unknown_field(json.loads(json.dumps(asdict(whole))), whole) is None


@pytest.mark.parametrize("version", [1, 2])
def test_schema_older_and_current_versions_are_read(version: int) -> None:
    content = format_json({"schema": f"spmdeploy.sample/{version}", "name": "x", "parts": []})
    assert SCHEMA.convert(SCHEMA.parse(content, "file.json"), Whole, "file.json") == Whole("x", ())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "file.json: not valid JSON: "),
        (b"[]", "file.json: not a sample: its schema is None, not spmdeploy.sample/2"),
        (b'{"schema": "spmdeploy.sample/0"}', "its schema is 'spmdeploy.sample/0'"),
        (b'{"schema": "spmdeploy.other/1"}', "its schema is 'spmdeploy.other/1'"),
        (
            b'{"schema": "spmdeploy.sample/3"}',
            "spmdeploy.sample/3 is newer than spmdeploy.sample/2, which this version",
        ),
        (b'{"schema": "\\u001b[2J"}', r"its schema is '\x1b[2J'"),
    ],
)
def test_schema_other_files_are_refused_by_name(content: bytes, message: str) -> None:
    with pytest.raises(InputError) as caught:
        SCHEMA.parse(content, "file.json")
    assert message in caught.value.problem
    assert caught.value.hint

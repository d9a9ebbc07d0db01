"""Records: written and read back, wrong fields refused by path."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from spmdeploy.bench.results import Record, read_record, record_text
from spmdeploy.errors import InputError

from .conftest import FAST, empty_row, measured_row, record_of


def a_record() -> Record:
    unavailable = empty_row("tensorrt", "unavailable", "no NVIDIA driver")
    return record_of(measured_row(), measured_row("onnxruntime", FAST), unavailable)


def test_record_text_reads_back_equal(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(record_text(a_record()), encoding="utf-8")
    assert read_record(tmp_path / "r.json") == a_record()


def test_record_text_is_json_with_every_sample() -> None:
    value = json.loads(record_text(a_record()))
    assert value["schema"] == "spmdeploy.bench/1"
    assert value == json.loads(json.dumps(a_record().to_json()))
    assert value["rows"][0]["samples_ms"] == [[800.0, 810.0], [805.0], [790.0, 820.0]]


def test_record_text_samples_of_a_row_share_a_line() -> None:
    assert '   "samples_ms": [[800.0, 810.0], [805.0], [790.0, 820.0]]' in record_text(a_record()).splitlines()


def test_record_text_placeholder_in_text_stays(tmp_path: Path) -> None:
    record = record_of(measured_row(), measured_row(reason='"samples_ms": "0"'))
    (tmp_path / "r.json").write_text(record_text(record), encoding="utf-8")
    assert read_record(tmp_path / "r.json") == record


def test_from_json_unknown_fields_are_ignored() -> None:
    value = json.loads(record_text(a_record()))
    value["mood"] = value["rows"][0]["mood"] = "good"
    assert Record.from_json(value, "r.json") == a_record()


@pytest.mark.parametrize(
    ("path", "wrong", "text"),
    [
        ("spmdeploy", 1, r"r.json: spmdeploy is 1, expected `str`"),
        ("rows", {}, r"rows is \{\}, expected `array`"),
        ("rows/0/status", "fine", r"rows\[0\]\.status is 'fine', expected measured or"),
        ("rows/0/latency_ms/p50", "fast", r"rows\[0\]\.latency_ms\.p50 is 'fast', expected `float`"),
        ("rows/0/latency_ms/unstable", 0, r"unstable is 0, expected `bool`"),
        ("rows/1/notes", {"windows": []}, r"rows\[1\]\.notes\.windows is \[\]"),
        ("machine/cpu", ..., r"machine\.cpu is missing"),
        ("schema", "spmdeploy.bench/2", "newer than spmdeploy.bench/1"),
        ("schema", "spmdeploy.bundle/1", "not a benchmark record"),
        ("schema", ..., "not a benchmark record"),
    ],
)
def test_from_json_wrong_field_is_refused(path: str, wrong: Any, text: str) -> None:
    value: Any = json.loads(record_text(a_record()))
    *above, last = [int(part) if part.isdigit() else part for part in path.split("/")]
    place = value
    for part in above:
        place = place[part]
    if wrong is ...:
        del place[last]
    else:
        place[last] = wrong
    with pytest.raises(InputError, match=text):
        Record.from_json(value, "r.json")


@pytest.mark.parametrize("text", ["", "{", "[]", "NaN", '{"schema": "spmdeploy.bench/1"}', '{"p50": 1e999}'])
def test_read_record_invalid_file_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(InputError, match=r"r\.json"):
        read_record(tmp_path / "r.json")
    with pytest.raises(InputError, match="cannot be read"):
        read_record(tmp_path / "missing.json")


def test_result_case_ignores_backend() -> None:
    torch, other = measured_row(), measured_row("onnxruntime", FAST)
    assert torch.case == other.case and torch.identity != other.identity
    assert replace(other, batch=4).case != other.case


def test_from_json_without_later_field_is_read() -> None:
    value = json.loads(json.dumps(a_record().to_json()))
    for row in value["rows"]:
        if row["memory"]:
            del row["memory"]["loaded"]
    assert Record.from_json(value, "r.json") == a_record()


def test_from_json_scope_frame_of_earlier_versions_is_cached_layout() -> None:
    value = json.loads(json.dumps(a_record().to_json()))
    value["rows"][0]["scope"] = "frame"
    assert Record.from_json(value, "r.json").rows[0].scope == "cached-layout"


def test_read_record_committed_records_are_readable() -> None:
    paths = sorted((Path(__file__).parents[2] / "bench/results").glob("bench_*.json"))
    assert [read_record(path).rows for path in paths]

"""Engine records are read back as written, wrong fields are named, and records are compared with machines."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from datetime import date
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spmdeploy.engines.record import (
    BatchRange,
    EngineRecord,
    Gpu,
    SourceFile,
    Verification,
    incompatibilities,
    operating_system,
)
from spmdeploy.errors import BundleError
from spmdeploy.files import is_safe_relative_path
from tests.simulators.records import A10, HOST, SAMPLE, for_targets, sample

VERIFIED = Verification(True, date(2026, 11, 23), "NVIDIA GeForce RTX 3060", 3, 0.2, None)


@pytest.mark.parametrize("record", [SAMPLE, for_targets("sm86", "sm120"), sample(verification=VERIFIED)])
def test_from_bytes_written_record_is_equal(record: EngineRecord) -> None:
    assert EngineRecord.from_bytes(record.to_bytes(), "engine.json") == record
    assert json.loads(record.to_bytes())["schema"] == "spmdeploy.engine/1"


def changed(path: str, value: object) -> bytes:
    content: Any = sample(weights=SourceFile("graphs/w.data", "c" * 64), verification=VERIFIED).to_json()
    place = json.loads(json.dumps(content))
    whole = place
    *above, last = [int(part) if part.isdigit() else part for part in path.split("/")]
    for part in above:
        place = place[part]
    place[last] = value
    return json.dumps(whole).encode()


def paths(content: Any, above: str = "") -> Iterator[str]:
    for key, item in content.items() if isinstance(content, dict) else enumerate(content):
        yield f"{above}{key}"
        if isinstance(item, dict | list):
            yield from paths(item, f"{above}{key}/")


@pytest.mark.parametrize("field", list(paths(json.loads(changed("schema", "spmdeploy.engine/1")))))
def test_from_bytes_every_field_is_checked(field: str) -> None:
    with pytest.raises(BundleError, match=r"e\.json") as caught:
        EngineRecord.from_bytes(changed(field, [[]]), "e.json")
    assert caught.value.hint


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("schema", "spmdeploy.engine/2", "is newer than spmdeploy.engine/1"),
        ("schema", "spmdeploy.bundle/1", "not the record of an engine"),
        ("runtime", "onnxruntime", "runtime is 'onnxruntime', expected tensorrt or tensorrt-rtx"),
        ("engine/file", "../edit.engine", "engine.file is"),
        ("engine/file", "edit.so", "not .*engine"),
        ("onnx/file", "/etc/passwd", "onnx.file is"),
        ("gpu", None, "both a GPU and targets, or neither"),
        ("targets", ["sm86"], "both a GPU and targets, or neither"),
        ("batch/min", 0, "batch sizes are 0 to 8"),
        ("batch/opt", 9, "batch sizes are 1 to 8, best at 9"),
        ("inputs/0/shape/0", -2, r"inputs\[0\].shape\[0\] is -2"),
        ("strongly_typed", 1, "strongly_typed is 1, expected `bool`"),
    ],
)
def test_from_bytes_wrong_field_is_named_with_its_value(field: str, value: object, message: str) -> None:
    with pytest.raises(BundleError, match=message):
        EngineRecord.from_bytes(changed(field, value), "e.json")


def test_from_bytes_targets_without_rtx_are_refused() -> None:
    with pytest.raises(BundleError, match="TensorRT builds for the GPU of its machine"):
        EngineRecord.from_bytes(for_targets("sm86", runtime="tensorrt").to_bytes(), "e.json")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"schema": NaN}', b"[" * 100_000, b"\xff"])
def test_from_bytes_other_content_is_refused(content: bytes) -> None:
    with pytest.raises(BundleError, match=r"e\.json"):
        EngineRecord.from_bytes(content, "e.json")


def test_incompatibilities_on_the_same_machine_are_none() -> None:
    assert incompatibilities(SAMPLE, HOST) == ()
    assert incompatibilities(for_targets("sm86", "sm120"), HOST) == ()


def test_incompatibilities_name_both_values() -> None:
    elsewhere = replace(HOST, versions={"tensorrt": "10.3.0"}, gpu=A10, os="Windows", architecture="aarch64")
    assert incompatibilities(SAMPLE, elsewhere) == (
        "tensorrt: built with 10.16.1, here 10.3.0",
        "GPU: built on NVIDIA GeForce RTX 3060 (sm86), here NVIDIA A10 (sm86)",
        "operating system: built on Linux, here Windows",
        "architecture: built on x86_64, here aarch64",
    )
    assert incompatibilities(SAMPLE, replace(HOST, gpu=None)) == (
        "GPU: built on NVIDIA GeForce RTX 3060 (sm86), here none",
    )


def test_incompatibilities_of_targets_are_version_and_capability() -> None:
    record = for_targets("sm86", "sm120")
    for gpu in (A10, Gpu("NVIDIA GeForce RTX 5090", "12.0")):
        assert incompatibilities(record, replace(HOST, gpu=gpu, os="Windows")) == ()
    host = replace(HOST, gpu=Gpu("NVIDIA H100", "9.0"), versions={})
    assert incompatibilities(record, host) == (
        "tensorrt-rtx: built with 1.7.1.116, here not installed",
        "GPU: built for sm86, sm120, here NVIDIA H100 (sm90)",
    )
    assert incompatibilities(record, replace(HOST, gpu=None)) == ("GPU: built for sm86, sm120, here none",)


def test_operating_system_architectures_have_one_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for machine, name in (("AMD64", "x86_64"), ("x86_64", "x86_64"), ("arm64", "aarch64"), ("aarch64", "aarch64")):
        monkeypatch.setattr("platform.machine", lambda machine=machine: machine)
        assert operating_system()[1] == name


DISTINCT = [
    {},
    {"version": "10.16.2"},
    {"gpu": A10},
    {"gpu": Gpu(A10.name, "8.9")},
    {"precision": "fp32"},
    {"graph": "refine"},
    {"batch": BatchRange(1, 1, 4)},
    {"batch": BatchRange(1, 4, 8)},
    {"onnx": SourceFile("graphs/edit.fp16.onnx", "d" * 64)},
    {"weights": SourceFile("graphs/fp16.data", "d" * 64)},
    {"builder": replace(SAMPLE.builder, os="Windows")},
    {"builder": replace(SAMPLE.builder, architecture="aarch64")},
]


def test_key_differs_for_distinct_engines() -> None:
    records = [sample(**changes) for changes in DISTINCT] + [for_targets("sm86"), for_targets("sm86", "sm89")]
    assert len({record.key for record in records}) == len(records)
    assert SAMPLE.key.startswith("edit-fp16-b8-tensorrt-10.16.1-nvidia_geforce_rtx_3060-")


def test_key_ignores_measurements() -> None:
    measured = {"build_seconds": 99.0, "created": date(2027, 1, 1), "verification": VERIFIED, "timing_cache": True}
    assert sample(**measured).key == SAMPLE.key
    assert replace(SAMPLE, builder=replace(SAMPLE.builder, driver="1", cuda=None)).key == SAMPLE.key


@given(st.text(), st.text(), st.lists(st.text(), max_size=40))
def test_key_of_any_record_is_a_plain_name(name: str, version: str, targets: list[str]) -> None:
    for record in (sample(gpu=Gpu(name, "8.6"), version=version), for_targets(*targets, version=version)):
        assert is_safe_relative_path(record.key) and "/" not in record.key and not record.key.startswith(".")

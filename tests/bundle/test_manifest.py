"""Manifests are read back as written, and a wrong field is refused with its path and value."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from spmdeploy.bundle.manifest import Manifest
from spmdeploy.bundle.storage import MANIFEST, SUMS
from spmdeploy.errors import BundleError

from .conftest import (
    GRAPHS,
    graph_record,
    list_sums,
    manifest_of,
    refusal,
    rewrite_manifest,
)


def test_from_json_written_manifest_is_equal() -> None:
    manifest = manifest_of((graph_record("fp32", 5, "a" * 64),))
    text = json.dumps(manifest.to_json(), allow_nan=False)
    assert Manifest.from_json(json.loads(text), "m") == manifest
    assert json.loads(text)["schema"] == "spmdeploy.bundle/2"
    assert json.loads(text)["created"] == "2026-11-22"


def test_from_json_unknown_fields_are_ignored_and_training_is_optional() -> None:
    content = manifest_of(()).to_json()
    del content["training"]
    content["mood"] = content["generator"]["mood"] = "good"
    manifest = Manifest.from_json(content, "m")
    assert manifest.training is None
    assert manifest.to_json().keys() == content.keys() - {"mood"} | {"training"}


def test_from_json_without_ablations_has_defaults() -> None:
    ablation = dataclasses.replace(manifest_of(()).generator, modulation="spade", stages=1)
    content = manifest_of((), generator=ablation).to_json()
    assert Manifest.from_json(json.loads(json.dumps(content)), "m").generator == ablation
    del content["generator"]["modulation"], content["generator"]["stages"]
    generator = Manifest.from_json(content, "m").generator
    assert (generator.modulation, generator.stages) == ("spm", 3)


def _set(path: str, value: object) -> Callable[[dict[str, Any]], None]:
    def change(content: Any) -> None:
        *above, last = [int(part) if part.isdigit() else part for part in path.split("/")]
        for part in above:
            content = content[part]
        if value is ...:
            del content[last]
        else:
            content[last] = value

    return change


WRONG_FIELDS = [
    ("licence", ..., "licence is missing"),
    ("graphs/0/opset", ..., r"graphs\[0\]\.opset is missing"),
    ("licence", 5, "licence is 5, expected `str`"),
    ("name", "a/b", "name is 'a/b', not a plain name"),
    ("native_size", True, "native_size is True, expected `int`"),
    ("native_size", 256.0, r"native_size is 256\.0, expected `int`"),
    ("graphs/0/bytes", -1, r"graphs\[0\]\.bytes is -1, expected `int` >= 0"),
    ("graphs/0/precision", "int8", r"graphs\[0\]\.precision is 'int8', expected fp32 or fp16"),
    ("generator/modulation", "adain", r"generator\.modulation is 'adain', expected spm or spade"),
    ("generator/stages", 2, r"generator\.stages is 2, expected 3 or 1"),
    ("generator/stages", True, r"generator\.stages is True, expected 3 or 1"),
    ("graphs/0/precision", ["fp32"], r"graphs\[0\]\.precision is \['fp32'\], expected fp32 or fp16"),
    ("graphs/0/sha256", "A" * 64, r"graphs\[0\]\.sha256 is '"),
    ("graphs/0/file", "../../etc/passwd", r"graphs\[0\]\.file is '\.\./\.\./etc/passwd', not a relative path inside"),
    ("graphs/0/file", "/etc/passwd", r"graphs\[0\]\.file is"),
    ("graphs/0/fp16_share", "half", r"graphs\[0\]\.fp16_share is 'half', expected `float"),
    ("graphs/0/parity/max_grey", math.inf, r"parity\.max_grey is inf, expected `float"),
    ("graphs/0/parity/max_grey", math.nan, r"parity\.max_grey is nan, expected `float"),
    ("graphs/0/parity/max_grey", 10**400, r"parity\.max_grey is 1000.*\.\.\., number out of range"),
    ("graphs/0/fp32_operations", [], r"fp32_operations is \[\], expected `object`"),
    ("graphs", {}, r"graphs is \{\}, expected `array`"),
    ("graphs/0", "edit.onnx", r"graphs\[0\] is 'edit\.onnx', expected `object`"),
    ("golden/0/folder", "golden/..", r"golden\[0\]\.folder is"),
    ("generator/gflop", None, r"generator\.gflop is None, expected `float"),
    ("generator/classes", 3, "generator.classes is 3, but classes lists 2"),
    ("limits/fp8", {}, "a key of limits is 'fp8', expected fp32 or fp16"),
    ("limits/fp16/mean_grey", ..., r"limits\.fp16\.mean_grey is missing"),
    ("limits/fp16", ..., "limits has none for fp16"),
    ("created", "yesterday", "created is 'yesterday', invalid RFC3339 encoded date"),
    ("created", "2026-W47-7", "created is '2026-W47-7', invalid RFC3339"),
    ("channel_order", "rgb", "channel_order is 'rgb', expected RGB or BGR"),
    ("training", 3, "training is 3, expected `object"),
    ("classes", None, "classes is None, expected `object"),
    ("classes/classes/0/color", "red", "classes.*red"),
    ("source/sha256", "", r"source\.sha256 is ''"),
]


@pytest.mark.parametrize(("field", "value", "message"), WRONG_FIELDS)
def test_from_json_wrong_field_is_named_with_its_value(field: str, value: object, message: str) -> None:
    content = manifest_of(tuple(graph_record(key, 5, "a" * 64) for key in GRAPHS)).to_json()
    _set(field, value)(content)
    with pytest.raises(BundleError, match=message) as caught:
        Manifest.from_json(content, "street.spm/manifest.json")
    assert caught.value.problem.startswith("street.spm/manifest.json: ")


def _paths(content: Any, above: str = "") -> Iterator[str]:
    for key, item in content.items() if isinstance(content, dict) else enumerate(content):
        yield f"{above}{key}"
        if isinstance(item, dict | list):
            yield from _paths(item, f"{above}{key}/")


FULL = manifest_of(tuple(graph_record(key, 5, "a" * 64) for key in GRAPHS)).to_json()


@pytest.mark.parametrize("field", [path for path in _paths(FULL) if not path.startswith(("classes/", "training/"))])
def test_from_json_every_field_is_checked(field: str) -> None:
    content = copy.deepcopy(FULL)
    _set(field, [[]])(content)
    with pytest.raises(BundleError, match=re.escape("[]")):
        Manifest.from_json(content, "m")


@pytest.mark.parametrize(
    ("graphs", "golden", "message"),
    [(2, 1, "the graph edit fp32 is there twice"), (1, 2, "the golden edit tree is there twice")],
)
def test_from_json_repeated_graph_or_edit_is_refused(graphs: int, golden: int, message: str) -> None:
    manifest = manifest_of((graph_record("fp32", 5, "a" * 64),) * graphs)
    manifest = dataclasses.replace(manifest, golden=manifest.golden * golden)
    with pytest.raises(BundleError, match=message):
        Manifest.from_json(manifest.to_json(), "m")


@pytest.mark.parametrize("weights", ["shared.weights", "golden/tree/shared.weights", "graphs/deeper/shared.weights"])
def test_from_json_weights_in_another_folder_are_refused(weights: str) -> None:
    record = dataclasses.replace(graph_record("fp32", 5, "a" * 64), weights=weights)
    with pytest.raises(BundleError, match=rf"the weights {weights} are not in the folder of graphs/edit\.fp32\.onnx"):
        Manifest.from_json(manifest_of((record,)).to_json(), "m")
    beside = manifest_of((dataclasses.replace(record, weights="graphs/shared.weights"),))
    assert Manifest.from_json(beside.to_json(), "m") == beside


def test_open_bundle_newer_schema_is_named_before_hashes(street: Path) -> None:
    (street / MANIFEST).write_text('{"schema": "spmdeploy.bundle/3", "all": "different"}')
    (street / SUMS).unlink()
    assert "spmdeploy.bundle/3 is newer than spmdeploy.bundle/2, which this version reads" in refusal(street)
    assert "upgrade" in refusal(street)


@pytest.mark.parametrize("schema", [None, 1, "spmdeploy.bundle/", "spmdeploy.bundle/0", "spmdeploy.generator/1"])
def test_from_bytes_other_schema_is_refused(street: Path, schema: object) -> None:
    rewrite_manifest(street, lambda content: content.update(schema=schema))
    assert f"its schema is {schema!r}" in refusal(street)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"schema": "spmdeploy.bundle/1", "name": ', "not valid JSON"),
        (
            '{"schema": "spmdeploy.bundle/1", "schema": "spmdeploy.bundle/1"}',
            "the key 'schema' is there twice",
        ),
        ('{"schema": "spmdeploy.bundle/1", "gflop": NaN}', "NaN is not JSON"),
        ("[" * 100_000, "nested too deeply"),
        ("\udcff", "not valid JSON"),
        ("[]", "its schema is None"),
    ],
)
def test_from_bytes_other_json_is_refused(street: Path, text: str, message: str) -> None:
    (street / MANIFEST).write_bytes(text.encode("utf-8", "surrogateescape"))
    list_sums(street)
    assert message in refusal(street)

"""Bundles of schema 1, without `layout` and `picture` graphs, are read and edited with."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import spmdeploy
from spmdeploy.assets.samples import SAMPLE_EDITS
from spmdeploy.backends.verify import verify
from spmdeploy.bundle.bundle import open_bundle


@pytest.fixture(scope="module")
def schema_1(street_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle as version 0.1.0 wrote it: the manifest differs in its schema and lists no parts of graphs."""
    bundle = tmp_path_factory.mktemp("old") / "tiny.spm"
    shutil.copytree(street_bundle, bundle)
    manifest = json.loads((bundle / "manifest.json").read_text())
    parts = [one for one in manifest["graphs"] if one["graph"].startswith(("layout", "picture"))]
    manifest["graphs"] = [one for one in manifest["graphs"] if one not in parts]
    manifest["schema"] = "spmdeploy.bundle/1"
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    for part in parts:
        (bundle / part["file"]).unlink()
    names = [line.split("  ", 1)[1] for line in (bundle / "SHA256SUMS").read_text().splitlines()]
    (bundle / "SHA256SUMS").write_text(
        "".join(
            f"{hashlib.sha256((bundle / name).read_bytes()).hexdigest()}  {name}\n"
            for name in names
            if (bundle / name).exists()
        )
    )
    return bundle


def test_open_bundle_schema_1_is_whole_and_verifies(schema_1: Path) -> None:
    bundle = open_bundle(schema_1)
    assert bundle.check_all() == ()
    with spmdeploy.open_editor(schema_1, "onnxruntime", "cpu") as editor:
        assert all(result.passed for result in verify(editor.session, bundle))


def test_edit_schema_1_gives_the_bytes_of_schema_2(schema_1: Path, street_bundle: Path) -> None:
    results = []
    for path in (schema_1, street_bundle):
        with spmdeploy.open_editor(path, "onnxruntime", "cpu") as editor:
            photo, labels, mask = SAMPLE_EDITS[0].read(editor.classes)
            results.append(editor.edit(photo, labels, mask).image)
            results.append(editor.prepare(labels, mask).edit(photo).image)
    for other in results[1:]:
        np.testing.assert_array_equal(other, results[0])

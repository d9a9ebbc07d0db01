"""The built-in model: intact, small enough to ship, and with unchanged results."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

import spmdeploy
from spmdeploy.assets.samples import SAMPLE_EDITS
from spmdeploy.backends.onnxruntime import OnnxRuntimeSession
from spmdeploy.backends.verify import verify
from spmdeploy.bundle.bundle import open_bundle
from spmdeploy.editing.editor import Editor
from spmdeploy.imaging.files import read_photo
from spmdeploy.labels import class_table

# Hash of SHA256SUMS, which covers all files. A new model needs this hash and its image in `expected`.
BUNDLE_HASH = "1d14f54eb8d6792d2e670db66d3b95a34ab7014c0fd9aac8707a6d1900cb945e"
EXPECTED = Path(__file__).parents[1] / "expected"


def test_builtin_model_is_intact_and_small() -> None:
    bundle = open_bundle(spmdeploy.default_model())
    assert bundle.check_all() == ()
    assert hashlib.sha256((spmdeploy.default_model() / "SHA256SUMS").read_bytes()).hexdigest() == BUNDLE_HASH
    assert sum(bundle.files().values()) <= 45e6
    assert bundle.manifest.classes == class_table("street")
    assert "non-commercial" in bundle.manifest.licence
    assert "non-commercial" in bundle.read("card.md").decode()


def test_builtin_model_passes_its_golden_edits() -> None:
    with spmdeploy.open_editor() as editor:
        results = verify(editor.session, open_bundle(spmdeploy.default_model()))
    names = [sample.name for sample in SAMPLE_EDITS]
    assert [result.name for result in results] == [*names, *(f"{name} refined" for name in names)]
    assert all(result.passed for result in results), [result.problems for result in results]


def test_builtin_model_edit_equals_expected_image() -> None:
    sample = SAMPLE_EDITS[0]
    with spmdeploy.open_editor() as editor:
        photo, labels, mask = sample.read(editor.classes)
        edited = editor.edit(photo, labels, mask, match_surroundings=False).image
    expected = read_photo(EXPECTED / f"{sample.name}.png").pixels
    assert np.abs(edited.astype(int) - expected).max() <= 2
    assert (edited[~mask] == photo[~mask]).all()


def test_builtin_model_cascade_is_independent_of_batch_and_threads() -> None:
    sample, bundle = SAMPLE_EDITS[0], open_bundle(spmdeploy.default_model())
    photo, labels, mask = sample.read(bundle.manifest.classes)
    mask[120:, 60:] = True  # a window of 460 pixels
    coarse, finer = (bundle.path_of_graph(bundle.graph(name, "fp32")) for name in ("edit_cpu", "refine_cpu"))
    images = []
    for batch, threads in ((4, 1), (4, 1), (1, 1), (3, 2)):
        session = OnnxRuntimeSession(coarse, "fp32", threads=threads, refine=lambda: finer)
        with Editor(session, bundle.manifest.classes) as editor:
            result = editor.edit(photo, labels, mask, tiling="cascade", batch_size=batch, match_surroundings=False)
        assert result.report.tiles >= 4
        images.append(result.image.astype(int))
    first, again, *others = images
    np.testing.assert_array_equal(again, first)
    assert np.abs(first - photo)[mask].max() > 50
    assert all(np.abs(other - first).max() <= 1 for other in others)

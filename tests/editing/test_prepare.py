"""`Editor.prepare`: the results of `Editor.edit`, from sessions that get the layout once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import spmdeploy
from spmdeploy.backends.base import SupportsLayoutCache
from spmdeploy.backends.onnxruntime import OnnxRuntimeSession
from spmdeploy.backends.pytorch import TorchSession
from spmdeploy.backends.registry import open_backend
from spmdeploy.bench.workloads import edit_batch
from spmdeploy.bundle.bundle import GraphFiles, open_bundle
from spmdeploy.bundle.manifest import PARTS
from spmdeploy.editing.editor import Editor
from spmdeploy.errors import BundleError, InputError, UnavailableError, UsageError
from spmdeploy.model.generator import Generator, GeneratorConfig
from spmdeploy.types import LayoutInput, ModelInput
from tests.editing.test_editor import CLASSES, FakeSession, everything_mixed, labels_for, noise, partial_masks


class KeepingSession(FakeSession):
    """Keeps layouts, and counts how often it got one; edits in no other way."""

    def __init__(self, **more: Any) -> None:
        super().__init__(everything_mixed, **more)
        self.kept = 0

    def run(self, inputs: ModelInput) -> np.ndarray:
        raise AssertionError("the layout came with an image")

    def bind_layout(self, layout: LayoutInput) -> Callable[[np.ndarray], np.ndarray]:
        self.kept += 1
        return lambda image: self.run_unrounded(ModelInput(image, *layout)).astype(np.uint8)


@given(partial_masks(longest=400), st.sampled_from([64, 256]), st.booleans(), st.booleans(), st.integers(1, 5))
@settings(max_examples=15, deadline=None)
def test_prepared_edit_equals_edit(mask: np.ndarray, size: int, refines: bool, match: bool, batch_size: int) -> None:
    labels, options = labels_for(mask), {"match_surroundings": match, "batch_size": batch_size}
    instances = labels.astype(np.int64) * 3 if size == 64 else None
    editor = Editor(FakeSession(everything_mixed, size, refines), CLASSES)
    keeping = KeepingSession(size=size, refines=refines)
    plans = [one.prepare(labels, mask, instances, **options) for one in (editor, Editor(keeping, CLASSES))]
    layouts = keeping.kept
    for seed in range(2):
        image = noise(*mask.shape, seed=seed)
        expected = editor.edit(image, labels, mask, instances, **options)
        for plan in plans:
            prepared = plan.edit(image)
            np.testing.assert_array_equal(prepared.image, expected.image)
            found, wanted = prepared.report, expected.report
            assert [it.plan.letterbox for it in found.windows] == [it.plan.letterbox for it in wanted.windows]
            assert (found.tiling, found.tiles, found.batches) == (wanted.tiling, wanted.tiles, wanted.batches)
    assert keeping.kept == layouts


def test_prepare_each_batch_is_bound_once() -> None:
    mask = np.zeros((300, 2000), bool)
    mask[100:120, [100, 600, 1100, 1600, 1900]] = True
    session = KeepingSession()
    plan = Editor(session, CLASSES).prepare(labels_for(mask), mask, batch_size=2)
    windows = len(plan.edit(noise(*mask.shape)).report.windows)
    assert windows > 2 and session.kept == -(-windows // 2) == len(session.calls)


def test_prepare_later_changes_of_arrays_have_no_effect() -> None:
    mask = np.zeros((300, 400), bool)
    mask[50:90, 60:200] = True
    labels, image = labels_for(mask), noise(300, 400)
    editor = Editor(FakeSession(everything_mixed), CLASSES)
    expected = editor.edit(image, labels, mask, labels.astype(np.int32)).image
    given = labels.copy(), mask.copy(), labels.astype(np.int32)
    plan = editor.prepare(*given)
    for array in given:
        array[:] = 0
    untouched = image.copy()
    np.testing.assert_array_equal(plan.edit(image).image, expected)
    np.testing.assert_array_equal(image, untouched)


def test_prepared_edit_reports_progress_per_image() -> None:
    mask = np.zeros((300, 400), bool)
    mask[50:90, 60:200] = True
    plan = Editor(FakeSession(everything_mixed), CLASSES).prepare(labels_for(mask), mask)
    for _ in range(2):
        steps: list[tuple[int, int]] = []
        plan.edit(noise(300, 400), progress=lambda *step, steps=steps: steps.append(step))
        assert steps == [(0, 1), (1, 1)]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"labels": np.zeros((9, 8), np.uint8)}, InputError, "mask: 400×300, but labels: 8×9"),
        ({"mask": np.zeros((300, 400), bool)}, InputError, "mask"),
        ({"labels": np.full((300, 400), 77, np.uint8)}, InputError, "77"),
        ({"instances": np.zeros((2, 2), np.int32)}, InputError, "instances: 2×2, but labels: 400×300"),
        ({"tiling": "off"}, InputError, "400×300"),
        ({"tiling": "cascade"}, BundleError, "refine"),
        ({"batch_size": 0}, UsageError, "batch size 0"),
    ],
)
def test_prepare_bad_layout_is_refused(change: dict[str, Any], error: type[Exception], message: str) -> None:
    mask = np.zeros((300, 400), bool)
    mask[50:90, 60:200] = True
    with pytest.raises(error, match=message):
        Editor(FakeSession(everything_mixed), CLASSES).prepare(**({"labels": labels_for(mask), "mask": mask} | change))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (noise(400, 300), "image: 300×400, but labels: 400×300"),
        (noise(300, 400)[..., 0], "expected .height, width, 3."),
        (noise(300, 400).astype(np.float32), "float32"),
        ("photo.png", "expected a numpy array"),
    ],
)
def test_prepared_edit_bad_image_is_refused(image: Any, message: str) -> None:
    mask = np.zeros((300, 400), bool)
    mask[50:90, 60:200] = True
    plan = Editor(FakeSession(everything_mixed), CLASSES).prepare(labels_for(mask), mask)
    with pytest.raises(InputError, match=message):
        plan.edit(image)


@pytest.fixture(scope="module")
def real(street_bundle: Path) -> dict[str, OnnxRuntimeSession]:
    """Both FP32 graphs of a real bundle, each with its two parts."""
    bundle = open_bundle(street_bundle)

    def files(name: str) -> GraphFiles:
        return bundle.read_graph(bundle.graph(name, "fp32"))

    def session(name: str) -> OnnxRuntimeSession:
        layout, picture = PARTS[name]
        parts = lambda: (files(layout), files(picture))  # noqa: E731
        return OnnxRuntimeSession(files(name), "fp32", threads=1, cached_layout=parts)

    return {name: session(name) for name in PARTS}


@pytest.mark.parametrize("graph", ["edit", "edit_cpu"])
@pytest.mark.parametrize("batch", [1, 3])
def test_prepared_edit_onnxruntime_equals_edit(real: dict[str, OnnxRuntimeSession], graph: str, batch: int) -> None:
    session = real[graph]
    given = edit_batch(spmdeploy.open_editor().classes, 256, "medium", batch)
    run = session.bind_layout(LayoutInput(*given[1:]))
    for image in (given.image, given.image[:, ::-1].copy()):
        expected = session.run(ModelInput(image, *given[1:]))
        assert not np.array_equal(expected, image)
        np.testing.assert_array_equal(run(image), expected)


def test_prepare_two_layouts_are_independent(real: dict[str, OnnxRuntimeSession]) -> None:
    session, table = real["edit_cpu"], spmdeploy.open_editor().classes
    cases = [edit_batch(table, 256, mask, 1) for mask in ("small", "large")]
    runs = [session.bind_layout(LayoutInput(*case[1:])) for case in cases]
    for case, run in zip(cases, runs, strict=True):
        np.testing.assert_array_equal(run(case.image), session.run(case))


def test_bind_layout_on_a_device_gives_what_run_gives(
    real: dict[str, OnnxRuntimeSession], monkeypatch: pytest.MonkeyPatch
) -> None:
    session = real["edit"]
    given = edit_batch(spmdeploy.open_editor().classes, 256, "medium", 2)
    layout = LayoutInput(*given[1:])
    session.bind_layout(layout)
    parts = session._parts
    assert parts is not None
    expected = [session.run(ModelInput(image, *layout)) for image in (given.image, given.image[::-1])]
    for graph in (parts._layout, parts._picture):
        monkeypatch.setattr(graph, "run", lambda *_: pytest.fail("cached tensors were copied to the host"))
    device: list[tuple[str, int]] = []
    on_this_device = parts._bind_on

    def on_the_cpu(kind: str, ordinal: int, arrays: dict[str, np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
        device.append((kind, ordinal))
        return on_this_device("cpu", 0, arrays)

    monkeypatch.setattr(parts, "_device", "cuda:1")
    monkeypatch.setattr(parts, "_bind_on", on_the_cpu)
    run = parts.bind(layout)
    assert device == [("cuda", 1)]
    for image, edited in zip((given.image, given.image[::-1]), expected, strict=True):
        np.testing.assert_array_equal(run(image), edited)
    with pytest.raises(UnavailableError, match="ONNX Runtime cannot use cuda:1"):
        run(given.image[..., 0])


def test_prepare_editor_of_a_bundle_caches_layouts(street_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = open_bundle(street_bundle)
    session = open_backend(bundle, "onnxruntime", "cpu").session
    assert isinstance(session, SupportsLayoutCache)
    given = edit_batch(bundle.manifest.classes, 256, "small", 1)
    editor = Editor(session, bundle.manifest.classes)
    expected = editor.edit(given.image[0], given.labels[0], given.mask[0]).image
    plan = editor.prepare(given.labels[0], given.mask[0])
    monkeypatch.setattr(session, "run", lambda *_: pytest.fail("the whole graph ran"))
    np.testing.assert_array_equal(plan.edit(given.image[0]).image, expected)


@pytest.mark.parametrize("options", [{}, {"modulation": "spade"}, {"stages": 1}])
def test_prepared_edit_torch_equals_edit(options: dict[str, Any]) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        generator = Generator(GeneratorConfig(12, 2, 4, **options)).eval().requires_grad_(False)
    session = TorchSession(generator)
    given = edit_batch(spmdeploy.open_editor().classes, 256, "medium", 2)
    expected = session.run(given)
    run = session.bind_layout(LayoutInput(*given[1:]))
    convolutions: list[str] = []
    for name, module in generator.named_modules():
        module.register_forward_hook(lambda *_, name=name: convolutions.append(name))
    np.testing.assert_array_equal(run(given.image), expected)
    assert not any("layout_" in name for name in convolutions)
    np.testing.assert_array_equal(session.run(given), expected)  # the generator itself is as it was

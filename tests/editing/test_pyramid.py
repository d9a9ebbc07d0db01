"""Coarse-to-fine refinement: every pixel ends where it belongs, whatever the session paints."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spmdeploy.backends.base import Unsupported
from spmdeploy.editing.editor import Editor, EditResult
from spmdeploy.editing.preprocess import EditRegion
from spmdeploy.editing.pyramid import coarse_canvas, refine_on_host
from spmdeploy.editing.report import PhaseTimer, report_notes
from spmdeploy.errors import BundleError
from spmdeploy.labels import ClassTable, LabelClass
from spmdeploy.tiling.letterbox import fit_letterbox
from spmdeploy.tiling.pyramid import plan_pyramid
from spmdeploy.tiling.windows import Window, full_window, plan_windows
from spmdeploy.types import ModelInput

quick = settings(max_examples=25, deadline=None)
CLASSES = ClassTable("four", tuple(LabelClass(i, f"class {i}", (i, i, i)) for i in range(4)), 255)


class Session:
    """Paints each masked pixel in the color of its instance; without colors, what `coarse` shows of it, enlarged."""

    backend, device, provider, notes = "fake", "cpu", "none", ()
    precision: Literal["fp32", "fp16"] = "fp32"

    def __init__(self, size: int, colors: np.ndarray | None = None, refines: bool = True) -> None:
        """colors: uint8 (instances, 3)."""
        self.size, self.colors, self.refines = size, colors, refines
        self.refine_unsupported = None if refines else Unsupported("the model has no refine graph", "export it again")
        self.batches: list[int] = []

    def run(self, inputs: ModelInput) -> np.ndarray:
        return self.run_unrounded(inputs).astype(np.uint8)

    def run_unrounded(self, inputs: ModelInput) -> np.ndarray:
        image, _, instances, mask = inputs
        colors = np.zeros((1, 3), np.uint8) if self.colors is None else self.colors
        return np.where(mask[..., None] != 0, colors[instances % len(colors)], image).astype(np.float32)

    def refine(self, inputs: ModelInput, coarse: np.ndarray) -> np.ndarray:
        image, mask = inputs.image, inputs.mask
        assert self.refines
        assert coarse.shape == (len(image), self.size // 2, self.size // 2, 3) and coarse.dtype == np.float32
        self.batches.append(len(image))
        if self.colors is not None:
            return self.run_unrounded(inputs)
        return np.where(mask[..., None] != 0, doubled(coarse), image).astype(np.float32)

    def close(self) -> None:
        pass


def doubled(coarse: np.ndarray) -> np.ndarray:
    """(B, h, w, 3) to twice the size, bilinear as the network does it."""
    for axis in (1, 2):
        padded = np.concatenate([coarse.take([0], axis), coarse, coarse.take([-1], axis)], axis=axis)
        before, after = (
            padded.take(range(padded.shape[axis] - 1), axis),
            padded.take(range(1, padded.shape[axis]), axis),
        )
        pairs = np.stack([0.75 * before + 0.25 * after, 0.25 * before + 0.75 * after], axis=axis + 1)
        shape = (*coarse.shape[:axis], 2 * (coarse.shape[axis] + 1), *coarse.shape[axis + 1 :])
        coarse = pairs.reshape(shape).take(range(1, shape[axis] - 1), axis)
    return coarse


def edit(session: Session, image: np.ndarray, mask: np.ndarray, **more: Any) -> EditResult:
    numbers = np.arange(mask.size, dtype=np.int32).reshape(mask.shape)
    more = {"tiling": "cascade", "feather": 0} | more
    return Editor(session, CLASSES).edit(image, np.zeros(mask.shape, np.uint8), mask, numbers, **more)


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height * width).integers(0, 256, (height, width, 3), np.uint8)


@st.composite
def masks_in_photos(draw: st.DrawFn) -> tuple[np.ndarray, int]:
    """A mask with a few rectangles, neither empty nor full, and the size of a model that needs levels for it."""
    height, width = draw(st.integers(2, 400)), draw(st.integers(2, 400))
    mask = np.zeros((height, width), bool)
    for _ in range(draw(st.integers(1, 3))):
        top, left = draw(st.integers(0, height - 1)), draw(st.integers(0, width - 1))
        mask[top : top + draw(st.integers(1, 250)), left : left + draw(st.integers(1, 250))] = True
    if draw(st.booleans()):
        mask = ~mask
    mask.flat[0], mask.flat[-1] = True, False
    return mask, draw(st.sampled_from([32, 48, 64]))


@quick
@given(masks_in_photos(), st.integers(1, 7))
def test_edit_cascade_perfect_session_returns_the_photo(case: tuple[np.ndarray, int], batch: int) -> None:
    """Bit for bit: every tile reads its own pixels and is pasted where they belong, and the weights sum to one."""
    mask, size = case
    image = noise(*mask.shape)
    result = edit(Session(size, image.reshape(-1, 3)), image, mask, batch_size=batch)
    np.testing.assert_array_equal(result.image, image)


@quick
@given(masks_in_photos())
def test_edit_cascade_keeps_known_pixels(case: tuple[np.ndarray, int]) -> None:
    mask, size = case
    image = noise(*mask.shape)
    result = edit(Session(size, np.zeros((1, 3), np.uint8)), image, mask)
    np.testing.assert_array_equal(result.image, np.where(mask[..., None], 0, image))


@settings(max_examples=10, deadline=None)
@given(st.integers(200, 600), st.integers(33, 600), st.integers(0, 2**32 - 1))
def test_refine_on_host_levels_are_aligned(height: int, width: int, seed: int) -> None:
    """A slope stays the same slope through all doublings, whatever the size of the window."""
    size, rng = 64, np.random.default_rng(seed)
    slope = rng.uniform(-1, 1, 2) * 200 / (height + width)

    def value(y: np.ndarray, x: np.ndarray) -> np.ndarray:
        plane = 128 + slope[0] * (y - height / 2) + slope[1] * (x - width / 2)
        return np.repeat(plane[..., None], 3, axis=2).astype(np.float32)

    window = full_window(height, width)
    mask = np.ones((height, width), bool)
    mask[0, 0] = False
    levels, frame = plan_pyramid(window, mask, size), fit_letterbox(window, size)
    y, x = np.mgrid[:size, :size] + 0.5
    edited = value(y * height / frame.height, x * width / frame.width)
    scene = EditRegion(np.zeros((height, width, 3), np.uint8), np.zeros_like(mask, np.uint8), mask, None)
    base = coarse_canvas(frame, edited, levels[0])
    canvas, _ = refine_on_host(Session(size), levels, base, scene, 4, PhaseTimer())
    y, x = np.mgrid[:height, :width] + 0.5
    rim = 4 * 2 ** len(levels)  # at the window's end there is nothing to continue the slope from
    inner = np.s_[rim:-rim, rim:-rim]
    assert canvas.shape == (height, width, 3)
    np.testing.assert_allclose(canvas[inner], value(y, x)[inner], atol=0.1)


def test_refine_on_host_levels_are_not_rounded() -> None:
    """A slope of a tenth of a gray level a pixel has no steps wider than a gray level's own."""
    mask = np.ones((1000, 1000), bool)
    mask[0, 0] = False
    window = full_window(1000, 1000)
    levels, frame = plan_pyramid(window, mask), fit_letterbox(window)
    edited = np.linspace(100, 120, 256, dtype=np.float32)[None, :, None].repeat(256, axis=0).repeat(3, axis=2)
    scene = EditRegion(np.zeros((1000, 1000, 3), np.uint8), np.zeros_like(mask, np.uint8), mask, None)
    canvas, _ = refine_on_host(Session(256), levels, coarse_canvas(frame, edited, levels[0]), scene, 4, PhaseTimer())
    steps = np.diff(canvas[500, 32:-32, 0])
    assert steps.min() > 0 and steps.max() < 2 * steps.min()


def test_edit_cascade_tiles_get_photo_and_labels_at_their_scale() -> None:
    class Watching(Session):
        def refine(self, inputs: ModelInput, coarse: np.ndarray) -> np.ndarray:
            self.seen = [array[0] for array in (*inputs, coarse)]
            return super().refine(inputs, coarse)

    image = noise(300, 300)
    mask = np.zeros((300, 300), bool)
    mask[100:200, 100:160] = True
    session = Watching(64, image.reshape(-1, 3))
    result = edit(session, image, mask, batch_size=1)
    (entry,) = result.report.windows
    last = entry.plan.levels[-1]
    top, left = last.window.top + last.tiles[-1].top, last.window.left + last.tiles[-1].left
    place = np.s_[top : top + 64, left : left + 64]
    seen_image, _, seen_instances, seen_mask, _ = session.seen
    np.testing.assert_array_equal(seen_mask != 0, mask[place])
    np.testing.assert_array_equal(seen_image[~mask[place]], image[place][~mask[place]])
    np.testing.assert_array_equal(seen_instances, np.arange(90_000).reshape(300, 300)[place])


def test_edit_cascade_batches_hold_tiles_of_one_level() -> None:
    mask = np.zeros((400, 400), bool)
    mask[50:350, 50:350] = True
    session = Session(64)
    reported: list[tuple[int, int]] = []
    report = edit(session, noise(400, 400), mask, batch_size=4, progress=lambda *at: reported.append(at)).report
    (entry,) = report.windows
    counts = [len(level.tiles) for level in entry.plan.levels]
    assert session.batches == [size for count in counts for size in [4] * (count // 4) + [count % 4] * (count % 4 > 0)]
    assert report.tiles == sum(counts) and report.batches == 1 + len(session.batches)
    total = 1 + sum(counts)
    assert reported[0] == (0, total) and reported[-1] == (total, total)
    assert all(0 < after - before <= 4 for (before, _), (after, _) in pairwise(reported))


def test_edit_cascade_batch_size_does_not_change_the_result() -> None:
    mask = np.zeros((500, 700), bool)
    mask[80:420, 90:640] = True
    image = noise(500, 700)
    first = edit(Session(64), image, mask, batch_size=1).image
    for batch in (1, 3, 100):
        np.testing.assert_array_equal(edit(Session(64), image, mask, batch_size=batch).image, first)


def test_edit_cascade_onnxruntime_batches_and_threads_differ_by_one_level_at_most() -> None:
    torch = pytest.importorskip("torch")

    from spmdeploy.backends.pytorch import TorchSession
    from spmdeploy.model.generator import Generator, GeneratorConfig

    with torch.random.fork_rng():
        torch.manual_seed(1)
        session = TorchSession(Generator(GeneratorConfig(len(CLASSES), width=2, hidden=4)))
    mask = np.zeros((260, 500), bool)
    mask[60:200, 70:440] = True
    image, labels = noise(260, 500), np.random.default_rng(3).integers(0, 4, (260, 500), np.uint8)
    threads = torch.get_num_threads()
    results = []
    try:
        for batch, used in ((2, 1), (2, 1), (1, 1), (2, 2)):
            torch.set_num_threads(used)
            result = Editor(session, CLASSES).edit(image, labels, mask, tiling="cascade", batch_size=batch)
            assert result.report.tiles == 2
            results.append(result.image.astype(int))
    finally:
        torch.set_num_threads(threads)
    first, again, *others = results
    np.testing.assert_array_equal(again, first)
    assert np.abs(np.diff(first[mask], axis=0)).max() > 3, "a flat image would agree whatever happens"
    assert all(np.abs(other - first).max() <= 1 for other in others)


def two_masks() -> np.ndarray:
    """One whose window is 256 pixels, one whose window is 600."""
    mask = np.zeros((1000, 2000), bool)
    mask[100, 100] = True
    mask[300:700, 1000:1400] = True
    return mask


def test_edit_tiling_auto_cascades_windows_beyond_the_limit() -> None:
    report = edit(Session(256), noise(1000, 2000), two_masks(), tiling="auto").report
    assert (report.tiling, report.tiling_reason) == ("cascade", "1 of 2 windows larger than 384 pixels")
    assert [(len(entry.plan.levels), entry.scale) for entry in report.windows] == [(0, 1.0), (1, 1.0)]
    assert report.notes == ()


@pytest.mark.parametrize(("side", "mode"), [(256, "crop"), (257, "cascade")])
def test_edit_tiling_auto_limit_is_384_pixels(side: int, mode: str) -> None:
    mask = np.zeros((900, 900), bool)
    mask[300 : 300 + side, 400] = True
    (site,) = plan_windows(mask)
    assert (site.window.height <= 384) == (mode == "crop")
    assert edit(Session(256), noise(900, 900), mask, tiling="auto").report.tiling == mode


def test_edit_tiling_cascade_refines_every_window_larger_than_the_model() -> None:
    mask = np.zeros((300, 300), bool)
    mask[20:200, 20:200] = True
    report = edit(Session(256), noise(300, 300), mask).report
    assert (report.tiling, report.tiling_reason, report.tiles > 0) == ("cascade", "asked for", True)


def test_edit_tiling_auto_without_refine_crops_with_a_note() -> None:
    report = edit(Session(256, refines=False), noise(1000, 2000), two_masks(), tiling="auto").report
    assert report.tiling == "crop"
    assert report.tiling_reason == "1 of 2 windows larger than 384 pixels, but the model has no refine graph"
    assert report.notes == (
        "1 of 2 windows larger than 384 pixels are not refined at full resolution: the model has no refine graph; "
        "export it again",
        "window 2 of 2 is 600×600 pixels and is edited at 256×256: detail is lost",
    )
    small = np.zeros((300, 300), bool)
    small[:200, :200] = True
    assert edit(Session(256, refines=False), noise(300, 300), small, tiling="auto").report.notes == ()
    cropped = edit(Session(256, refines=False), noise(1000, 2000), two_masks(), tiling="crop").report
    assert len(cropped.notes) == 1  # it was asked for


def test_edit_tiling_cascade_without_refine_is_refused() -> None:
    with pytest.raises(BundleError, match="no refine graph") as caught:
        edit(Session(256, refines=False), noise(1000, 2000), two_masks())
    assert str(caught.value.hint).startswith("export it again; or use")


def test_edit_tiling_crop_never_refines() -> None:
    session = Session(256)
    assert edit(session, noise(1000, 2000), two_masks(), tiling="crop").report.tiling == "crop"
    assert not session.batches


def test_edit_cascade_report_has_every_level() -> None:
    mask = np.zeros((400, 400), bool)
    mask[80:360, 40:320] = True
    report = edit(Session(64), noise(400, 400), mask).report
    fields = json.loads(json.dumps(report.to_json()))
    (window,) = fields["windows"]
    assert window["cascade"] and window["scale"] == 1
    assert [(level["height"], level["width"]) for level in window["levels"]] == [(100, 100), (200, 200), (400, 400)]
    assert fields["tiles"] == sum(level["tiles"] for level in window["levels"])
    assert all({"seam_score", "tile_mismatch"} <= set(level) for level in window["levels"])


def test_edit_cascade_differing_tiles_have_a_mismatch() -> None:
    class Flickering(Session):
        """Every tile ten gray levels brighter than the one before; the first at 0."""

        calls = 0

        def refine(self, inputs: ModelInput, coarse: np.ndarray) -> np.ndarray:
            image, mask = inputs.image, inputs.mask
            gray = 10.0 * (self.calls + np.arange(len(image)))
            self.calls += len(image)
            return np.where(mask[..., None] != 0, gray[:, None, None, None], image).astype(np.float32)

    mask = np.zeros((200, 110), bool)
    mask[5:100, 5:105] = True
    black = np.zeros((1, 3), np.uint8)
    (agreeing,) = edit(Session(64, black), noise(200, 110), mask).report.windows
    (differing,) = edit(Flickering(64, black), noise(200, 110), mask).report.windows
    assert [level.tile_mismatch for level in agreeing.levels] == [0, 0]
    assert all((level.tile_mismatch or 0) >= 10 for level in differing.levels)


def test_report_notes_seams_and_mismatch_are_noted() -> None:
    mask = np.zeros((400, 400), bool)
    mask[80:360, 40:320] = True
    (plain,) = edit(Session(64), noise(400, 400), mask).report.windows

    def notes(seam_score: float, tile_mismatch: float) -> tuple[str, ...]:
        last = replace(plain.levels[-1], seam_score=seam_score, tile_mismatch=tile_mismatch)
        return report_notes([replace(plain, levels=(*plain.levels[:-1], last))])

    assert report_notes([plain]) == () == notes(2.0, 12.0)
    assert notes(2.14, 3) == ("window 1 of 1: steps at the borders of tiles exceed others by 2.1 gray levels",)
    (note,) = notes(0.1, 15.6)
    assert note.startswith("window 1 of 1: its tiles differed by 16 gray levels")


def test_edit_cascade_level_of_a_smooth_photo_is_upsampled() -> None:
    mask = np.zeros((400, 400), bool)
    mask[80:360, 40:320] = True
    fine = noise(400, 400)
    blurred = fine[::4, ::4].repeat(4, 0).repeat(4, 1)
    for _ in range(6):
        blurred = (blurred + np.roll(blurred, 1, 0) // 2 + np.roll(blurred, -1, 0) // 2) // 2
        blurred = (blurred + np.roll(blurred, 1, 1) // 2 + np.roll(blurred, -1, 1) // 2) // 2
    sharp, smooth = Session(64), Session(64)
    (all_refined,) = edit(sharp, fine, mask).report.windows
    result = edit(smooth, blurred, mask)
    (window,) = result.report.windows
    assert [level.refined for level in all_refined.levels] == [True, True, True]
    assert [level.refined for level in window.levels] == [True, True, False]
    assert sum(smooth.batches) == sum(level.tiles for level in window.levels[:2])
    assert result.report.notes == (
        "window 1 of 1: 1 of its 3 levels is only upsampled: the photo is smooth at that size",
    )
    assert np.array_equal(result.image[~mask], blurred[~mask])


def test_edit_cascade_windows_are_independent() -> None:
    mask = np.zeros((700, 1800), bool)
    mask[200:500, 200:500] = mask[200:500, 1300:1600] = True
    image = noise(700, 1800)
    result = edit(Session(256, image.reshape(-1, 3)), image, mask)
    assert [entry.window for entry in result.report.windows] == [
        Window(125, 125, 450, 450),
        Window(125, 1225, 450, 450),
    ]
    np.testing.assert_array_equal(result.image, image)

"""What the editor promises whatever the session does. The sessions here are fakes that make every leak visible."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spmdeploy.backends.base import Unsupported
from spmdeploy.editing.editor import Editor, EditResult, InputNames
from spmdeploy.errors import InputError, UsageError
from spmdeploy.labels import ClassTable, LabelClass
from spmdeploy.tiling.windows import Window
from spmdeploy.types import ModelInput

quick = settings(max_examples=40, deadline=None)
CLASSES = ClassTable("four", tuple(LabelClass(i, f"class {i}", (i, i, i)) for i in range(4)), 255)


class FakeSession:
    """Checks the graph contract of what it is given and remembers it; paints under the mask what `paint` says."""

    backend, device, provider, notes = "fake", "cpu", "none", ()
    precision: Literal["fp32", "fp16"] = "fp32"

    def __init__(self, paint: Callable[..., np.ndarray], size: int = 256, refines: bool = False) -> None:
        self.paint = paint
        self.size = size
        self.refines = refines
        self.refine_unsupported = None if refines else Unsupported("the model has no refine graph", "export it again")
        self.calls: list[tuple[np.ndarray, ...]] = []
        self.closed = False

    def run(self, inputs: ModelInput) -> np.ndarray:
        return self.run_unrounded(inputs).astype(np.uint8)

    def run_unrounded(self, inputs: ModelInput, *coarse: np.ndarray) -> np.ndarray:
        image, labels, instances, mask = inputs
        square = (len(image), self.size, self.size)
        assert image.shape == (*square, 3) and labels.shape == instances.shape == mask.shape == square
        assert [str(array.dtype) for array in (image, labels, instances, mask)] == ["uint8", "uint8", "int32", "uint8"]
        assert mask.max() <= 1
        self.calls.append((image, labels, instances, mask, *coarse))
        painted = self.paint(image, labels, instances, mask)
        return np.where(mask[..., None] != 0, painted, image).astype(np.float32)

    def refine(self, inputs: ModelInput, coarse: np.ndarray) -> np.ndarray:
        assert self.refines
        assert coarse.shape == (len(inputs.image), self.size // 2, self.size // 2, 3) and coarse.dtype == np.float32
        return self.run_unrounded(inputs, coarse)

    def close(self) -> None:
        self.closed = True


def identity(image: np.ndarray, *_: np.ndarray) -> np.ndarray:
    return image


def black(image: np.ndarray, *_: np.ndarray) -> np.ndarray:
    return np.zeros_like(image)


def batch_index(image: np.ndarray, *_: np.ndarray) -> np.ndarray:
    return np.broadcast_to(np.arange(len(image), dtype=np.uint8)[:, None, None, None], image.shape)


def everything_mixed(image: np.ndarray, labels: np.ndarray, instances: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """A value per window that changes with any pixel of the image (hidden ones too), the layout or the mask."""
    weights = np.arange(1, mask[0].size + 1, dtype=np.int64).reshape(mask[0].shape) % 251 + 1
    edges = np.zeros(mask.shape, np.int64)
    edges[:, 1:] |= instances[:, 1:] != instances[:, :-1]
    edges[:, :, 1:] |= instances[:, :, 1:] != instances[:, :, :-1]
    layout = (labels.astype(np.int64) * 7 + 3 * edges + 1) * mask
    mixed = ((image.sum(axis=3, dtype=np.int64) * 5 + layout) * weights).sum(axis=(1, 2)) % 249 + 1
    return np.broadcast_to(mixed[:, None, None, None], image.shape)


def layout(image: np.ndarray, labels: np.ndarray, *_: np.ndarray) -> np.ndarray:
    return np.repeat(labels[..., None], 3, axis=3)


def edit(
    image: Any,
    labels: Any,
    mask: Any,
    paint: Callable[..., np.ndarray] = identity,
    size: int = 256,
    refines: bool = False,
    **more: Any,
) -> EditResult:
    return Editor(FakeSession(paint, size, refines), CLASSES).edit(image, labels, mask, **more)


def noise(height: int, width: int, *, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def labels_for(mask: np.ndarray, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 4, mask.shape, np.uint8)


@st.composite
def partial_masks(draw: st.DrawFn, longest: int = 700) -> np.ndarray:
    """Neither empty nor full; rectangles, borders, specks, and the inverse of all that."""
    height, width = draw(st.integers(1, longest)), draw(st.integers(2, longest))
    mask = np.zeros((height, width), bool)
    for _ in range(draw(st.integers(1, 4))):
        top, left = draw(st.integers(0, height - 1)), draw(st.integers(0, width - 1))
        mask[top : top + draw(st.integers(1, 400)), left : left + draw(st.integers(1, 400))] = True
    if draw(st.booleans()):
        mask |= np.random.default_rng(draw(st.integers(0, 99))).random(mask.shape) < 0.001
    if draw(st.integers(0, 3)) == 0:
        mask = ~mask
    keep, change = draw(st.integers(0, mask.size - 2)), draw(st.integers(0, 10**9)) % mask.size
    mask.flat[keep] = False
    mask.flat[change if change != keep else keep + 1] = True
    return mask


def check_promises(mask: np.ndarray, size: int, feather: int, refines: bool = False) -> None:
    """Known pixels come back; neither hidden pixels nor labels beyond the mask's rim reach the result."""
    image, labels = noise(*mask.shape), labels_for(mask)
    untouched = image.copy()
    result = edit(image, labels, mask, everything_mixed, size, refines, feather=feather).image
    np.testing.assert_array_equal(image, untouched)
    assert result.dtype == np.uint8 and result.shape == image.shape
    np.testing.assert_array_equal(result[~mask], image[~mask])

    hidden_changed = np.where(mask[:, :, None], noise(*mask.shape, seed=1), image)
    again = edit(hidden_changed, labels, mask, everything_mixed, size, refines, feather=feather).image
    np.testing.assert_array_equal(again, result)


@quick
@given(partial_masks(), st.integers(0, 4), st.booleans())
def test_edit_known_pixels_are_exact_and_hidden_ones_unused(mask: np.ndarray, feather: int, refines: bool) -> None:
    check_promises(mask, 256, feather, refines)


@quick
@given(partial_masks(150), st.sampled_from([8, 20, 32]))
def test_edit_strongly_shrunk_windows_keep_known_pixels(mask: np.ndarray, size: int) -> None:
    """A small model makes small photos as hard as large ones."""
    check_promises(mask, size, 3)


@settings(max_examples=15, deadline=None)
@given(partial_masks(500), st.sampled_from([128, 160]))
def test_edit_several_levels_keep_known_pixels(mask: np.ndarray, size: int) -> None:
    check_promises(mask, size, 3, refines=True)


BORDERS = np.s_[:5, 1400:1500], np.s_[-5:, 1400:1500], np.s_[2000:2100, :5], np.s_[2000:2100, -5:]


@pytest.mark.parametrize("regions", [BORDERS, (np.s_[1000:2400, 900:2900],)])
def test_edit_large_photo_keeps_known_pixels(regions: tuple[Any, ...]) -> None:
    mask = np.zeros((4000, 3000), bool)
    for region in regions:
        mask[region] = True
    check_promises(mask, 256, 3)


@pytest.mark.parametrize("shape", [(1, 2), (2, 1), (1, 300), (300, 1), (3, 2), (255, 257), (256, 256), (257, 255)])
def test_edit_small_and_model_sized_photos_keep_known_pixels(shape: tuple[int, int]) -> None:
    for place in (0, -1):
        mask = np.zeros(shape, bool)
        mask.flat[place] = True
        check_promises(mask, 256, 3)
        check_promises(~mask, 256, 3)


@pytest.mark.parametrize("refines", [False, True])
def test_edit_feather_stops_at_class_borders_where_labels_are_true_of_the_photo(refines: bool) -> None:
    size = 700 if refines else 200
    image, mask = np.full((size, size, 3), 60, np.uint8), np.zeros((size, size), bool)
    mask[size // 7 : -(size // 7), size // 7 : -(size // 7)] = True
    labels = np.where(mask, 1, 2)
    labels[: size // 2] = 3

    def blended(match: bool) -> list[bool]:
        hard, soft = (
            edit(image, labels, mask, black, refines=refines, match_surroundings=match, feather=feather).image
            for feather in (0, 3)
        )
        differs = (hard != soft).any(axis=2)[:, size // 3]
        return [bool(half.any()) for half in (differs[: size // 2], differs[size // 2 :])]

    assert (blended(False), blended(True)) == ([True, True], [True, False])


@quick
@given(partial_masks(400), st.integers(0, 1000))
def test_edit_labels_outside_the_mask_affect_edges_at_its_rim_only(mask: np.ndarray, seed: int) -> None:
    """With an instance map that stays, labels outside the mask may hold anything, unless they are matched."""
    image, labels, instances = noise(*mask.shape), labels_for(mask), labels_for(mask, seed=5)
    result = edit(image, labels, mask, everything_mixed, instances=instances, size=64, match_surroundings=False).image
    anything = np.where(mask, labels.astype(np.int64), np.random.default_rng(seed).integers(-999, 999, mask.shape))
    again = edit(image, anything, mask, everything_mixed, instances=instances, size=64, match_surroundings=False).image
    np.testing.assert_array_equal(again, result)


def test_edit_every_masked_pixel_comes_from_the_session() -> None:
    mask = np.zeros((700, 900), bool)
    mask[:170, 30:60] = mask[690:, 890:] = mask[530:700, 300:470] = True
    image = np.full((700, 900, 3), 255, np.uint8)
    result = edit(image, labels_for(mask), mask, black, feather=0).image
    assert (result[mask] == 0).all()
    assert (result[~mask] == 255).all()


def test_edit_upsampled_result_fills_the_mask_inside_the_feather() -> None:
    mask = np.zeros((1200, 1200), bool)
    mask[200:1000, 200:1000] = True
    result = edit(np.full((1200, 1200, 3), 255, np.uint8), labels_for(mask), mask, black, feather=0).image
    assert (result[~mask] == 255).all()
    assert (result[215:985, 215:985] == 0).all()  # three frame pixels inside the rim


def test_edit_identity_session_returns_the_smooth_photo() -> None:
    """Of a photo of one color nothing changes, however the windows lie, since the hidden pixels are continued."""
    mask = np.zeros((300, 700), bool)
    mask[100:104, 100:104] = mask[200:203, 400:650] = True
    image = np.full((300, 700, 3), (10, 128, 240), np.uint8)
    covered = np.where(mask[:, :, None], np.uint8(0), image)
    assert (edit(covered, labels_for(mask), mask).image == image).all()


def test_edit_hidden_pixels_are_replaced_before_the_session() -> None:
    mask = np.zeros((256, 256), bool)
    mask[50:100, 50:100] = True
    session = FakeSession(identity)
    image = np.where(mask[:, :, None], np.uint8(255), np.full((256, 256, 3), 30, np.uint8))
    Editor(session, CLASSES).edit(image, labels_for(mask), mask)
    seen = session.calls[0][0][0]
    assert (seen[54:96, 54:96] == 128).all()
    seen = seen.copy()
    seen[54:96, 54:96] = 30
    assert (seen == 30).all()


def test_edit_photo_of_the_models_size_is_passed_unchanged() -> None:
    mask = np.zeros((256, 256), bool)
    mask[3:9, 200:] = True
    image, labels, session = noise(256, 256), labels_for(mask), FakeSession(identity)
    instances = labels.astype(np.uint16) + 40_000
    Editor(session, CLASSES).edit(image, labels, mask, instances)
    ((seen_image, seen_labels, seen_instances, seen_mask),) = session.calls
    np.testing.assert_array_equal(seen_image[0][~mask], image[~mask])
    np.testing.assert_array_equal(seen_labels[0], labels)
    np.testing.assert_array_equal(seen_instances[0], instances)
    np.testing.assert_array_equal(seen_mask[0], mask)


def test_edit_without_instances_passes_labels() -> None:
    mask = np.zeros((256, 256), bool)
    mask[:9, :9] = True
    labels, session = labels_for(mask), FakeSession(identity)
    Editor(session, CLASSES).edit(noise(256, 256), labels, mask)
    np.testing.assert_array_equal(session.calls[0][2][0], labels)


def test_edit_small_photo_is_padded_by_reflection() -> None:
    mask = np.zeros((100, 60), bool)
    mask[20:30, 40:] = True
    image, session = noise(100, 60), FakeSession(identity)
    Editor(session, CLASSES).edit(image, labels_for(mask), mask)
    seen, seen_mask = session.calls[0][0][0], session.calls[0][3][0]
    np.testing.assert_array_equal(seen[:100, :60][~mask], image[~mask])
    np.testing.assert_array_equal(seen[:100, 60:119], seen[:100, 58::-1][:, :59])
    np.testing.assert_array_equal(seen_mask[:100, 60:119], seen_mask[:100, 58::-1][:, :59])


def test_edit_thin_mask_in_a_shrunk_window_keeps_its_labels() -> None:
    mask = np.zeros((2000, 2000), bool)
    mask[1000, 200:1800] = mask[200:1800, 700] = True
    labels = np.where(mask, 2, 1).astype(np.uint8)
    session = FakeSession(identity)
    Editor(session, CLASSES).edit(noise(2000, 2000), labels, mask)
    _, seen_labels, seen_instances, seen_mask = session.calls[0]
    assert (seen_labels[seen_mask == 1] == 2).all()
    assert (seen_labels[seen_mask == 0] == 1).all()
    np.testing.assert_array_equal(seen_instances, seen_labels)


def test_edit_void_labels_are_passed_as_no_class() -> None:
    mask = np.zeros((256, 256), bool)
    mask[0, 0] = True
    session = FakeSession(layout)
    labels = np.full(mask.shape, 255, np.int64)
    assert Editor(session, CLASSES).edit(noise(256, 256), labels, mask, feather=0).image[0, 0].tolist() == [255] * 3


def test_edit_integer_mask_edits_non_zero_pixels() -> None:
    mask = np.zeros((20, 30), np.uint8)
    mask[4:9, 4:9], mask[15:, 20:] = 255, 1
    image = noise(20, 30)
    as_bool = edit(image, labels_for(mask), mask != 0, black).image
    np.testing.assert_array_equal(edit(image, labels_for(mask), mask, black).image, as_bool)
    assert (as_bool[6, 6] == image[6, 6]).sum() < 3


def six_windows() -> np.ndarray:
    mask = np.zeros((700, 1100), bool)
    mask[100:600:400, 100:1000:400] = True
    return mask


def test_edit_batched_windows_are_pasted_in_place() -> None:
    mask, image = six_windows(), np.full((700, 1100, 3), 99, np.uint8)
    result = edit(image, labels_for(mask), mask, batch_index, feather=0, batch_size=4)
    assert result.image[mask][:, 0].tolist() == [0, 1, 2, 3, 0, 1]
    assert result.report.batches == 2


def test_edit_batch_size_does_not_change_the_result() -> None:
    mask, image = six_windows(), noise(700, 1100)
    results = [edit(image, labels_for(mask), mask, everything_mixed, batch_size=size).image for size in (1, 4, 6, 50)]
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


def test_edit_progress_counts_windows() -> None:
    reported: list[tuple[int, int]] = []
    mask = six_windows()
    edit(noise(700, 1100), labels_for(mask), mask, batch_size=4, progress=lambda *at: reported.append(at))
    assert reported == [(0, 6), (4, 6), (6, 6)]


def test_edit_tiling_auto_is_off_only_at_the_models_size() -> None:
    for shape, mode, reason in (
        ((256, 256), "off", "the photo has the model's size, 256×256"),
        ((256, 257), "crop", "no window is larger than 384 pixels"),
        ((100, 100), "crop", "no window is larger than 384 pixels"),
    ):
        mask = np.zeros(shape, bool)
        mask[0, 0] = True
        report = edit(noise(*shape), labels_for(mask), mask).report
        assert (report.tiling, report.tiling_reason) == (mode, reason)


def test_edit_tiling_off_other_size_is_refused() -> None:
    mask = np.zeros((480, 360), bool)
    mask[0, 0] = True
    with pytest.raises(InputError, match=r"street\.png is 360×480, .* 256×256") as caught:
        edit(noise(480, 360), labels_for(mask), mask, tiling="off", names=InputNames(image="street.png"))
    assert caught.value.hint


def test_edit_tiling_off_and_crop_agree_at_the_models_size() -> None:
    mask = np.zeros((256, 256), bool)
    mask[100:180, 90:99] = True
    image = noise(256, 256)
    off, crop = (edit(image, labels_for(mask), mask, everything_mixed, tiling=mode) for mode in ("off", "crop"))
    np.testing.assert_array_equal(off.image, crop.image)
    assert (off.report.tiling_reason, crop.report.tiling) == ("asked for", "crop")


def test_edit_report_is_plain_json() -> None:
    mask = np.zeros((1000, 2000), bool)
    mask[500, 100] = True
    mask[200:800, 1000:1600] = True
    report = edit(noise(1000, 2000), labels_for(mask), mask).report
    assert [entry.window for entry in report.windows] == [
        Window(50, 850, 900, 900),
        Window(373, 0, 256, 256),
    ]
    missing, lost = report.notes
    assert "the model has no refine graph; export it again" in missing
    assert lost == "window 1 of 2 is 900×900 pixels and is edited at 256×256: detail is lost"
    assert report.edited_pixels == 360_001
    fields = json.loads(json.dumps(report.to_json()))
    place = {"top": 50, "left": 850, "height": 900, "width": 900}
    assert fields["windows"][0] == {**place, "scale": 0.2844, "cascade": False, "levels": [], "between_levels": None}
    assert (fields["backend"], fields["device"], fields["precision"]) == ("fake", "cpu", "fp32")
    assert fields["provider"] == "none"
    assert set(fields["milliseconds"]) == {"validate", "plan", "prepare", "run", "stitch"}
    assert all(spent > 0 for spent in fields["milliseconds"].values())
    assert (fields["tiling"], fields["batches"], fields["feather"]) == ("crop", 1, 3)
    assert fields["edited_pixels"] == 360_001


def test_edit_window_slightly_larger_than_the_model_gives_no_note() -> None:
    mask = np.zeros((1000, 1000), bool)
    mask[400:650, 400:650] = True
    report = edit(noise(1000, 1000), labels_for(mask), mask).report
    assert report.windows[0].window.height == 375 and report.notes == ()


def test_editor_exit_closes_the_session() -> None:
    session = FakeSession(identity)
    with Editor(session, CLASSES) as editor:
        assert editor.choices == () and not session.closed
    assert session.closed


PHOTO, IDS, MASK = np.zeros((6, 8, 3), np.uint8), np.zeros((6, 8), np.uint8), np.eye(6, 8, dtype=bool)
BAD_INPUTS: dict[str, tuple[dict[str, Any], str]] = {
    "photo is a list": ({"image": [[0]]}, "image is a list"),
    "photo in floats": ({"image": PHOTO.astype(float)}, "image has type float64, expected uint8"),
    "photo of 16 bits": ({"image": PHOTO.astype(np.uint16)}, "image has type uint16"),
    "gray photo": ({"image": IDS}, r"image has shape \(6, 8\)"),
    "photo with alpha": ({"image": np.zeros((6, 8, 4), np.uint8)}, r"image has shape \(6, 8, 4\)"),
    "photo without pixels": (
        {"image": PHOTO[:0], "labels": IDS[:0], "mask": MASK[:0]},
        "image is 8×0, it has no pixels",
    ),
    "color label map": ({"labels": PHOTO}, r"labels has shape \(6, 8, 3\)"),
    "labels in floats": ({"labels": IDS.astype(np.float32)}, "labels has type float32"),
    "labels of truth": ({"labels": MASK}, "labels has type bool"),
    "labels of another size": ({"labels": IDS[:5]}, "labels: 8×5, but image: 8×6"),
    "mask of another size": ({"mask": MASK.T}, "mask: 6×8, but image: 8×6"),
    "instances of another size": ({"instances": IDS[:, :1]}, "instances: 1×6, but image: 8×6"),
    "soft mask": ({"mask": MASK.astype(float)}, "mask has type float64"),
    "mask with channels": ({"mask": PHOTO}, r"mask has shape \(6, 8, 3\)"),
    "empty mask": ({"mask": ~MASK & MASK}, "mask is empty: it marks no pixel"),
    "full mask": ({"mask": ~MASK | MASK}, "mask is full: it marks every pixel"),
    "instances in floats": ({"instances": IDS.astype(float)}, "instances has type float64"),
    "instances in color": ({"instances": PHOTO}, r"instances has shape \(6, 8, 3\)"),
    "instances beyond 32 bits": ({"instances": IDS + np.int64(2**31)}, "from 2147483648 to 2147483648"),
    "a label that is no class": ({"labels": IDS + np.uint8(4)}, "4"),
    "a negative label": ({"labels": IDS.astype(np.int16) - 3}, "-3"),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_edit_bad_arrays_are_refused(case: str) -> None:
    changed, message = BAD_INPUTS[case]
    arrays = {"image": PHOTO, "labels": IDS, "mask": MASK, **changed}
    session = FakeSession(identity)
    with pytest.raises(InputError, match=message):
        Editor(session, CLASSES).edit(**arrays)
    assert not session.calls


@pytest.mark.parametrize(("value", "message"), [(False, "empty"), (True, "full")])
def test_edit_photo_of_one_pixel_is_refused(value: bool, message: str) -> None:
    with pytest.raises(InputError, match=message):
        edit(PHOTO[:1, :1], IDS[:1, :1], np.array([[value]]))


def test_edit_valid_arrays_are_accepted() -> None:
    edit(PHOTO, IDS, MASK, instances=IDS)


def test_edit_errors_name_the_files() -> None:
    names = InputNames("a.jpg", "b.png", "c.png", "d.png")
    with pytest.raises(InputError, match=r"b\.png: 8×5, but a\.jpg: 8×6"):
        edit(PHOTO, IDS[:5], MASK, names=names)
    with pytest.raises(InputError, match=r"c\.png is empty"):
        edit(PHOTO, IDS, MASK & ~MASK, names=names)
    with pytest.raises(InputError, match=r"d\.png has type"):
        edit(PHOTO, IDS, MASK, instances=IDS.astype(float), names=names)


def test_edit_unknown_labels_are_counted_under_the_mask() -> None:
    labels = np.where(MASK, 0, 9)
    edit(PHOTO, labels, MASK)
    labels[2, 2] = labels[3, 3] = 7
    with pytest.raises(InputError, match=r"7 \(2 pixels\)") as caught:
        edit(PHOTO, labels, MASK)
    assert "9" not in caught.value.problem


@pytest.mark.parametrize("side", [256, 700])
def test_edit_match_surroundings_requested_removes_a_cast(side: int) -> None:
    photo = np.full((side, side, 3), 100, np.uint8)
    mask = np.zeros((side, side), np.bool_)
    mask[60:-60, 60:-60] = True
    labels = labels_for(mask) * 0

    def darker(image: np.ndarray, labels: np.ndarray, instances: np.ndarray, mask: np.ndarray) -> np.ndarray:
        return np.full_like(image, 80)

    plain, matched = (edit(photo, labels, mask, darker, feather=0, match_surroundings=asked) for asked in (False, True))
    assert plain.image[mask].max() <= 80 and not plain.report.match_surroundings
    assert matched.image.min() >= 97 and matched.report.to_json()["match_surroundings"]


@pytest.mark.parametrize("option", [{"tiling": "mosaic"}, {"feather": -1}, {"batch_size": 0}])
def test_edit_options_out_of_range_are_refused(option: dict[str, Any]) -> None:
    (value,) = option.values()
    with pytest.raises(UsageError, match=str(value)):
        edit(PHOTO, IDS, MASK, **option)


def test_edit_feather_blends_inside_the_mask_only_and_zero_is_the_sessions_result() -> None:
    photo, mask = noise(256, 256), np.zeros((256, 256), bool)
    mask[50:150, 60:200] = True

    def constant(image: np.ndarray, labels: np.ndarray, instances: np.ndarray, mask: np.ndarray) -> np.ndarray:
        return np.full_like(image, 200)

    hard, soft = (edit(photo, labels_for(mask), mask, constant, feather=feather) for feather in (0, 3))
    assert (hard.image[mask] == 200).all() and hard.report.to_json()["feather"] == 0
    for result in (hard, soft):
        np.testing.assert_array_equal(result.image[~mask], photo[~mask])
    inside = np.zeros_like(mask)
    inside[53:147, 63:197] = True
    assert (soft.image[inside] == 200).all() and (soft.image[mask & ~inside] != 200).any()

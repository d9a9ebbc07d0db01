"""Extension of a photo beyond its borders, in windows that follow one another."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spmdeploy.editing.editor import Editor, EditResult
from spmdeploy.errors import InputError, UsageError
from spmdeploy.tiling.outpaint import extended_size, padding_mask
from spmdeploy.tiling.windows import Window
from spmdeploy.types import ModelInput, Padding
from tests.editing.test_pyramid import CLASSES, Session, noise

growth = st.sampled_from([0, 0, 1, 30, 200])


def extend(session: Session, image: np.ndarray, sides: Padding, **more: Any) -> EditResult:
    shape = extended_size(image.shape, sides)
    numbers = np.arange(shape[0] * shape[1], dtype=np.int32).reshape(shape)
    more = {"feather": 0} | more
    return Editor(session, CLASSES).extend(image, np.zeros(shape, np.uint8), sides, numbers, **more)


@settings(max_examples=25, deadline=None)
@given(st.integers(20, 150), st.integers(20, 150), st.builds(Padding, growth, growth, growth, growth))
def test_extend_perfect_session_returns_the_whole_image(height: int, width: int, sides: Padding) -> None:
    """Bit for bit, in every direction, over as many windows as it takes."""
    if not any(sides):
        return
    whole = noise(*extended_size((height, width), sides))
    photo = whole[sides.top : sides.top + height, sides.left : sides.left + width]
    for tiling in ("cascade", "auto"):
        session = Session(64, whole.reshape(-1, 3))
        result = extend(session, photo, sides, tiling=tiling)
        if tiling == "cascade" or all(window.scale == 1 for window in result.report.windows):
            np.testing.assert_array_equal(result.image, whole)
        np.testing.assert_array_equal(result.image[padding_mask(photo.shape, sides) == 0], photo.reshape(-1, 3))
        assert result.report.edited_pixels == whole[..., 0].size - height * width


def test_extend_windows_see_earlier_results() -> None:
    class Continuing(Session):
        """Paints one more than the brightest known pixel that it sees."""

        def run_unrounded(self, inputs: ModelInput) -> np.ndarray:
            image, masked = inputs.image, inputs.mask[..., None] != 0
            return np.where(masked, np.where(masked, 0, image).max() + 1, image).astype(np.float32)

    photo = np.full((64, 64, 3), 10, np.uint8)
    result = extend(Continuing(64), photo, Padding(70, 0, 100, 0), tiling="crop")
    strips = [int(column) for column in result.image[0, :, 0]]
    assert strips[:70] == [13] * 24 + [12] * 23 + [11] * 23  # towards the left, in three steps
    assert strips[70:134] == [10] * 64
    assert strips[134:] == [11] * 25 + [12] * 25 + [13] * 25 + [14] * 25


def test_extend_later_windows_are_hidden_from_the_session() -> None:
    class Strict(Session):
        def run_unrounded(self, inputs: ModelInput) -> np.ndarray:
            known = inputs.image[inputs.mask == 0]
            assert (known == 200).all(), "black, the canvas before anything is made, would be seen"
            return np.full(inputs.image.shape, 200, np.float32)

    photo = np.full((50, 80, 3), 200, np.uint8)
    assert (extend(Strict(64), photo, Padding(90, 70, 110, 130), tiling="crop", feather=3).image == 200).all()


def test_extend_cost_per_step_is_constant() -> None:
    reported: list[tuple[int, int]] = []
    photo = noise(64, 64)
    near, far = (
        extend(Session(64), photo, Padding(0, 0, length, 0), progress=lambda *at: reported.append(at)).report
        for length in (96, 960)
    )
    assert (
        {entry.plan.letterbox.height for entry in near.windows}
        == {entry.plan.letterbox.height for entry in far.windows}
        == {64}
    )
    assert (len(near.windows), len(far.windows)) == (3, 30)
    assert reported[-1] == (30, 30) and reported[0] == (0, 3)


def test_extend_report_has_windows_of_the_extended_image() -> None:
    report = extend(Session(64), noise(100, 100), Padding(0, 0, 120, 0)).report
    assert [entry.window for entry in report.windows] == [Window(0, left, 100, 100) for left in (46, 86, 120)]
    assert (report.tiling, report.tiling_reason) == ("cascade", "3 of 3 windows larger than 96 pixels")


@pytest.mark.parametrize(
    ("sides", "message"),
    [
        (Padding(0, 0, 0, 0), "0 pixels on every side"),
        (Padding(0, -3, 9, 0), "cannot grow by -3"),
        (Padding(0, 0, 10**9, 0), "1000000008×6, 6000 megapixels; at most 200"),
    ],
)
def test_extend_impossible_padding_is_refused(sides: Padding, message: str) -> None:
    photo = noise(6, 8)
    with pytest.raises(UsageError, match=message) as caught:
        Editor(Session(64), CLASSES).extend(photo, np.zeros((6, 8), np.uint8), sides)
    assert caught.value.hint


def test_extend_labels_of_another_size_are_refused() -> None:
    photo, labels = noise(6, 8), np.zeros((6, 8), np.uint8)
    with pytest.raises(InputError, match="labels: 8×6, but image grows to 10×6"):
        Editor(Session(64), CLASSES).extend(photo, labels, Padding(0, 0, 2, 0))
    grown = np.zeros((6, 10), np.uint8)
    with pytest.raises(InputError, match="instances: 8×6, but image grows to 10×6"):
        Editor(Session(64), CLASSES).extend(photo, grown, Padding(0, 0, 2, 0), labels)
    with pytest.raises(InputError, match=r"4 \(12 pixels\)"):
        Editor(Session(64), CLASSES).extend(photo, grown + np.uint8(4), Padding(0, 0, 2, 0))
    with pytest.raises(InputError, match="labels is a list"):
        Editor(Session(64), CLASSES).extend(photo, [[0]], Padding(0, 0, 2, 0))  # type: ignore[arg-type]


def test_extend_tiling_off_is_refused() -> None:
    with pytest.raises(UsageError, match="without tiling"):
        extend(Session(64), noise(64, 64), Padding(0, 0, 1, 0), tiling="off")

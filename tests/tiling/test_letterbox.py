"""Letterboxes: sizes, padding by reflection and sampling of labels, by properties."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from spmdeploy.tiling import letterbox
from spmdeploy.tiling.letterbox import Letterbox, fit_letterbox
from spmdeploy.tiling.windows import Window
from tests.tiling.strategies import quick, small_masks


@quick
@given(st.integers(1, 9000), st.integers(1, 9000))
def test_fit_letterbox_shrinks_and_never_enlarges(height: int, width: int) -> None:
    found = fit_letterbox(Window(0, 0, height, width), 256)
    longer = max(height, width)
    assert 1 <= found.height <= min(height, 256) and 1 <= found.width <= min(width, 256)
    assert max(found.height, found.width) == min(longer, 256)
    assert found.scale == min(1.0, 256 / longer)
    assert found.shrinks == (longer > 256)
    for side, shrunk in ((height, found.height), (width, found.width)):
        assert abs(side * found.scale - shrunk) <= 0.5 or shrunk == 1


def test_fit_letterbox_narrow_window_keeps_its_aspect() -> None:
    assert fit_letterbox(Window(7, 9, 100, 1000), 256) == Letterbox(Window(7, 9, 100, 1000), 26, 256, 256)


@quick
@given(st.integers(1, 40), st.integers(1, 40))
def test_pad_by_reflection_does_not_repeat_the_border(height: int, width: int) -> None:
    ids = np.arange(height * width, dtype=np.int32).reshape(height, width)
    padded = letterbox.pad_by_reflection(ids, 40, 50)
    assert padded.shape == (40, 50) and padded.dtype == ids.dtype

    def mirrored(length: int, to: int) -> list[int]:
        there_and_back = [*range(length), *range(length - 2, 0, -1)]
        return [there_and_back[at % len(there_and_back)] for at in range(to)]

    np.testing.assert_array_equal(padded, ids[np.ix_(mirrored(height, 40), mirrored(width, 50))])


def test_pad_by_reflection_keeps_channels() -> None:
    image = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    padded = letterbox.pad_by_reflection(image, 4, 4)
    assert padded.shape == (4, 4, 3)
    np.testing.assert_array_equal(padded[:, :, 1], letterbox.pad_by_reflection(image[:, :, 1], 4, 4))
    np.testing.assert_array_equal(padded[2:, :3], image[[0, 1]])


def covering(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    """Frame pixels that touch a masked pixel, by looking at each."""
    covered = np.zeros((height, width), bool)
    for y, x in np.ndindex(height, width):
        rows = slice(y * mask.shape[0] // height, -(-(y + 1) * mask.shape[0] // height))
        columns = slice(x * mask.shape[1] // width, -(-(x + 1) * mask.shape[1] // width))
        covered[y, x] = mask[rows, columns].any()
    return covered


@quick
@given(small_masks(), st.integers(1, 40), st.integers(1, 40))
def test_label_sampling_grid_masked_pixels_take_masked_labels(mask: np.ndarray, height: int, width: int) -> None:
    height, width = min(height, mask.shape[0]), min(width, mask.shape[1])
    shrunk_mask = covering(mask, height, width)
    rows, columns = letterbox.label_sampling_grid(mask, shrunk_mask)
    assert rows.shape == columns.shape == (height, width)
    np.testing.assert_array_equal(mask[rows, columns], shrunk_mask)
    y, x = np.mgrid[:height, :width]  # never from outside the frame pixel's own cell
    assert (rows + 1 > y * mask.shape[0] / height).all() and (rows < (y + 1) * mask.shape[0] / height).all()
    assert (columns + 1 > x * mask.shape[1] / width).all() and (columns < (x + 1) * mask.shape[1] / width).all()


def test_label_sampling_grid_known_pixels_take_the_nearest_label() -> None:
    rows, columns = letterbox.label_sampling_grid(np.zeros((9, 6), bool), np.zeros((3, 2), bool))
    assert rows.tolist() == [[1, 1], [4, 4], [7, 7]] and columns.tolist() == [[1, 4]] * 3

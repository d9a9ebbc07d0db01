"""Resizing of images, label maps and masks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from spmdeploy.imaging.resize import resize_labels, resize_mask_conservative, resize_photo

SIDES = st.integers(1, 19)


@given(hnp.arrays(np.uint8, st.tuples(SIDES, SIDES, st.just(3))), st.data())
@settings(deadline=None)
def test_resize_photo_shrinking_is_area_average(pixels: np.ndarray, data: st.DataObject) -> None:
    height, width = (data.draw(st.integers(1, side)) for side in pixels.shape[:2])
    # By definition: repeat every pixel `size` times, then every cell averages `length` of the copies; halves go up.
    fine = pixels.repeat(height, axis=0).repeat(width, axis=1).astype(int)
    sums = fine.reshape(height, pixels.shape[0], width, pixels.shape[1], 3).sum(axis=(1, 3))
    copies = pixels.shape[0] * pixels.shape[1]
    coarse = resize_photo(pixels, height, width)
    assert coarse.dtype == np.uint8
    np.testing.assert_array_equal(coarse, (2 * sums + copies) // (2 * copies))


@pytest.mark.parametrize("block", [(2, 2), (1, 2), (8, 4)])
def test_resize_photo_shrinking_by_powers_of_two_rounds_halves_up(block: tuple[int, int]) -> None:
    """Every sum that a block of bytes can have."""
    pixels = block[0] * block[1]
    sums = np.arange(255 * pixels + 1)
    blocks = np.clip(sums[:, None] - 255 * np.arange(pixels), 0, 255).astype(np.uint8)
    image = blocks.reshape(-1, block[1])[:, :, None].repeat(3, axis=2)
    means = resize_photo(image, len(sums), 1)[:, 0]
    np.testing.assert_array_equal(means, ((2 * sums + pixels) // (2 * pixels))[:, None].repeat(3, axis=1))


@pytest.mark.parametrize("side", [256, 512, 4096])
def test_resize_photo_shrinking_to_one_pixel_keeps_a_flat_image(side: int) -> None:
    assert resize_photo(np.full((side, side, 3), 255, np.uint8), 1, 1).tolist() == [[[255, 255, 255]]]


def contributes(pixel: int, cell: int, length: int, size: int) -> bool:
    """Whether one of `length` pixels counts in one of `size` cells, as intervals on the same line."""
    if size <= length:  # area average: they overlap
        return pixel * size < (cell + 1) * length and cell * length < (pixel + 1) * size
    apart = (2 * pixel + 1) * size - (2 * cell + 1) * length  # of the centers, in 1 / (2 * size) pixel
    return -4 * size < apart <= 4 * size  # bicubic: two pixels to either side


@given(hnp.arrays(bool, st.tuples(SIDES, SIDES)), SIDES, SIDES)
@settings(deadline=None)
def test_resize_mask_marks_all_contributing_pixels(mask: np.ndarray, height: int, width: int) -> None:
    covering = resize_mask_conservative(mask, height, width)
    assert covering.shape == (height, width) and covering.dtype == bool
    for y, x in np.ndindex(height, width):
        rows = [contributes(row, y, mask.shape[0], height) for row in range(mask.shape[0])]
        columns = [contributes(column, x, mask.shape[1], width) for column in range(mask.shape[1])]
        assert covering[y, x] == mask[rows][:, columns].any()


@given(hnp.arrays(np.uint8, st.tuples(SIDES, SIDES, st.just(3))), hnp.arrays(np.uint8, (19, 19, 3)), st.data())
@settings(deadline=None)
def test_resize_photo_hidden_pixels_stay_under_resized_mask(
    pixels: np.ndarray, other: np.ndarray, data: st.DataObject
) -> None:
    mask = data.draw(hnp.arrays(bool, pixels.shape[:2]))
    height, width = data.draw(SIDES), data.draw(SIDES)
    changed = np.where(mask[..., None], other[: mask.shape[0], : mask.shape[1]], pixels)
    covering = resize_mask_conservative(mask, height, width)
    assert covering.shape == (height, width) and covering.dtype == bool
    differs = (resize_photo(pixels, height, width) != resize_photo(changed, height, width)).any(axis=2)
    assert not (differs & ~covering).any()


def test_resize_mask_shrinking_is_tight() -> None:
    pixels = np.zeros((30, 20, 3), np.uint8)
    for y, x in ((0, 0), (7, 13), (29, 19), (15, 9)):
        mask = np.zeros((30, 20), bool)
        mask[y, x] = True
        touched = resize_photo(np.where(mask[..., None], np.uint8(255), pixels), 8, 6).any(axis=2)
        np.testing.assert_array_equal(resize_mask_conservative(mask, 8, 6), touched)


def test_resize_photo_growing_flat_image_stays_flat() -> None:
    flat = np.full((5, 4, 3), 77, np.uint8)
    for height, width in ((10, 9), (3, 9), (10, 2), (5, 4)):
        grown = resize_photo(flat, height, width)
        assert grown.shape == (height, width, 3) and (grown == 77).all()
    assert resize_photo(flat, 5, 4) is not flat


@given(hnp.arrays(np.int32, st.tuples(SIDES, SIDES)), SIDES, SIDES)
def test_resize_labels_takes_nearest_id(ids: np.ndarray, height: int, width: int) -> None:
    resized = resize_labels(ids, height, width)
    assert resized.shape == (height, width) and resized.dtype == ids.dtype
    for y, x in np.ndindex(height, width):
        assert resized[y, x] == ids[int((y + 0.5) * ids.shape[0] / height), int((x + 0.5) * ids.shape[1] / width)]
    np.testing.assert_array_equal(resize_labels(resized.repeat(3, 0).repeat(3, 1), height, width), resized)


def test_resize_labels_agrees_with_photo() -> None:
    ids = np.arange(36, dtype=np.uint8).reshape(6, 6)
    np.testing.assert_array_equal(resize_labels(ids, 2, 2), ids[1::3, 1::3])

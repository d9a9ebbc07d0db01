"""Stitching and extrapolated borders, by properties."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spmdeploy.tiling import stitching
from tests.tiling.strategies import quick, small_masks

Case = tuple[np.ndarray, np.ndarray, np.ndarray]


@st.composite
def images_with_masks(draw: st.DrawFn) -> Case:
    """An image, another of the same size, and any mask, full and empty ones included."""
    mask = draw(small_masks())
    seed = draw(st.integers(0, 2**32 - 1))
    image, other = np.random.default_rng(seed).integers(0, 256, (2, *mask.shape, 3), np.uint8)
    return image, other, mask


def distance_to_known(mask: np.ndarray) -> np.ndarray:
    """Steps of 8-neighborhood from each pixel to the nearest known one, by looking at each; huge if there is none."""
    known = np.argwhere(~mask)
    distance = np.full(mask.shape, 10**6)
    for y, x in np.ndindex(mask.shape):
        if len(known):
            distance[y, x] = np.abs(known - (y, x)).max(axis=1).min()
    return distance


@quick
@given(images_with_masks(), st.integers(0, 5))
def test_stitch_known_pixels_are_unchanged_and_hidden_ones_unused(case: Case, feather: int) -> None:
    image, edited, mask = case
    stitched, hidden_changed = image.copy(), image.copy()
    hidden_changed[mask] ^= 0xFF
    stitching.stitch(stitched, edited, mask, feather)
    stitching.stitch(hidden_changed, edited, mask, feather)
    np.testing.assert_array_equal(stitched[~mask], image[~mask])
    np.testing.assert_array_equal(hidden_changed, stitched)


@quick
@given(images_with_masks(), st.integers(0, 5))
def test_stitch_beyond_the_feather_is_the_edit(case: Case, feather: int) -> None:
    image, edited, mask = case
    deep = mask & (distance_to_known(mask) > feather)
    stitching.stitch(image, edited, mask, feather)
    np.testing.assert_array_equal(image[deep], edited[deep])


@quick
@given(images_with_masks(), st.integers(0, 5))
def test_stitch_constant_into_itself_is_unchanged(case: Case, feather: int) -> None:
    _, _, mask = case
    constant = np.full((*mask.shape, 3), 77, np.uint8)
    image = np.where(mask[:, :, None], np.uint8(200), constant)
    stitching.stitch(image, constant, mask, feather)
    assert (image == 77).all()


def test_stitch_feather_blends_in_equal_steps() -> None:
    image, edited = np.full((1, 9, 3), 40, np.uint8), np.full((1, 9, 3), 80, np.uint8)
    mask = np.ones((1, 9), bool)
    mask[0, 0] = False
    stitching.stitch(image, edited, mask, 3)
    assert image[0, :, 0].tolist() == [40, 50, 60, 70, 80, 80, 80, 80, 80]


def test_stitch_with_labels_blends_inside_each_class_only() -> None:
    image, edited = np.full((2, 9, 3), 40, np.uint8), np.full((2, 9, 3), 80, np.uint8)
    mask = np.ones((2, 9), bool)
    mask[:, 0] = False
    labels = np.array([[1, 1, 1, 1, 1, 1, 1, 1, 1], [5, 2, 2, 2, 2, 2, 2, 2, 2]])
    stitching.stitch(image, edited, mask, 3, labels)
    assert image[:, :, 0].tolist() == [[40, 50, 60, 70, 80, 80, 80, 80, 80], [40, 80, 80, 80, 80, 80, 80, 80, 80]]


@quick
@given(images_with_masks(), st.integers(0, 4), st.integers(1, 200))
def test_extrapolate_border_of_each_class_depends_on_its_own_pixels_alone(case: Case, depth: int, chunk: int) -> None:
    image, other, mask = case
    labels = other[..., 0] % 2
    continued = image.copy()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stitching, "_CHUNK", chunk)
        rings = stitching.extrapolate_border(continued, mask, depth, labels)
    filled = np.zeros(mask.shape, bool)
    for ring in rings:
        filled[ring.rows, ring.columns] = True
    assert not (filled & ~mask).any()
    np.testing.assert_array_equal(continued[~filled], image[~filled])
    for label in (0, 1):
        changed = np.where((labels == label)[..., None], image, other)
        stitching.extrapolate_border(changed, mask, depth, labels)
        np.testing.assert_array_equal(changed[filled & (labels == label)], continued[filled & (labels == label)])


@quick
@given(images_with_masks(), st.integers(0, 4))
def test_extrapolate_border_with_one_class_is_the_one_without_labels(case: Case, depth: int) -> None:
    image, _, mask = case
    plain = image.copy()
    stitching.extrapolate_border(plain, mask, depth)
    stitching.extrapolate_border(image, mask, depth, np.full(mask.shape, 300))
    np.testing.assert_array_equal(image, plain)


@quick
@given(images_with_masks(), st.integers(0, 4))
def test_extrapolate_border_rings_are_pixels_at_each_distance(case: Case, depth: int) -> None:
    image, _, mask = case
    distance = distance_to_known(mask)
    before = image.copy()
    rings = stitching.extrapolate_border(image, mask, depth)
    assert [ring.depth for ring in rings] == [step for step in range(1, depth + 1) if (distance == step).any()]
    for ring in rings:
        found = np.zeros(mask.shape, bool)
        found[ring.rows, ring.columns] = True
        np.testing.assert_array_equal(found, distance == ring.depth)
    np.testing.assert_array_equal(image[distance > depth], before[distance > depth])


@quick
@given(images_with_masks(), st.integers(1, 200))
def test_extrapolate_border_first_ring_is_the_mean_of_known_neighbors(case: Case, chunk: int) -> None:
    image, _, mask = case
    before = image.copy()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stitching, "_CHUNK", chunk)
        rings = stitching.extrapolate_border(image, mask, 1)
    for ring in rings:
        for y, x in zip(ring.rows.tolist(), ring.columns.tolist(), strict=True):
            around = slice(max(y - 1, 0), y + 2), slice(max(x - 1, 0), x + 2)
            mean = before[around][~mask[around]].astype(float).mean(axis=0)
            np.testing.assert_array_equal(image[y, x], np.floor(mean + 0.5))


def test_stitch_memory_order_does_not_matter() -> None:
    mask = np.random.default_rng(0).random((30, 40)) < 0.7
    image, edited = np.random.default_rng(1).integers(0, 256, (2, 30, 40, 3), np.uint8)
    turned = np.asfortranarray(image)
    stitching.stitch(turned, np.asfortranarray(edited), np.asfortranarray(mask), 3)
    stitching.stitch(image, edited, mask, 3)
    np.testing.assert_array_equal(turned, image)

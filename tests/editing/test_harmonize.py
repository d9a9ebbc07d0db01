from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spmdeploy.editing.harmonize import (
    BAND,
    border_contrast,
    decide_matching,
    match_color_statistics,
    match_noise,
    match_surroundings,
)

SIDES = st.integers(40, 90)


def two_classes(height: int, width: int) -> np.ndarray:
    """Class 1 above class 2."""
    labels = np.full((height, width), 2, np.uint8)
    labels[: height // 2] = 1
    return labels


def mask_of(height: int, width: int) -> np.ndarray:
    mask = np.zeros((height, width), np.bool_)
    mask[8:-8, 8 : width // 2] = True
    return mask


@settings(max_examples=25, deadline=None)
@given(SIDES, SIDES, st.tuples(*[st.integers(-40, 40)] * 3))
def test_match_color_statistics_even_surface_loses_its_cast(
    height: int, width: int, cast: tuple[int, int, int]
) -> None:
    labels, mask = two_classes(height, width), mask_of(height, width)
    photo = np.where(labels[..., None] == 1, np.uint8([200, 180, 160]), np.uint8([60, 70, 80])).astype(np.uint8)
    edited = photo.copy()
    edited[mask] = edited[mask] + np.array(cast)
    match_color_statistics(edited, labels, mask)
    assert np.abs(edited.astype(int) - photo).max() <= 1


def test_match_color_statistics_classes_are_matched_separately() -> None:
    labels, mask = two_classes(80, 80), mask_of(80, 80)
    edited = np.full((80, 80, 3), 100, np.uint8)
    edited[mask & (labels == 1)] = 120
    match_color_statistics(edited, labels, mask)
    assert (edited == 100).all()


def test_match_surroundings_known_pixels_and_lone_classes_are_unchanged() -> None:
    rng = np.random.default_rng(0)
    labels, mask = two_classes(80, 80), mask_of(80, 80)
    labels[30:50, 15:30] = 3  # under the mask alone
    edited = rng.integers(0, 256, (80, 80, 3), dtype=np.uint8)
    before = edited.copy()
    match_color_statistics(edited, labels, mask)
    same = (edited == before).all(axis=2)
    assert same[~mask].all() and same[labels == 3].all()
    assert not same[mask].all()


def test_match_color_statistics_large_step_is_limited() -> None:
    labels, mask = np.ones((80, 80), np.uint8), mask_of(80, 80)
    edited = np.where(mask[..., None], np.uint8(0), np.uint8(250)).astype(np.uint8)
    edited = np.repeat(edited[..., :1], 3, axis=2)
    match_color_statistics(edited, labels, mask)
    assert edited[mask].max() == 48  # the largest shift


def test_match_color_statistics_detail_is_kept() -> None:
    rng = np.random.default_rng(1)
    labels, mask = np.ones((96, 96), np.uint8), mask_of(96, 96)
    texture = rng.normal(0, 12, (96, 96, 1)).repeat(3, axis=2)
    edited = np.clip(128 + texture - 30 * mask[..., None], 0, 255).astype(np.uint8)
    before = edited.astype(float)
    match_color_statistics(edited, labels, mask)
    inner = np.s_[8 + BAND : -8 - BAND, 8 + BAND : 40]
    change = edited[inner] - before[inner]
    assert change.mean() == pytest.approx(30, abs=4)
    assert change.std() < 4  # against 12 of the texture


@settings(max_examples=10, deadline=None)
@given(st.integers(520, 700), st.integers(100, 700))
def test_match_color_statistics_large_image_is_measured_on_cells(height: int, width: int) -> None:
    labels, mask = two_classes(height, width), mask_of(height, width)
    edited = np.full((height, width, 3), 100, np.uint8)
    edited[mask] = 90
    match_color_statistics(edited, labels, mask)
    assert np.abs(edited.astype(int) - 100).max() <= 1


def test_match_noise_even_class_passes_its_noise_on() -> None:
    rng = np.random.default_rng(2)
    labels, mask = np.ones((96, 96), np.uint8), mask_of(96, 96)
    grain = np.clip(128 + rng.normal(0, 3, (96, 96, 1)), 0, 255).astype(np.uint8).repeat(3, axis=2)
    edited = np.where(mask[..., None], np.uint8(128), grain).astype(np.uint8)
    match_noise(edited, labels, mask)
    assert edited[mask].std() == pytest.approx(3, rel=0.25)
    assert edited[mask].mean() == pytest.approx(128, abs=0.5)
    assert (edited[~mask] == grain[~mask]).all()
    again = edited.copy()
    match_noise(again, labels, mask)
    assert edited[mask].std() == pytest.approx(again[mask].std(), rel=0.25)  # what has grain gets little more


def test_match_noise_structure_is_not_added() -> None:
    rng = np.random.default_rng(3)
    labels, mask = np.ones((96, 96), np.uint8), mask_of(96, 96)
    wall = rng.integers(0, 256, (96, 96, 1), dtype=np.uint8).repeat(3, axis=2)
    wall[mask] = 128
    before = wall.copy()
    match_noise(wall, labels, mask)
    assert (wall == before).all()


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 70), st.integers(1, 70), st.integers(0, 2**32))
def test_match_surroundings_any_input_keeps_known_pixels(height: int, width: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    labels, mask = rng.integers(0, 3, (height, width)), rng.random((height, width)) < 0.5
    first, second = image.copy(), image.copy()
    match_surroundings(first, labels, mask)
    match_surroundings(second, labels, mask)
    assert (first == second).all() and (first[~mask] == image[~mask]).all()


def halves() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A photo of four squares in two colors with noise, their labels, and a mask in the middle."""
    labels = np.kron([[0, 1], [1, 0]], np.ones((60, 80), np.uint8)).astype(np.uint8)
    photo = np.where(labels[..., None] == 0, 90, 130) + np.random.default_rng(0).integers(-6, 7, (120, 160, 3))
    mask = np.zeros((120, 160), bool)
    mask[40:80, 50:110] = True
    return photo.astype(np.uint8), labels, mask


def test_decide_matching_true_labels_matches() -> None:
    photo, labels, mask = halves()
    decision = decide_matching(None, photo, labels, mask)
    assert decision.matches and "describe the known pixels" in decision.reason


def test_decide_matching_labels_of_another_photo_does_not_match() -> None:
    photo, labels, mask = halves()
    decision = decide_matching(None, photo, np.roll(labels, (30, 40), (0, 1)), mask)
    assert not decision.matches and "may not describe" in decision.reason


def test_decide_matching_labels_true_under_the_mask_only_does_not_match() -> None:
    photo, labels, mask = halves()
    decision = decide_matching(None, photo, np.where(mask, labels, 0), mask)
    assert decision == (False, "hardly any border between classes outside the mask")


@pytest.mark.parametrize("requested", [True, False])
def test_decide_matching_requested_is_returned(requested: bool) -> None:
    assert decide_matching(requested, *halves()) == (requested, "asked for")


def test_border_contrast_hidden_pixels_have_no_influence() -> None:
    photo, labels, mask = halves()
    other_photo, other_labels = photo.copy(), labels.copy()
    other_photo[mask], other_labels[mask] = 255, 7
    assert border_contrast(photo, labels, mask) == border_contrast(other_photo, other_labels, mask)


def test_border_contrast_large_image_is_sampled() -> None:
    photo, labels, mask = (np.repeat(np.repeat(array, 9, 0), 9, 1) for array in halves())
    contrast, pairs = border_contrast(photo, labels, mask)
    assert contrast > 4 and pairs < 4000


def test_match_surroundings_reads_no_class_from_ids_outside_the_mask() -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    mask = np.zeros((64, 64), bool)
    mask[16:48, 16:48] = True
    results = []
    for other in (7, -994, 2**40):
        labels = np.full((64, 64), other, np.int64)
        labels[8:56, 8:56] = 1
        results.append(image.copy())
        match_surroundings(results[-1], labels, mask)
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])

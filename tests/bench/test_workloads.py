"""Workloads: sample photos and masks of stated sizes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from spmdeploy.assets.samples import SAMPLE_EDITS
from spmdeploy.bench.workloads import (
    MASK_RULE,
    MASK_SHARES,
    edit_batch,
    edit_case,
    masked_share,
    scaled_mask,
    write_case,
)
from spmdeploy.imaging.files import read_labels, read_photo
from spmdeploy.imaging.mask_files import read_mask
from spmdeploy.labels import check_labels, class_table

STREET = class_table("street")


@pytest.mark.parametrize("mask", MASK_SHARES)
@pytest.mark.parametrize("size", [64, 256, 700])
def test_edit_case_mask_covers_its_share(mask: str, size: int) -> None:
    for sample in SAMPLE_EDITS:
        case = edit_case(STREET, size, mask, sample)
        assert case.photo.shape == (size, size, 3) and case.labels.shape == case.mask.shape == (size, size)
        assert case.mask.mean() == pytest.approx(MASK_SHARES[mask], abs=2 / size)


def test_mask_rule_names_the_shares() -> None:
    for name, share in MASK_SHARES.items():
        assert f"{share:.0%} ({name})" in MASK_RULE


def test_edit_case_photo_is_a_cut_of_the_sample() -> None:
    photo, labels, mask = SAMPLE_EDITS[0].read(STREET)
    size = photo.shape[0]
    case = edit_case(STREET, size, "small")
    cuts = [photo[:, left : left + size] for left in range(photo.shape[1] - size + 1)]
    assert sum((cut == case.photo).all() for cut in cuts) == 1  # one cut of the photo, unchanged
    assert set(np.unique(case.labels)) <= set(np.unique(labels)) and mask.any()


def test_edit_case_other_table_has_its_classes() -> None:
    table = class_table("cityscapes")
    check_labels(edit_case(table, 128, "large").labels, table, "labels")


def test_edit_batch_repeats_samples() -> None:
    batch = edit_batch(STREET, 64, "medium", 5)
    assert batch.image.shape == (5, 64, 64, 3)
    assert [array.dtype.name for array in batch] == ["uint8", "uint8", "int32", "uint8"]
    assert (batch.image[0] == batch.image[3]).all() and (batch.image[0] != batch.image[1]).any()
    assert list(batch._asdict()) == ["image", "labels", "instances", "mask"]
    assert masked_share(batch) == pytest.approx(MASK_SHARES["medium"], abs=0.02)
    first = edit_batch(STREET, 64, "medium", 1)
    assert all((one[0] == five[0]).all() for one, five in zip(first, batch, strict=True))


def test_write_case_files_hold_the_case(tmp_path: Path) -> None:
    case = edit_case(STREET, 128, "large")
    files = write_case(case, tmp_path)
    assert files.labels is not None and files.mask is not None
    assert (read_labels(files.labels) == case.labels).all() and (read_mask(files.mask) == case.mask).all()
    difference = np.abs(read_photo(files.image).pixels.astype(int) - case.photo)
    assert difference.mean() < 4  # JPEG


@given(st.integers(0, 30), st.integers(0, 30), st.integers(2, 30), st.integers(2, 30), st.floats(0.05, 0.5))
@settings(max_examples=25, deadline=None)
def test_scaled_mask_any_box_covers_share(top: int, left: int, height: int, width: int, share: float) -> None:
    mask = np.zeros((40, 40), bool)
    mask[top : top + height, left : left + width] = True
    scaled = scaled_mask(mask, share)
    assert scaled.dtype == np.bool_ and scaled.shape == mask.shape
    rows, columns = (np.flatnonzero(scaled.any(axis=axis)) for axis in (1, 0))
    assert scaled.mean() == len(rows) * len(columns) / 1600  # still a box
    # The next larger box may have two rows and two columns more: it grows on both sides at once.
    next_larger = (len(rows) + 2) * (len(columns) + 2) / 1600 - scaled.mean()
    assert scaled.mean() == pytest.approx(share, abs=next_larger / 2)


def disc(radius: float, row: float, column: float) -> NDArray[np.bool_]:
    rows, columns = np.ogrid[:100, :100]
    return np.asarray((rows - row) ** 2 + (columns - column) ** 2 <= radius**2)


@pytest.mark.parametrize("share", MASK_SHARES.values())
def test_scaled_mask_disc_keeps_center(share: float) -> None:
    scaled = scaled_mask(disc(10, 50, 50), share)
    assert scaled.mean() == pytest.approx(share, abs=0.01)
    rows, columns = (np.flatnonzero(scaled.any(axis=axis)) for axis in (1, 0))
    radius = 100 * (share / np.pi) ** 0.5
    for places in (rows, columns):
        assert (places[0] + places[-1]) / 2 == pytest.approx(50, abs=1)
        assert (places[-1] - places[0] + 1) / 2 == pytest.approx(radius, abs=2)


def test_scaled_mask_at_border_moves_inside() -> None:
    scaled = scaled_mask(disc(8, 10, 90), 0.12)
    rows, columns = (np.flatnonzero(scaled.any(axis=axis)) for axis in (1, 0))
    assert rows[0] == 0 and columns[-1] == 99
    assert len(rows) == pytest.approx(len(columns), abs=1)


def test_scaled_mask_bar_at_both_borders_grows() -> None:
    bar = np.zeros((60, 60), bool)
    bar[29:31, 5:55] = True
    scaled = scaled_mask(bar, 0.3)
    assert scaled.mean() == pytest.approx(0.3, abs=0.02) and scaled[30].all()

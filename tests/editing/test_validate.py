"""The checks of the arrays of an edit."""

from __future__ import annotations

import numpy as np
import pytest

from spmdeploy.assets.samples import SAMPLE_EDITS
from spmdeploy.editing.validate import InputNames, check_layout
from spmdeploy.errors import InputError
from spmdeploy.labels import class_table

CLASSES = class_table("street")


def check(size: tuple[int, int], names: InputNames) -> None:
    image, mask = np.zeros((4, 6, 3), np.uint8), np.ones(size, np.bool_)
    check_layout(np.zeros((4, 6), np.uint8), mask, None, CLASSES, names, image)


def test_check_layout_mask_of_unturned_image_names_exif_orientation() -> None:
    with pytest.raises(InputError, match="turned as its EXIF orientation says") as caught:
        check((6, 4), InputNames(turned=True))
    assert caught.value.hint == "mask was drawn on the image as it is stored: turn it the same way"


@pytest.mark.parametrize(("size", "turned"), [((6, 4), False), ((6, 5), True)])
def test_check_layout_mask_of_other_size_suggests_resizing(size: tuple[int, int], turned: bool) -> None:
    with pytest.raises(InputError, match="the sizes must match") as caught:
        check(size, InputNames(turned=turned))
    assert caught.value.hint == "resize mask with nearest-neighbor"


def test_check_layout_sample_passes() -> None:
    _, labels, mask = SAMPLE_EDITS[0].read(CLASSES)[:3]
    assert check_layout(labels, mask, None, CLASSES, InputNames()).any()

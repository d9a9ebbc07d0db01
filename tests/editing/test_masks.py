"""Sources of masks, and dilation."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from spmdeploy.editing.masks import dilate


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 12),
    st.integers(1, 12),
    st.integers(0, 15),
    st.lists(st.tuples(st.integers(0, 11), st.integers(0, 11))),
)
def test_dilate_reaches_the_given_rows_and_columns(
    height: int, width: int, pixels: int, marked: list[tuple[int, int]]
) -> None:
    mask = np.zeros((height, width), bool)
    for row, column in marked:
        mask[row % height, column % width] = True
    expected = [
        [mask[max(y - pixels, 0) : y + pixels + 1, max(x - pixels, 0) : x + pixels + 1].any() for x in range(width)]
        for y in range(height)
    ]
    assert np.array_equal(dilate(mask, pixels), expected)

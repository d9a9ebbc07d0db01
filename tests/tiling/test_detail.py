"""The measure of a photo's finest detail."""

from __future__ import annotations

import numpy as np

from spmdeploy.tiling.pyramid import high_frequency_energy

EVERYWHERE = np.ones((20, 30), np.bool_)


def test_high_frequency_energy_checkerboard_counts_and_gradient_does_not() -> None:
    rows, columns = np.indices((20, 30))
    board = np.repeat((100 + 8 * ((rows + columns) % 2 * 2 - 1))[..., None], 3, 2).astype(np.uint8)
    total, count = high_frequency_energy(board, EVERYWHERE)
    assert total == 8 * count and count == 16 * 30 + 20 * 26
    slope = np.repeat((5 * rows + 3 * columns)[..., None], 3, 2).astype(np.uint8)
    assert high_frequency_energy(slope, EVERYWHERE) == (0, count)


def test_high_frequency_energy_only_known_pixels_count() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    known = EVERYWHERE.copy()
    known[:, 12:] = False
    assert high_frequency_energy(picture, known) == high_frequency_energy(picture[:, :12], EVERYWHERE[:, :12])
    assert high_frequency_energy(picture, ~EVERYWHERE) == (0, 0)

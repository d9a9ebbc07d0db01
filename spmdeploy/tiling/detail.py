"""How much detail a photo has at the limit of its resolution."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from spmdeploy.types import Mask


def high_frequency_energy(picture: NDArray[np.uint8], known: Mask) -> tuple[float, int]:
    """Sum and number of the finest detail at the known pixels, in gray levels.

    picture: (H, W, 3). known: bool (H, W). Detail is the absolute fourth difference, by rows and by columns, over 16:
    all of a checkerboard's amplitude, a quarter of it at twice the wavelength, and nothing of gradients. Only
    differences between known pixels count.
    """
    total, count = 0.0, 0
    for axis in (0, 1):
        pixels, inside = np.moveaxis(picture, axis, 0).astype(np.int16), np.moveaxis(known, axis, 0)
        middle = pixels[2:-2]
        difference = pixels[:-4] - 4 * pixels[1:-3] + 6 * middle - 4 * pixels[3:-1] + pixels[4:]
        whole = inside[:-4] & inside[1:-3] & inside[2:-2] & inside[3:-1] & inside[4:]
        total += float(np.abs(difference)[whole].mean(axis=-1, dtype=np.float64).sum() / 16)
        count += int(whole.sum())
    return total, count

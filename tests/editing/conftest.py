"""Photos, labels and masks for the tests of batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Photos a.png, b.png, c.png of 40x30, with labels.png (road) and mask.png, and a folder `out`."""
    noise = np.random.default_rng(3)
    for name in "abc":
        save(tmp_path / f"{name}.png", noise.integers(0, 256, (30, 40, 3), np.uint8))
    save(tmp_path / "labels.png", np.full((30, 40), 3, np.uint8))
    mask = np.zeros((30, 40), np.uint8)
    mask[5:15, 10:30] = 255
    save(tmp_path / "mask.png", mask)
    (tmp_path / "out").mkdir()
    return tmp_path


def save(path: Path, pixels: NDArray[Any]) -> Path:
    Image.fromarray(pixels).save(path)
    return path

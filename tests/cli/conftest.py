"""Fixtures of the tests of the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spmdeploy import cli
from tests.cli.harness import EditFiles, Result, save
from tests.toy_dataset import _one_thread, data_folder, tiny  # noqa: F401


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Any:
    def run(*args: object) -> Result:
        capfd.readouterr()
        code = cli.main([str(arg) for arg in args])
        return Result(code, *capfd.readouterr())

    return run


@pytest.fixture
def files(tmp_path: Path, street_bundle: Path) -> EditFiles:
    noise = np.random.default_rng(1)
    save(tmp_path / "photo.png", noise.integers(0, 256, (280, 300, 3), np.uint8))
    save(tmp_path / "labels.png", np.full((280, 300), 3, np.uint8))
    mask = np.zeros((280, 300), np.uint8)
    mask[100:140, 200:260] = 255
    save(tmp_path / "mask.png", mask)
    names = ("photo.png", "labels.png", "mask.png", "edited.png")
    return EditFiles(*(tmp_path / name for name in names), street_bundle)

"""The files of a small edit, for tests of requests and of edits from files."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from spmdeploy.editing.options import EditOptions, EditRequest


def save(path: Path, pixels: NDArray[Any], **options: Any) -> Path:
    Image.fromarray(pixels).save(path, **options)
    return path


def small_edit(tmp_path: Path) -> EditRequest:
    photo = np.random.default_rng(5).integers(0, 256, (20, 30, 3), np.uint8)
    mask = np.zeros((20, 30), np.uint8)
    mask[5:10, 5:15] = 255
    return EditRequest(
        image=save(tmp_path / "photo.png", photo),
        output=tmp_path / "edited.png",
        labels=save(tmp_path / "labels.png", np.full((20, 30), 3, np.uint8)),
        mask=save(tmp_path / "mask.png", mask),
    )


def changed(files: EditRequest, **changes: Any) -> EditRequest:
    """Changes of the request, and of its options by their own names."""
    names = {one.name for one in dataclasses.fields(EditOptions)}
    options = {name: changes.pop(name) for name in names & set(changes)}
    return dataclasses.replace(files, **changes, options=dataclasses.replace(files.options, **options))

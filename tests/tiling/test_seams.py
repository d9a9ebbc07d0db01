"""Seam scores of the built-in model for masks that show the borders of tiles (images: docs/large-images.md)."""

from __future__ import annotations

import numpy as np
import pytest

import spmdeploy
from spmdeploy.assets.samples import SAMPLE_EDITS
from spmdeploy.editing.editor import Editor
from spmdeploy.editing.report import SEAM_SCORE_LIMIT

LAST_LEVEL_AT_MOST = 1.5
"""Gray levels. Tiles side by side without blending have 2. Measured: -0.5 to 0.0 here, -0.4 to 0.7 for the like at
960×720."""
MASKS = ("long thin", "frame", "all but a corner", "gradient sky", "night street")


def case(name: str, photo: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Photo, labels and mask, of the size of the sample: 480×360."""
    height, width = labels.shape
    mask = np.zeros((height, width), bool)
    if name == "long thin":
        mask[190:202, 20:460] = True
    elif name == "frame":
        mask[30:330, 30:450] = True
        mask[60:300, 60:420] = False
    elif name == "all but a corner":
        mask[:] = True
        mask[-90:, -120:] = False
    else:
        mask[50:310, 60:420] = True
    if name == "gradient sky":
        down = np.linspace(0, 1, height)[:, None, None]
        photo = np.rint(np.broadcast_to((150, 180, 215) + down * (60, 40, 20), photo.shape)).astype(np.uint8)
        labels = np.zeros_like(labels)
    elif name == "night street":
        photo = photo // 4
    return photo, labels, mask


@pytest.fixture(scope="module")
def editor() -> Editor:
    pytest.importorskip("torch")
    return spmdeploy.open_editor(backend="torch")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in MASKS[2:] else []) for name in MASKS]
)
def test_seam_score_of_builtin_model_is_below_the_limit(name: str, editor: Editor) -> None:
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # under a load, threads that wait for each other take ten times as long
    try:
        photo, labels, mask = case(name, *SAMPLE_EDITS[0].read(editor.classes)[:2])
        report = editor.edit(photo, labels, mask, tiling="cascade").report
    finally:
        torch.set_num_threads(threads)
    (window,) = report.windows
    last = window.levels[-1]
    assert last.tiles >= 3 and last.seam_score is not None
    assert last.seam_score <= LAST_LEVEL_AT_MOST < SEAM_SCORE_LIMIT
    assert not any("borders of tiles" in note for note in report.notes)

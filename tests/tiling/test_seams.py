"""Seam scores: as defined, and of the built-in model for masks that show tile borders (docs/large-images.md)."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import spmdeploy
from spmdeploy.assets.samples import SAMPLE_EDITS
from spmdeploy.editing.editor import Editor
from spmdeploy.editing.report import SEAM_SCORE_LIMIT
from spmdeploy.tiling.seams import border_lines, seam_score

quick = settings(max_examples=60, deadline=None)

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


def test_border_lines_are_at_starts_ends_and_middles_of_overlaps() -> None:
    assert border_lines((10, 60, 110), 80) == {50, 80, 65, 100, 130, 115}
    assert border_lines((10,), 80) == frozenset()


@quick
@given(st.integers(0, 2**32 - 1), st.integers(2, 40), st.integers(2, 40))
def test_seam_score_equals_plain_loops(seed: int, height: int, width: int) -> None:
    rng = np.random.default_rng(seed)
    image, mask = rng.integers(0, 256, (height, width, 3), np.uint8), rng.random((height, width)) < 0.8
    rows, columns = frozenset(rng.integers(1, height, 2).tolist()), frozenset(rng.integers(1, width, 2).tolist())
    found: dict[tuple[str, bool], list[float]] = {}
    for y, x in np.ndindex(height, width):
        for axis, (v, u), line in (("down", (y - 1, x), y in rows), ("right", (y, x - 1), x in columns)):
            if v >= 0 and u >= 0 and mask[y, x] and mask[v, u]:
                step = float(np.abs(image[y, x].astype(int) - image[v, u]).mean())
                found.setdefault((axis, line), []).append(step)
    across = [
        (np.mean(found[axis, True]) - np.mean(found[axis, False]), len(found[axis, True]))
        for axis in ("down", "right")
        if (axis, True) in found and (axis, False) in found
    ]
    score = seam_score(image, mask, rows, columns)
    if across:
        assert score == pytest.approx(sum(e * n for e, n in across) / sum(n for _, n in across), abs=1e-4)
    else:
        assert score is None


def test_seam_score_gradient_is_zero_and_step_is_positive() -> None:
    gradient = np.repeat(np.linspace(0, 200, 600, dtype=np.float32)[None, :, None], 400, axis=0).repeat(3, axis=2)
    mask = np.ones(gradient.shape[:2], bool)
    assert seam_score(gradient, mask, frozenset({100}), frozenset({300})) == pytest.approx(0, abs=1e-4)
    gradient[:, 300:] += 6
    assert seam_score(gradient, mask, frozenset(), frozenset({300})) == pytest.approx(6, abs=1e-3)


def test_seam_score_known_pixels_do_not_count() -> None:
    image = np.zeros((50, 50, 3), np.uint8)
    image[:, 25:] = 99
    mask = np.zeros((50, 50), bool)
    mask[:, :25] = True
    assert seam_score(image, mask, frozenset(), frozenset({25})) is None
    assert seam_score(image, mask, frozenset(), frozenset({10, 25})) == 0

"""Windows and tiles drawn over the photo."""

from __future__ import annotations

import numpy as np

from spmdeploy.editing.overlay import explain_sheet
from spmdeploy.editing.plan import PlannedWindow
from spmdeploy.editing.report import WindowReport
from spmdeploy.tiling.letterbox import fit_letterbox
from spmdeploy.tiling.pyramid import plan_pyramid
from spmdeploy.tiling.windows import plan_windows


def test_explain_sheet_shows_windows_and_tiles_of_every_level() -> None:
    mask = np.zeros((900, 1300), bool)
    mask[200:700, 300:800] = mask[100, 1200] = True
    small, large = sorted(plan_windows(mask), key=lambda site: site.window.width)
    levels = plan_pyramid(large.window, large.mask_of(mask))
    windows = [
        WindowReport(PlannedWindow(small, fit_letterbox(small.window))),
        WindowReport(PlannedWindow(large, fit_letterbox(large.window), levels)),
    ]
    photo = np.zeros((900, 1300, 3), np.uint8)
    image = explain_sheet(photo, mask, windows)
    at_once, refined, tile = (255, 190, 0), (255, 255, 255), (0, 200, 255)
    assert [len(window.plan.levels) for window in windows] == [0, 2]
    for color in (at_once, refined, tile):
        assert (image == color).all(axis=2).any(), color
    alone = explain_sheet(photo, mask, windows[:1])
    assert alone.shape[0] < image.shape[0] and alone.shape[1] < image.shape[1]


def test_explain_sheet_photo_of_two_pixels_is_drawn() -> None:
    mask = np.array([[True, False]])
    windows = [WindowReport(PlannedWindow(site, fit_letterbox(site.window))) for site in plan_windows(mask)]
    assert explain_sheet(np.zeros((1, 2, 3), np.uint8), mask, windows).ndim == 3

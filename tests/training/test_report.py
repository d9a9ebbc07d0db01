from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from spmdeploy.errors import InputError
from spmdeploy.training.report import write_report
from spmdeploy.training.run_dir import RunDirectory


def test_write_report_has_curves_and_the_last_sheets(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    (run.path / "samples").mkdir(parents=True)
    for images in (4, 8, 12):
        Image.fromarray(np.full((2, 2, 3), images, np.uint8)).save(run.sample_sheet(images))
        state = {"images": images, "phase": 0, "phase_images": images, "seconds": images / 2}
        run.log(kind="train", **state, l1=1 / images, style=float("nan") if images == 8 else 0.5)
        run.log(kind="validation", **state, lpips=0.4)
    page = write_report(run.path).read_text()
    for name in ("train: l1 = 0.08333", "train: style = 0.5", "validation: lpips = 0.4", "samples per second = 2"):
        assert name in page
    assert page.count("data:image/png;base64,") == 2
    assert "after 12 samples" in page and "after 4 samples" not in page
    assert "nan" not in page.replace("finance", "")


def test_write_report_without_metrics_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no metrics to plot"):
        write_report(tmp_path)

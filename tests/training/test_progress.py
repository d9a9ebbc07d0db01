from __future__ import annotations

from spmdeploy.training.config import TrainConfig
from spmdeploy.training.progress import progress_line


def test_a_line_says_how_far_and_how_long(tiny: TrainConfig) -> None:
    record = {"kind": "train", "images": 6, "phase": 1, "phase_images": 2, "seconds": 4.0, "l1": 0.25}
    line = progress_line(record, tiny)
    assert line.startswith("stage 2 ████████████············  50% 0.5 images/s, 0:00:04 left")
    assert line.endswith("train: l1 0.250")


def test_the_first_record_has_no_speed(tiny: TrainConfig) -> None:
    record = {"kind": "train", "images": 0, "phase": 0, "phase_images": 0, "seconds": 0.0}
    assert "? left" in progress_line(record, tiny)

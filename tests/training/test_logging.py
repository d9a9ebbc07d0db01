from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from spmdeploy.errors import UnavailableError
from spmdeploy.training.config import TrainConfig
from spmdeploy.training.logging import open_tensorboard, progress_line, write_record


class Recorder:
    def __init__(self) -> None:
        self.written: list[tuple[str, float, int]] = []

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.written.append((tag, value, step))


def test_write_record_metrics_are_written_over_images() -> None:
    writer = Recorder()
    record = {
        "kind": "train",
        "images": 40,
        "phase": 0,
        "phase_images": 4,
        "seconds": 1.5,
        "l1": 0.5,
        "adversarial": -1.0,
    }
    write_record(writer, record)
    assert writer.written == [("train/l1", 0.5, 40), ("train/adversarial", -1.0, 40)]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_open_tensorboard_writes_events_or_names_the_package(tmp_path: Path) -> None:
    if importlib.util.find_spec("tensorboard") is None:
        with pytest.raises(UnavailableError, match="not installed"):
            open_tensorboard(tmp_path, 0)
        return
    writer = open_tensorboard(tmp_path, 0)
    write_record(writer, {"kind": "train", "images": 1, "l1": 0.5})
    writer.close()  # type: ignore[attr-defined]
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"train/l1" in events.read_bytes()


def test_progress_line_has_speed_and_remaining_time(tiny: TrainConfig) -> None:
    record = {"kind": "train", "images": 6, "phase": 1, "phase_images": 2, "seconds": 4.0, "l1": 0.25}
    line = progress_line(record, tiny)
    assert line.startswith("stage 2 ████████████············  50% 0.5 images/s, 0:00:04 left")
    assert line.endswith("train: l1 0.250")


def test_progress_line_without_seconds_has_no_remaining_time(tiny: TrainConfig) -> None:
    record = {"kind": "train", "images": 0, "phase": 0, "phase_images": 0, "seconds": 0.0}
    assert "? left" in progress_line(record, tiny)

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from spmdeploy.errors import UnavailableError
from spmdeploy.training.board import open_board, write_record


class Recorder:
    def __init__(self) -> None:
        self.written: list[tuple[str, float, int]] = []

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.written.append((tag, value, step))


def test_figures_are_written_over_images() -> None:
    board = Recorder()
    record = {
        "kind": "train",
        "images": 40,
        "phase": 0,
        "phase_images": 4,
        "seconds": 1.5,
        "l1": 0.5,
        "adversarial": -1.0,
    }
    write_record(board, record)
    assert board.written == [("train/l1", 0.5, 40), ("train/adversarial", -1.0, 40)]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_events_or_a_clear_refusal(tmp_path: Path) -> None:
    if importlib.util.find_spec("tensorboard") is None:
        with pytest.raises(UnavailableError, match="not installed"):
            open_board(tmp_path, 0)
        return
    board = open_board(tmp_path, 0)
    write_record(board, {"kind": "train", "images": 1, "l1": 0.5})
    board.close()  # type: ignore[attr-defined]
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"train/l1" in events.read_bytes()

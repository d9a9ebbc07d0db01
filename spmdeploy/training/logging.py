"""Logging of a run: the progress line for a terminal, and TensorBoard."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from spmdeploy.errors import UnavailableError
from spmdeploy.training.config import TrainConfig

POSITION = ("kind", "images", "phase", "phase_images", "seconds")
"""Fields of a record that say which step it belongs to; the others are metrics."""
BAR = 24
"""Characters of the progress bar."""


def progress_line(record: dict[str, Any], config: TrainConfig) -> str:
    """Formats a record of the metrics: the phase's progress bar, images per second, time left in it, and the metrics.

    The time left is that of the phase: phases differ too much in speed to predict those that have not begun.
    """
    phase = config.schedule[record["phase"]]
    done = min(1.0, record["phase_images"] / phase.images)
    bar = "█" * round(done * BAR) + "·" * (BAR - round(done * BAR))
    stages = "+".join(str(stage + 1) for stage in phase.stages)
    speed = record["phase_images"] / record["seconds"] if record["seconds"] else 0.0
    left = _duration((phase.images - record["phase_images"]) / speed) if speed else "?"
    metrics = " ".join(f"{name} {value:.3f}" for name, value in record.items() if name not in POSITION)
    return f"stage {stages} {bar} {done:4.0%} {speed:.1f} images/s, {left} left, {record['kind']}: {metrics}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"


class ScalarWriter(Protocol):
    """The method of TensorBoard's writer that is used."""

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        """Records one value under the name `tag` at `step`."""


def open_tensorboard(run: Path, images: int) -> ScalarWriter:
    """Opens RUN/tensorboard to continue after `images` samples; later records of an earlier process are hidden.

    Raises:
        UnavailableError: The package tensorboard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as exc:
        raise UnavailableError(
            "tensorboard is true in the configuration, but the package is not installed", "pip install tensorboard"
        ) from exc
    writer: ScalarWriter = SummaryWriter(str(run / "tensorboard"), purge_step=images + 1)
    return writer


def write_record(writer: ScalarWriter, record: dict[str, Any]) -> None:
    """Writes a record of the metrics: each as KIND/NAME over the samples of the run."""
    for name, value in record.items():
        if name not in POSITION:
            writer.add_scalar(f"{record['kind']}/{name}", value, record["images"])

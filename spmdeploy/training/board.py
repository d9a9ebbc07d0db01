"""The metrics of a run as TensorBoard reads them: RUN/tensorboard."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from spmdeploy.errors import UnavailableError

POSITION = ("kind", "images", "phase", "phase_images", "seconds")
"""Fields of a record that say where it belongs; the others are figures."""


class ScalarWriter(Protocol):
    """The one method of TensorBoard's writer that is needed."""

    def add_scalar(self, tag: str, value: float, step: int) -> None: ...


def open_board(run: Path, images: int) -> ScalarWriter:
    """A writer that goes on after `images` samples; what an earlier process wrote beyond is hidden by TensorBoard.

    Raises UnavailableError when the package tensorboard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UnavailableError(
            "tensorboard is true in the configuration, but the package is not installed", "pip install tensorboard"
        ) from error
    writer: ScalarWriter = SummaryWriter(str(run / "tensorboard"), purge_step=images + 1)
    return writer


def write_record(board: ScalarWriter, record: dict[str, Any]) -> None:
    """A record of the metrics: each figure as KIND/NAME over the samples of the run."""
    for name, value in record.items():
        if name not in POSITION:
            board.add_scalar(f"{record['kind']}/{name}", value, record["images"])

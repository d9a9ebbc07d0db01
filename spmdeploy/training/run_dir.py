"""The run directory: configuration, metrics, checkpoints and exports, replaced atomically.

RUN/config.json          the configuration, as given
RUN/metrics.jsonl        one JSON object per line: training and validation metrics
RUN/checkpoint.pt        everything needed to resume
RUN/tensorboard/         the metrics for TensorBoard, with `tensorboard`
RUN/samples/*.png        sample sheets
RUN/export/              averaged weights of the last checkpoint: generator.safetensors and .json
RUN/best/                the same for the lowest validation LPIPS
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from filelock import FileLock, Timeout

from spmdeploy.errors import InputError, UsageError
from spmdeploy.files import atomic_write, os_errors
from spmdeploy.model.checkpoint import load_pickle, save_generator
from spmdeploy.model.generator import Generator
from spmdeploy.training.config import TrainConfig, read_config, to_json

CHECKPOINT_SCHEMA = "spmdeploy.checkpoint/1"
CHECKPOINT_PARTS = {
    "progress": dict,
    "generator": dict,
    "averaged": dict,
    "discriminators": dict,
    "generator_optimizer": dict,
    "discriminator_optimizer": dict,
    "random": torch.Tensor,
}
CHECKPOINT_HINT = "start a new run with start_weights set to RUN/export/generator.safetensors of this one"


class RunDirectory:
    """Paths and atomic writes of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._config = path / "config.json"
        self._metrics = path / "metrics.jsonl"
        self._job = path / ".job"
        self.checkpoint = path / "checkpoint.pt"

    @property
    def has_begun(self) -> bool:
        """Whether it holds a run."""
        return self._config.exists()

    def belongs_to(self, job: str | None) -> bool:
        """Whether it holds a run that was begun by this job of torchrun."""
        return self.has_begun and self._job.exists() and self._job.read_text(encoding="utf-8") == job

    def start(self, config: TrainConfig, job: str | None = None) -> None:
        """Begins a run.

        Args:
            config: What to train.
            job: The name of torchrun's job, which continues the run after a restart.

        Raises:
            UsageError: The folder holds one already.
        """
        if self._config.exists():
            raise UsageError(f"{self.path} already holds a run", "continue it with --resume, or choose another folder")
        self.path.mkdir(parents=True, exist_ok=True)
        if job is not None:
            self._job.write_text(job, encoding="utf-8")
        with atomic_write(self._config) as stream:
            stream.write((json.dumps(to_json(config), indent=1) + "\n").encode())

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keeps other processes from training here until this one ends.

        Workers outlive a killed launcher: without the lock, a second run would write into the same folder.

        Raises:
            UsageError: Another process trains in this folder.
        """
        lock = FileLock(self.path / ".lock", blocking=False)
        try:
            lock.acquire()
        except Timeout as exc:
            problem = f"another process is training in {self.path}"
            raise UsageError(problem, "wait for its end or end it; workers outlive a killed torchrun") from exc
        try:
            yield
        finally:
            lock.release()

    def config(self) -> TrainConfig:
        """The run's configuration.

        Raises:
            InputError: There is none.
        """
        if not self._config.exists():
            raise InputError(f"{self._config}: no run to resume", "start one without --resume")
        return read_config(self._config)

    def sample_sheet(self, images: int) -> Path:
        """The path of the sample sheet after `images` samples; its folder exists."""
        folder = self.path / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{images:08d}.png"

    def log(self, **fields: Any) -> None:
        """Appends a record to the metrics."""
        with os_errors(self._metrics, "write"), self._metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(fields) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """The complete records; a killed process may leave the last one incomplete."""
        if not self._metrics.exists():
            return []
        lines = []
        for line in self._metrics.read_text(encoding="utf-8").splitlines():
            try:
                lines.append(json.loads(line))
            except ValueError:
                break
        return lines

    def drop_metrics_after(self, images: int) -> None:
        """Drops the records after the last checkpoint, since those steps are repeated."""
        kept = "".join(json.dumps(line) + "\n" for line in self.metrics() if line["images"] <= images)
        with atomic_write(self._metrics) as stream:
            stream.write(kept.encode())

    @property
    def has_best(self) -> bool:
        """Whether a validation has exported weights to RUN/best."""
        return (self.path / "best" / "generator.safetensors").exists()

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        """Replaces the checkpoint."""
        with atomic_write(self.checkpoint) as stream:
            _save({"schema": CHECKPOINT_SCHEMA, **state}, stream)

    def load_checkpoint(self) -> dict[str, Any] | None:
        """Reads the last checkpoint and checks the types of its parts; None when there is none yet.

        Raises:
            InputError: Names the file and the part.
        """
        if not self.checkpoint.exists():
            return None
        state = load_pickle(self.checkpoint, CHECKPOINT_HINT)
        if not isinstance(state, dict) or state.get("schema") != CHECKPOINT_SCHEMA:
            raise InputError(f"{self.checkpoint}: not a checkpoint of this program", f"expected {CHECKPOINT_SCHEMA}")
        for name, kind in CHECKPOINT_PARTS.items():
            if not isinstance(state.get(name), kind):
                found = type(state[name]).__name__ if name in state else "missing"
                raise InputError(f"{self.checkpoint}: {name} is {found}, expected {kind.__name__}", CHECKPOINT_HINT)
        return state

    def export(self, generator: Generator, folder: str) -> Path:
        """Writes the generator as RUN/`folder`/generator.safetensors with its .json; returns the path."""
        target = self.path / folder / "generator.safetensors"
        target.parent.mkdir(exist_ok=True)
        staging = target.with_name("incoming.safetensors")
        save_generator(generator, staging)
        os.replace(staging.with_suffix(".json"), target.with_suffix(".json"))
        os.replace(staging, target)
        return target


class _ErrorKeeper:
    """A stream that keeps the OSError of a failed write, which torch.save replaces by an error without the cause."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.error: OSError | None = None

    def write(self, content: Any) -> int:
        try:
            return self._stream.write(content)
        except OSError as exc:
            self.error = exc
            raise

    def flush(self) -> None:
        self._stream.flush()


def _save(state: dict[str, Any], stream: BinaryIO) -> None:
    keeper = _ErrorKeeper(stream)
    try:
        torch.save(state, keeper)  # type: ignore[arg-type]
    except RuntimeError as exc:
        if keeper.error is None:
            raise
        raise keeper.error from exc

"""The run directory: configuration, metrics, checkpoints and exports; a kill at any moment is harmless.

RUN/config.json          the configuration, as given
RUN/metrics.jsonl        one JSON object per line: training and validation figures
RUN/checkpoint.pt        everything needed to go on, replaced atomically
RUN/tensorboard/         the same for TensorBoard, when asked for
RUN/samples/*.png        sample sheets
RUN/export/              averaged weights of the last checkpoint: generator.safetensors and .json
RUN/best/                the same for the lowest validation figure
"""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from filelock import FileLock, Timeout

from spmdeploy.errors import InputError, UsageError
from spmdeploy.files import atomic_write
from spmdeploy.model.checkpoint import save_generator
from spmdeploy.model.generator import Generator
from spmdeploy.training.config import TrainConfig, read_config, to_json

CHECKPOINT_SCHEMA = "spmdeploy.checkpoint/1"


class RunDirectory:
    """Paths and atomic writes of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._config = path / "config.json"
        self._metrics = path / "metrics.jsonl"
        self.checkpoint = path / "checkpoint.pt"

    def start(self, config: TrainConfig) -> None:
        """Begins a run. Raises UsageError when the folder already holds one."""
        if self._config.exists():
            raise UsageError(f"{self.path} already holds a run", "continue it with --resume, or choose another folder")
        (self.path / "samples").mkdir(parents=True, exist_ok=True)
        with atomic_write(self._config) as stream:
            stream.write((json.dumps(to_json(config), indent=1) + "\n").encode())

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keeps all other processes from training here, until this one ends in whatever way.

        A launcher that is killed leaves its workers behind: a second run beside them would mix two into one folder.
        Raises UsageError when somebody is there already.
        """
        lock = FileLock(self.path / ".lock", blocking=False)
        try:
            lock.acquire()
        except Timeout as error:
            problem = f"another process is training in {self.path}"
            raise UsageError(problem, "wait for its end or end it; workers outlive a killed torchrun") from error
        try:
            yield
        finally:
            lock.release()

    def config(self) -> TrainConfig:
        """The run's configuration. Raises InputError when there is none."""
        if not self._config.exists():
            raise InputError(f"{self._config}: no run to resume", "start one without --resume")
        return read_config(self._config)

    def sample_sheet(self, images: int) -> Path:
        """Where the sample sheet after so many images goes."""
        return self.path / "samples" / f"{images:08d}.png"

    # -- metrics

    def log(self, **fields: Any) -> None:
        with self._metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(fields) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """All complete lines; the last one may have been cut by a kill."""
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
        """Forgets what was logged between the last checkpoint and the kill: those steps run again."""
        kept = "".join(json.dumps(line) + "\n" for line in self.metrics() if line["images"] <= images)
        with atomic_write(self._metrics) as stream:
            stream.write(kept.encode())

    # -- checkpoints

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        with atomic_write(self.checkpoint) as stream:
            _save({"schema": CHECKPOINT_SCHEMA, **state}, stream)

    def load_checkpoint(self) -> dict[str, Any] | None:
        """The last checkpoint, None when the run was ended before its first. Raises InputError naming the file."""
        if not self.checkpoint.exists():
            return None
        try:
            state = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise InputError(f"{self.checkpoint}: not readable: {' '.join(str(error).split())[:300]}") from error
        if not isinstance(state, dict) or state.get("schema") != CHECKPOINT_SCHEMA:
            raise InputError(f"{self.checkpoint}: not a checkpoint of this program", f"expected {CHECKPOINT_SCHEMA}")
        return state

    def export(self, generator: Generator, folder: str) -> Path:
        """Writes the generator as RUN/`folder`/generator.safetensors with its .json."""
        target = self.path / folder / "generator.safetensors"
        target.parent.mkdir(exist_ok=True)
        staging = target.with_name("incoming.safetensors")
        save_generator(generator, staging)
        os.replace(staging.with_suffix(".json"), target.with_suffix(".json"))
        os.replace(staging, target)
        return target


class _ErrorKeeper:
    """A stream for torch.save, which replaces an OSError of the stream by an error that does not name the cause."""

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

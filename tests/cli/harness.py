"""Runs the command line in this process or in another one, on the files of a small edit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image


class Result(NamedTuple):
    """Exit code, stdout and stderr of a command."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The one JSON object that is all of stdout."""
        lines = self.out.splitlines()
        assert len(lines) == 1, self.out
        value = json.loads(lines[0])
        assert value["schema"].startswith("spmdeploy.") and value["schema"].endswith("/1")
        return dict(value)


class EditFiles(NamedTuple):
    """The files of a small edit: a noisy photo of 300x280, the labels of a road, a mask of 60x40 with its box."""

    photo: Path
    labels: Path
    mask: Path
    output: Path
    model: Path

    def args(self, **changes: object) -> list[str]:
        """The arguments of `spmdeploy edit`. changes: options by name; None leaves one out, True is a flag."""
        options: dict[str, object] = {
            "labels": self.labels,
            "mask": self.mask,
            "output": self.output,
            "model": self.model,
        } | changes
        args = ["edit", str(options.pop("image", self.photo))]
        for name, value in options.items():
            if value is not None:
                args += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
        return args


def save(path: Path, pixels: NDArray[Any], **options: Any) -> Path:
    Image.fromarray(pixels).save(path, **options)
    return path


def pixels(path: Path) -> NDArray[np.uint8]:
    with Image.open(path) as image:
        return np.asarray(image)


def is_edited(path: Path) -> NDArray[np.bool_]:
    return pixels(path) != 0


def process(*args: object, driver: str = "import spmdeploy.cli; spmdeploy.cli.entry()", **options: Any) -> Result:
    command = [sys.executable, "-c", driver, *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, errors="surrogateescape", check=False, **options)
    return Result(done.returncode, done.stdout, done.stderr)

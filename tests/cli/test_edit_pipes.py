"""Pipes as inputs and outputs of the command `edit`."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import spmdeploy
from spmdeploy import cli
from spmdeploy.assets.samples import SAMPLE_EDITS

SAMPLE = SAMPLE_EDITS[0]


def piped(*arguments: object, content: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    command = ["edit", *map(str, arguments), "--device", "cpu", "--no-match-surroundings"]
    environment = os.environ | {"PYTHONPATH": str(Path(spmdeploy.__file__).parents[1])}
    return subprocess.run(
        [sys.executable, "-m", "spmdeploy", *command], input=content, capture_output=True, env=environment, check=False
    )


@pytest.mark.skipif(sys.platform == "win32", reason="needs /dev/stdin")
@pytest.mark.parametrize(("kind", "path"), [("photo", "-"), ("mask", "-"), ("labels", "/dev/stdin")])
def test_edit_file_from_standard_input_gives_the_bytes_of_the_file(kind: str, path: str, tmp_path: Path) -> None:
    files: dict[str, Path | str] = {"photo": SAMPLE.photo, "mask": SAMPLE.mask, "labels": SAMPLE.labels}
    content = Path(files[kind]).read_bytes()
    outputs = []
    for name, given in (("file", files), ("pipe", files | {kind: path})):
        output = tmp_path / f"{name}.png"
        done = piped(
            given["photo"], "--labels", given["labels"], "--mask", given["mask"], "-o", output, content=content
        )
        assert done.returncode == 0, done.stderr
        outputs.append(output.read_bytes())
    assert outputs[0] == outputs[1]


def test_edit_output_to_standard_output_is_a_png_alone(tmp_path: Path) -> None:
    arguments = (SAMPLE.photo, "--labels", SAMPLE.labels, "--mask", SAMPLE.mask)
    done = piped(*arguments, "--output", "-")
    assert done.returncode == 0 and b"pixels in 1 window" in done.stderr
    assert piped(*arguments, "--output", tmp_path / "o.png").returncode == 0
    with Image.open(io.BytesIO(done.stdout)) as printed, Image.open(tmp_path / "o.png") as stored:
        assert printed.format == "PNG" and np.array_equal(np.asarray(printed), np.asarray(stored))


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("-", "--mask", "-", "--fill", "road", "--output", "o.png"), "standard input is given for more than one file"),
        (("a.png", "--mask", "m.png", "--fill", "road", "--output", "-"), "both write to standard output"),
    ],
)
def test_edit_streams_that_collide_are_refused(arguments: tuple[str, ...], problem: str, capfd: Any) -> None:
    assert cli.main(["edit", *arguments, "--json"]) == 2
    assert problem in json.loads(capfd.readouterr().out)["error"]

"""Every input that a user names is opened through `spmdeploy.inputs`, so that no named pipe or device can block."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import spmdeploy
from spmdeploy.assets.samples import SAMPLE_EDITS

PACKAGE = Path(spmdeploy.__file__).parent

OWN_FILES = {
    # Files of the system, and of ours inside bundles, caches, run folders or the package, whose kind is checked where
    # they are listed.
    "assets",
    "backends/graph_cache.py",
    "backends/onnxruntime_profile.py",
    "backends/openvino_graph.py",
    "backends/select_cpu.py",
    "backends/select_engine.py",
    "backends/threads.py",
    "bench/machine.py",
    "bench/backend_process.py",
    "bundle/bundle.py",
    "cli/app.py",
    "cli/bundle.py",
    "editing/ray_batch.py",
    "editing/ray_worker.py",
    "editing/status.py",
    "bundle/storage.py",
    "bundle/writer.py",
    "engines/build.py",
    "engines/builder.py",
    "engines/kernel_cache.py",
    "engines/pack.py",
    "engines/store.py",
    "engines/writer.py",
    "export/external_data.py",
    "export/triton.py",
    "files.py",
    "gpu/device.py",
    "gpu/driver.py",
    "inputs.py",
    "training/report.py",
    "training/run_dir.py",
}


def unchecked_reads(source: str) -> Iterator[int]:
    """The lines that open a path for reading without `regular_file` around it."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        called = node.func
        if isinstance(called, ast.Name) and called.id == "open":
            path: ast.expr | None = node.args[0]
        elif isinstance(called, ast.Attribute) and called.attr in ("read_bytes", "read_text"):
            path = called.value
            if isinstance(path, ast.Name) and path.id in ("inputs", "images"):
                continue
        elif ast.unparse(called) in ("torch.load", "load_file", "safe_open", "np.load", "onnx.load", "os.open"):
            path = node.args[0]
        else:
            continue
        mode = next((arg.value for arg in node.args[1:2] if isinstance(arg, ast.Constant)), "r")
        if any(letter in str(mode) for letter in "wax"):
            continue
        checked = isinstance(path, ast.Call) and ast.unparse(path.func) == "regular_file"
        if not checked:
            yield node.lineno


def test_unchecked_reads_finds_each_way_to_open_a_file() -> None:
    source = (
        "open(p)\np.read_bytes()\ntorch.load(p)\nopen(p, 'w')\nregular_file(p).read_text()\nload_file(regular_file(p))"
    )
    assert list(unchecked_reads(source)) == [1, 2, 3]


def test_package_opens_named_inputs_in_one_place() -> None:
    found = {
        f"{file.relative_to(PACKAGE).as_posix()}:{line}"
        for file in PACKAGE.rglob("*.py")
        if not any(file.relative_to(PACKAGE).as_posix().startswith(own) for own in OWN_FILES)
        for line in unchecked_reads(file.read_text(encoding="utf-8"))
    }
    assert found == set()


SAMPLE = SAMPLE_EDITS[0]
COMMANDS = [
    f"edit PIPE --labels {SAMPLE.labels} --mask {SAMPLE.mask} --output o.png",
    f"edit {SAMPLE.photo} --labels PIPE --mask {SAMPLE.mask} --output o.png",
    f"edit {SAMPLE.photo} --labels {SAMPLE.labels} --mask PIPE --output o.png",
    f"edit {SAMPLE.photo} --labels {SAMPLE.labels} --mask {SAMPLE.mask} --instances PIPE --output o.png",
    f"edit {SAMPLE.photo} --labels {SAMPLE.labels} --mask {SAMPLE.mask} --model PIPE --output o.png",
    f"edit {SAMPLE.photo} --labels {SAMPLE.labels} --edited-from PIPE --output o.png",
    "batch PIPE --output-dir out",
    "batch /dev/zero --output-dir out",
    "inspect PIPE",
    "verify PIPE",
    "verify --require-signature PIPE",
    "export PIPE --output o.spm",
    "export PIPE --classes PIPE --output o.spm",
    f"labels check {SAMPLE.labels} --classes PIPE",
    "labels check PIPE",
    "bench compare PIPE PIPE",
    "train --config PIPE --output run",
    "bundle pack PIPE o.spm",
    "bundle pack o.spm --sign PIPE",
    "bundle unpack PIPE folder",
    "dataset check PIPE",
]


DRIVER = """
import json, signal, sys
from spmdeploy import cli

def stop(*_):
    raise TimeoutError
signal.signal(signal.SIGALRM, stop)
for command in json.load(sys.stdin):
    signal.alarm(20)
    try:
        code = cli.main(command.split())
    except BaseException as error:
        code = repr(error)
    signal.alarm(0)
    print(json.dumps([command, code]))
"""


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes here")
def test_commands_given_named_pipe_refuse_it_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "PIPE")
    done = subprocess.run(
        [sys.executable, "-c", DRIVER],
        cwd=tmp_path,
        input=json.dumps(COMMANDS),
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    codes = dict(json.loads(line) for line in done.stdout.splitlines())
    assert set(codes) == set(COMMANDS)
    assert {command: code for command, code in codes.items() if code not in (2, 6, 7)} == {}
    assert "defect" not in done.stderr and "Traceback" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["PIPE"]

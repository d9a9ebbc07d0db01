"""docs/deploy.md: its commands parse, those without a GPU succeed in order, and its Triton client works."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import typer

from spmdeploy import cli
from spmdeploy.assets.samples import SAMPLE_EDITS
from spmdeploy.backends.verify import read_golden
from spmdeploy.bundle.bundle import open_bundle
from spmdeploy.cli import app as commands

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/deploy.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^(?:\$ |env/bin/)?(spmdeploy .+?)(?: +#.*)?$", PAGE, re.MULTILINE)
EXECUTED = re.findall(r"^\$ spmdeploy (.+)$", PAGE, re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_page_commands_parse(command: str) -> None:
    args = shlex.split(command)[1:]
    found: Any = typer.main.get_command(commands.build_app())
    while hasattr(found, "commands"):
        found = found.commands[args.pop(0)]
    found.make_context("spmdeploy", args)  # parses, checks names, counts and choices; runs nothing


def test_page_commands_without_gpu_succeed_in_order(
    street_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="engines for a fleet are built by TensorRT-RTX")
    pytest.importorskip("cryptography", reason="signatures need the extra sign")
    monkeypatch.setenv("SPMDEPLOY_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(street_bundle, "mine.spm")
    sample = SAMPLE_EDITS[0]
    for source, name in ((sample.photo, "photo.jpg"), (sample.labels, "labels.png"), (sample.mask, "mask.png")):
        shutil.copy(source, name)
    assert len(EXECUTED) >= 8
    for command in EXECUTED:
        assert cli.main(command.split()) == 0, (command, capsys.readouterr().err)
    device = open_bundle("desk.spm")
    assert [name for name in device.files() if name.endswith(".engine") and "sm86" in name]
    assert Path("edited.png").exists() and Path("models/street_cpu/1/model.onnx").exists()


def test_page_client_receives_the_edit_of_the_server(
    street_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs the client of the page against a fake tritonclient that uses ONNX Runtime."""
    onnxruntime = pytest.importorskip("onnxruntime")
    assert cli.main(["export-triton", str(street_bundle), str(tmp_path), "--name", "street", "--device", "cpu"]) == 0
    graph = tmp_path / "street/1/model.onnx"
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    kinds = {"tensor(uint8)": "UINT8", "tensor(int32)": "INT32"}
    wanted = {value.name: kinds[value.type] for value in session.get_inputs()}

    class Input:
        def __init__(self, name: str, shape: tuple[int, ...], datatype: str) -> None:
            assert wanted[name] == datatype
            self.name, self.shape = name, shape

        def set_data_from_numpy(self, array: Any) -> None:
            assert array.shape == self.shape and array.flags.c_contiguous
            self.array = array

    class Client:
        def __init__(self, url: str) -> None:
            assert url == "localhost:8000"

        def __enter__(self) -> Client:
            return self

        def __exit__(self, *exception: object) -> None:
            pass

        def infer(self, model: str, inputs: list[Input], outputs: list[str]) -> Client:
            assert model == "street" and outputs == ["edited"]
            self.results = session.run(outputs, {given.name: given.array for given in inputs})
            return self

        def as_numpy(self, name: str) -> Any:
            assert name == "edited"
            return self.results[0]

    http: Any = ModuleType("tritonclient.http")
    http.InferInput, http.InferenceServerClient, http.InferRequestedOutput = Input, Client, str
    types: Any = ModuleType("tritonclient.utils")
    types.np_to_triton_dtype = lambda dtype: np.dtype(dtype).name.upper()
    package: Any = ModuleType("tritonclient")
    package.http = http
    for name, module in (("tritonclient", package), (http.__name__, http), (types.__name__, types)):
        monkeypatch.setitem(sys.modules, name, module)
    (example,) = re.findall(r"```python\n(.+?)```", PAGE, re.DOTALL)
    names: dict[str, Any] = {}
    exec(example, names)
    bundle = open_bundle(street_bundle)
    golden = read_golden(bundle, bundle.manifest.golden[0])
    image, labels, mask = (
        np.concatenate([array] * 2) for array in (golden.inputs.image, golden.inputs.labels, golden.inputs.mask)
    )
    edited = names["edit"](image, labels, mask != 0)
    assert edited.shape == image.shape and np.array_equal(edited[mask == 0], image[mask == 0])
    assert not np.array_equal(edited[mask != 0], image[mask != 0])


def test_page_links_and_targets_exist() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", PAGE):
        assert (ROOT / "docs" / target).exists(), target
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"`make ([\w-]+)`", PAGE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target

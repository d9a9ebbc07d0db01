"""The built wheel, used outside the source tree and in a fresh environment."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import venv
import zipapp
import zipfile
from importlib.metadata import PathDistribution
from pathlib import Path

import pytest

import spmdeploy
from spmdeploy.assets.samples import SAMPLE_EDITS
from spmdeploy.labels import built_in_tables

ROOT = Path(__file__).resolve().parents[2]
# Packages that an edge install must not include: only export and training need them.
NOT_FOR_THE_EDGE = {"torch", "torchvision", "onnx", "safetensors", "triton", "scipy"}


def run(*args: object, cwd: Path, **environment: str) -> str:
    """Stdout of a command that must succeed, without the source tree on its path."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [str(arg) for arg in args]
    done = subprocess.run(
        command, cwd=cwd, env=inherited | environment, capture_output=True, text=True, errors="replace", check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, because setuptools leaves files in build/ that would get into later wheels."""
    source, built = tmp_path_factory.mktemp("copy") / "source", tmp_path_factory.mktemp("built")
    no_source = shutil.ignore_patterns(".*", "build", "dist", "demo", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, source, ignore=no_source)
    run(sys.executable, "-m", "build", "--wheel", *_isolation(), "--outdir", built, source, cwd=source)
    (wheel,) = built.glob("*.whl")
    return wheel


def _isolation() -> list[str]:
    """Build in this environment, without a download, if it meets the requirements of pyproject.toml."""
    try:
        import setuptools
    except ImportError:
        return []
    return ["--no-isolation"] if int(setuptools.__version__.partition(".")[0]) >= 77 else []


@pytest.fixture(scope="module")
def unpacked(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def test_wheel_holds_one_top_level_package(unpacked: Path) -> None:
    names = {path.name for path in unpacked.iterdir()}
    assert names == {"spmdeploy", f"spmdeploy-{spmdeploy.__version__}.dist-info"}


def test_wheel_holds_every_file_of_the_package(unpacked: Path) -> None:
    def listing(root: Path) -> set[str]:
        return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}

    inside = listing(unpacked / "spmdeploy")
    ours = {name for name in listing(ROOT / "spmdeploy") if "__pycache__" not in name}
    assert inside == ours
    tables = {f"assets/classes/{name}.json" for name in built_in_tables()}
    samples = {f"assets/samples/{sample.name}/{file}" for sample in SAMPLE_EDITS for file in ("photo.jpg", "mask.png")}
    assert {"py.typed", "assets/samples/ATTRIBUTION.txt", *tables, *samples} <= inside and len(tables) >= 3


def test_wheel_metadata_lists_dependencies_and_script(unpacked: Path) -> None:
    distribution = PathDistribution(unpacked / f"spmdeploy-{spmdeploy.__version__}.dist-info")
    requires = distribution.requires or []
    base = {re.split("[<>=]", name)[0] for name in requires if "extra ==" not in name}
    assert base == {"numpy", "pillow", "typer", "msgspec"}
    assert {"cpu", "gpu", "export"} <= set(distribution.metadata.get_all("Provides-Extra") or [])
    (script,) = distribution.entry_points
    assert (script.group, script.name, script.value) == ("console_scripts", "spmdeploy", "spmdeploy.__main__:entry")
    assert distribution.metadata["License-Expression"] == "MIT" and "LICENSE" in str(distribution.files)


def test_wheel_unpacked_elsewhere_works(unpacked: Path, tmp_path: Path) -> None:
    driver = (
        "import spmdeploy; print(spmdeploy.__file__); from spmdeploy.assets import samples; print(samples.__file__)"
    )
    for path in run(sys.executable, "-c", driver, cwd=tmp_path, PYTHONPATH=str(unpacked)).splitlines():
        assert Path(path).is_relative_to(unpacked)
    args = [sys.executable, "-m", "spmdeploy"]
    assert run(*args, "--version", cwd=tmp_path, PYTHONPATH=str(unpacked)).strip() == spmdeploy.__version__
    sample = unpacked / "spmdeploy/assets/samples/car_away/labels.png"
    result = json.loads(run(*args, "labels", "check", sample, "--json", cwd=tmp_path, PYTHONPATH=str(unpacked)))
    assert result["table"] == "street"


def test_zipapp_names_how_to_unpack_it_and_works_unpacked(tmp_path: Path) -> None:
    source, archive, unpacked = tmp_path / "source", tmp_path / "app.pyz", tmp_path / "unpacked"
    shutil.copytree(ROOT / "spmdeploy", source / "spmdeploy", ignore=shutil.ignore_patterns("__pycache__", "models"))
    zipapp.create_archive(source, archive, main="spmdeploy.__main__:entry")
    check = ["labels", "check", SAMPLE_EDITS[0].labels, "--json"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    refused = subprocess.run(
        [sys.executable, archive, *check], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert refused.returncode == 4 and refused.stderr == ""
    error = json.loads(refused.stdout)
    assert f"the package is inside the file {archive}" in error["error"]
    command = error["hint"].removeprefix("unpack it: python ").partition(" FOLDER; then run: python FOLDER")[0]
    run(sys.executable, *command.split(), unpacked, cwd=tmp_path)
    assert json.loads(run(sys.executable, unpacked, *check, cwd=tmp_path))["table"] == "street"


@pytest.mark.slow
def test_wheel_with_cpu_extra_edits_without_torch(wheel: Path, street_bundle: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "env", with_pip=True)
    scripts = tmp_path / "env" / ("Scripts" if sys.platform == "win32" else "bin")
    run(scripts / "python", "-m", "pip", "install", "--quiet", f"{wheel}[cpu]", cwd=tmp_path)
    listed = json.loads(run(scripts / "python", "-m", "pip", "list", "--format", "json", cwd=tmp_path))
    installed = {entry["name"].lower() for entry in listed}
    assert {"spmdeploy", "numpy", "pillow", "typer", "onnxruntime"} <= installed
    assert NOT_FOR_THE_EDGE.isdisjoint(installed) and not [name for name in installed if name.startswith("nvidia")]

    assert run(scripts / "spmdeploy", "--version", cwd=tmp_path).strip() == spmdeploy.__version__
    sample, output = SAMPLE_EDITS[0], tmp_path / "edited.png"
    edit = ["edit", sample.photo, "--labels", sample.labels, "--mask", sample.mask, "-o", output, "--json"]
    result = json.loads(run(scripts / "spmdeploy", *edit, "--model", street_bundle, cwd=tmp_path))
    assert result["schema"] == "spmdeploy.edit/1" and output.is_file()
    assert json.loads(run(scripts / "spmdeploy", "verify", street_bundle, "--json", cwd=tmp_path))["golden"]
    doctor = json.loads(run(scripts / "spmdeploy", "doctor", "--json", cwd=tmp_path))
    usable = {finding["name"]: finding["usable"] for finding in doctor["findings"]}
    assert usable["onnxruntime on cpu"] and not usable["torch"] and not usable["export"]

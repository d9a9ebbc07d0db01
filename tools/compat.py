"""Installs the built wheel under several versions of Python and runs the tests of an edge install there.

An edge install has the extra `cpu` and neither torch nor onnx. A version without an interpreter on this machine counts
as a failure unless `--allow-missing` is given. Without arguments: 3.10, 3.11, 3.12 and 3.13.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VERSIONS = ("3.10", "3.11", "3.12", "3.13")
SAMPLE = ROOT / "spmdeploy/assets/samples/car_away"
TESTS = ("tests/tiling", "tests/imaging", "tests/bundle", "tests/editing", "tests/engines")
NEEDS_TORCH = ("tests/editing/test_prepare.py",)


def interpreter(version: str) -> Path | None:
    """The Python of that version: on the PATH, or among the versions that pyenv has."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    candidates = [shutil.which(f"python{version}"), *sorted(pyenv.glob(f"{version}.*/bin/python"), reverse=True)]
    for candidate in filter(None, candidates):
        found = subprocess.run([candidate, "--version"], capture_output=True, text=True, check=False)
        if found.returncode == 0 and found.stdout.startswith(f"Python {version}."):
            return Path(candidate)
    return None


def run(*command: str | Path, cwd: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([str(part) for part in command], cwd=cwd, env=environment, check=True)


def check(python: Path, wheel: Path, folder: Path) -> None:
    """Install the wheel, edit with the built-in model as a folder and as one file, and run the tests."""
    run(python, "-m", "venv", folder / "env", cwd=folder)
    bin_dir = folder / "env" / ("Scripts" if os.name == "nt" else "bin")
    run(bin_dir / "python", "-m", "pip", "install", "--quiet", f"{wheel}[cpu]", "pytest", "hypothesis", cwd=folder)
    files = [SAMPLE / "photo.jpg", "--labels", SAMPLE / "labels.png", "--mask", SAMPLE / "mask.png"]
    run(bin_dir / "spmdeploy", "edit", *files, "--output", folder / "folder.png", cwd=folder)
    run(bin_dir / "spmdeploy", "bundle", "pack", folder / "packed.spm", cwd=folder)
    run(bin_dir / "spmdeploy", "edit", *files, "--model", "packed.spm", "--output", folder / "packed.png", cwd=folder)
    if (folder / "folder.png").read_bytes() != (folder / "packed.png").read_bytes():
        raise SystemExit("an edit with the packed bundle differs from one with the folder")
    shutil.copytree(ROOT / "tests", folder / "tests")  # apart from the checkout, so that the wheel is what is tested
    shutil.copy(ROOT / "pyproject.toml", folder)
    chosen = [*TESTS, *(f"--ignore={file}" for file in NEEDS_TORCH)]
    run(bin_dir / "python", "-m", "pytest", "-q", "-m", "not slow and not fuzz", *chosen, cwd=folder)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", nargs="*", default=VERSIONS)
    parser.add_argument("--allow-missing", action="store_true", help="Do not fail where an interpreter is missing.")
    options = parser.parse_args(arguments)
    results: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="compat-") as temporary:
        # By way of a source distribution, so that files left in build/ by an earlier build stay out.
        subprocess.run([sys.executable, "-m", "build", "--outdir", temporary, ROOT], check=True)
        (wheel,) = Path(temporary).glob("*.whl")
        for version in options.versions:
            python = interpreter(version)
            if python is None:
                results[version] = "missing: no interpreter of this version here"
                continue
            folder = Path(temporary, version)
            folder.mkdir()
            try:
                check(python, wheel, folder)
                results[version] = "passed"
            except subprocess.CalledProcessError as exc:
                results[version] = f"failed: {' '.join(exc.cmd[:4])} ended with {exc.returncode}"
    for version, result in results.items():
        print(f"Python {version}: {result}")
    accepted = ("passed", "missing") if options.allow_missing else ("passed",)
    return 0 if all(result.startswith(accepted) for result in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())

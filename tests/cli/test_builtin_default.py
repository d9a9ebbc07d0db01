"""Commands use the built-in bundle if none is given."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import spmdeploy
from spmdeploy import cli
from spmdeploy.bundle.bundle import open_bundle
from spmdeploy.cli import build


@pytest.mark.parametrize(("args", "place"), [([], "cache"), ([str(spmdeploy.default_model())], None)])
def test_build_without_bundle_builds_built_in_one_into_cache(
    args: list[str], place: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []

    def record(bundle: Any, options: Any) -> tuple[list[Any], list[str]]:
        calls.append((bundle.path, options.place))
        return [], []

    monkeypatch.setattr(build, "build_engines_with_progress", record)
    assert cli.main(["build", *args]) == 0
    assert calls == [(spmdeploy.default_model(), place)]


def test_inspect_without_path_shows_built_in_bundle(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect"]) == 0
    assert capsys.readouterr().out.startswith(f"{spmdeploy.default_model()}: bundle street")


def test_pack_with_one_path_packs_built_in_bundle(tmp_path: Path) -> None:
    output = tmp_path / "packed.spm"
    assert cli.main(["bundle", "pack", str(output)]) == 0
    assert open_bundle(output).manifest.name == "street"


def test_slim_with_one_path_reads_built_in_bundle(tmp_path: Path) -> None:
    output = tmp_path / "slim.spm"
    assert cli.main(["bundle", "slim", str(output), "--keep", "cpu"]) == 0
    assert {graph.graph for graph in open_bundle(output).manifest.graphs} >= {"edit_cpu", "refine_cpu"}


@pytest.mark.parametrize("json", [[], ["--json"]], ids=["text", "json"])
def test_missing_dependency_of_command_line_is_named(json: list[str], tmp_path: Path) -> None:
    (tmp_path / "typer.py").write_text("raise ModuleNotFoundError(\"No module named 'typer'\", name='typer')\n")
    line = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); sys.argv = ['spmdeploy', 'doctor', *{json!r}]; "
    line += "from spmdeploy.__main__ import entry; entry()"
    done = subprocess.run([sys.executable, "-c", line], capture_output=True, text=True, check=False)
    assert done.returncode == 4
    assert "spmdeploy needs the package typer" in (done.stdout if json else done.stderr)
    assert "Traceback" not in done.stderr

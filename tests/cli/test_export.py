"""The command `export`: its JSON, and inputs and outputs that it refuses."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

import spmdeploy
from spmdeploy.bundle.bundle import open_bundle
from spmdeploy.labels import class_table
from spmdeploy.model.checkpoint import save_generator
from spmdeploy.model.generator import Generator, GeneratorConfig
from tests.cli.harness import Result, process


def test_export_json_is_one_object_listing_graphs(street_bundle: Path) -> None:
    result = Result(0, (street_bundle.with_name("export.stdout")).read_text(), "")
    assert result.json["schema"] == "spmdeploy.export/1"
    assert [graph["precision"] for graph in result.json["graphs"]] == ["fp32"] * 6 + ["fp16"] * 3 + [
        "fp32",
        "fp32",
        "fp16",
    ]


@pytest.mark.parametrize("content", [b"", b"garbage", None], ids=["empty", "garbage", "absent"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_export_of_invalid_checkpoint_exits_7(suffix: str, content: bytes | None, run: Any, tmp_path: Path) -> None:
    checkpoint = tmp_path / f"weights{suffix}"
    if content is not None:
        checkpoint.write_bytes(content)
    result = run("export", checkpoint, "-o", tmp_path / "b.spm", "--classes", "street", "--json")
    assert result.code == result.json["exit_code"] == 7 and checkpoint.stem in result.json["error"]
    assert not [path for path in tmp_path.iterdir() if path != checkpoint]


def test_export_with_wrong_class_table_exits_7(street_bundle: Path, run: Any, tmp_path: Path) -> None:
    args = ["export", street_bundle.with_name("tiny.safetensors"), "-o", tmp_path / "b.spm", "--json", "--classes"]
    result = run(*args, "cityscapes")
    assert result.code == 7 and "12 classes" in result.json["error"] and "34" in result.json["error"]
    assert run(*args, "cityscape").code == 7
    assert not list(tmp_path.iterdir())


def test_export_onto_folder_with_other_files_is_refused(street_bundle: Path, run: Any, tmp_path: Path) -> None:
    (tmp_path / "b.spm").mkdir()
    (tmp_path / "b.spm/thesis.txt").write_text("dear")
    args = ["export", street_bundle.with_name("tiny.safetensors"), "-o", tmp_path / "b.spm", "--classes", "street"]
    assert run(*args).code == run(*args, "--overwrite").code == 7
    assert (tmp_path / "b.spm/thesis.txt").read_text() == "dear"


KILLED = (
    "import os, signal, spmdeploy.files as files\n"
    "files.flush_to_disk = lambda path: os.kill(os.getpid(), signal.SIGKILL)\n"  # written, but not in place
    "import spmdeploy.cli\nspmdeploy.cli.entry()"
)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs POSIX signals")
@pytest.mark.parametrize("overwrite", [(), ("--overwrite",)], ids=["new", "overwrite"])
def test_export_killed_leaves_the_target_alone_and_runs_again(tmp_path: Path, overwrite: tuple[str, ...]) -> None:
    checkpoint, target = tmp_path / "tiny.safetensors", tmp_path / "b.spm"
    save_generator(Generator(GeneratorConfig(len(class_table("street")), width=2, hidden=8)), checkpoint)
    args = ["export", checkpoint, "-o", target, "--classes", "street", "--cpu-only", *overwrite]
    if overwrite:
        shutil.copytree(spmdeploy.default_model(), target)
    assert process(*args, driver=KILLED).code == -signal.SIGKILL
    assert open_bundle(target).check_all() == () if overwrite else not target.exists()
    (left,) = tmp_path.glob(".*")
    os.utime(left, (0, 0))  # what is a few seconds old may belong to a process that is starting
    done = process(*args)
    assert done.code == 0, done.err
    assert not list(tmp_path.glob(".*")) and open_bundle(target).check_all() == ()
    assert open_bundle(target).manifest.generator.width == 2


@pytest.mark.slow
def test_export_by_the_command_of_the_hint_adds_the_graph(
    street_bundle: Path, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("bundle", "slim", street_bundle, "slim.spm", "--keep", "cpu").code == 0
    refused = run("build", "slim.spm", "--target", "sm89", "--json")
    assert refused.code == 6 and "holds only graphs for CPUs" in refused.json["error"]
    arguments = refused.json["hint"].partition("add it: spmdeploy ")[2].split()
    assert run(*arguments).code == 0
    added, whole = (open_bundle(path).manifest.graphs for path in ("NEW.spm", street_bundle))
    assert [(one.graph, one.precision, one.sha256) for one in added] == [
        (one.graph, one.precision, one.sha256) for one in whole
    ]

"""The command `inspect` on bundles, checkpoints and other files."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from spmdeploy import cli
from spmdeploy.bundle.bundle import open_bundle
from spmdeploy.engines.pack import pack


def inspect(path: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any]]:
    code = cli.main(["inspect", str(path), "--json"])
    (line,) = capsys.readouterr().out.splitlines()
    return code, json.loads(line)


def reseal(bundle: Path) -> None:
    """Rewrite SHA256SUMS for the current files."""
    sums = bundle / "SHA256SUMS"
    names = [line[66:] for line in sums.read_text().splitlines()]
    lines = [f"{hashlib.sha256((bundle / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
    sums.write_text("".join(lines))


def test_inspect_bundle_counts_equal_the_manifest(street_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, facts = inspect(street_bundle, capsys)
    assert code == 0 and facts["kind"] == "bundle" and facts["name"] == "tiny" and facts["surplus"] == []
    assert facts["classes"]["name"] == "street" and facts["generator"]["classes"] == 12
    by_precision = {graph["precision"]: graph for graph in facts["graphs"]}
    assert by_precision["fp32"]["counted"]["fp16_share"] == 0 < 0.6 < by_precision["fp16"]["counted"]["fp16_share"]
    assert by_precision["fp16"]["counted"]["fp32_operations"]["ReduceMean"] > 0
    for graph in facts["graphs"]:  # recorded at export and counted in the file
        for name in ("fp16_share", "fp32_operations", "weights_dtype"):
            assert graph["counted"][name] == graph[name]
        if graph["graph"] == "edit":  # the work of the CPU graph depends on the mask
            assert graph["counted"]["gflop"] == facts["generator"]["gflop"]


def test_inspect_bundle_as_text_shows_the_facts(street_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", str(street_bundle)]) == 0
    out = capsys.readouterr().out
    for message in ("bundle tiny", "all hashes match", "counted in the graphs", "8 car", "random weights", "edit fp16"):
        assert message in out


def test_inspect_zip_equals_its_folder(street_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    zipped = pack(open_bundle(street_bundle), tmp_path / "tiny.spm.zip")
    (folder_code, folder), (zip_code, result) = inspect(street_bundle, capsys), inspect(zipped, capsys)
    assert folder_code == zip_code == 0
    assert result.pop("path") == str(zipped) and folder.pop("path") == str(street_bundle)
    assert result == folder


def test_inspect_unlisted_files_are_shown(
    street_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copied = Path(shutil.copytree(street_bundle, tmp_path / "b.spm"))
    (copied / "notes.txt").write_text("mine")
    assert inspect(copied, capsys)[1]["surplus"] == ["notes.txt"]
    assert cli.main(["inspect", str(copied)]) == 0
    assert "unlisted file, never read: notes.txt" in capsys.readouterr().out


def test_inspect_changed_card_exits_6(street_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copied = Path(shutil.copytree(street_bundle, tmp_path / "b.spm"))
    card = (copied / "card.md").read_bytes()
    (copied / "card.md").write_bytes(card.replace(b"random weights", b"MIT licence") + b"\n")
    code, result = inspect(copied, capsys)
    assert code == result["exit_code"] == 6 and "b.spm/card.md" in result["error"]


def test_inspect_without_torch_and_onnx_shows_recorded_figures(street_bundle: Path) -> None:
    driver = (
        "import sys\n"
        "for name in ('torch', 'onnx', 'onnxruntime', 'safetensors'): sys.modules[name] = None\n"
        "import spmdeploy.cli\n"
        "spmdeploy.cli.entry()"
    )

    def run(*args: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", driver, "inspect", *map(str, args)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    facts = json.loads(run(street_bundle, "--json").stdout)
    assert [graph["counted"] for graph in facts["graphs"]] == [None] * 12
    as_text = run(street_bundle)
    assert as_text.returncode == 0 and "as recorded at export" in as_text.stdout
    checkpoint = run(street_bundle.with_name("tiny.safetensors"))
    assert checkpoint.returncode == 4 and "is not installed" in checkpoint.stderr
    assert 'hint: pip install "spmdeploy[export]"' in checkpoint.stderr


def test_inspect_checkpoint_shows_shape_and_work(street_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, facts = inspect(street_bundle.with_name("tiny.safetensors"), capsys)
    assert code == 0 and facts["kind"] == "checkpoint" and facts["format"] == "spmdeploy"
    assert (facts["classes"], facts["width"], facts["hidden"], facts["channel_order"]) == (12, 2, 8, "RGB")
    bundle = inspect(street_bundle, capsys)[1]["generator"]
    assert facts["parameters"] == bundle["parameters"] and facts["gflop"] == pytest.approx(bundle["gflop"], rel=0.02)


class Hostile:
    """A pickle that would create a file if it were executed."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.mark,))


def test_inspect_hostile_pickle_is_not_executed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mark = tmp_path / "was here"
    (tmp_path / "evil.pth").write_bytes(pickle.dumps({"netG": Hostile(mark)}))
    code, result = inspect(tmp_path / "evil.pth", capsys)
    assert code == 7 and "evil.pth" in result["error"] and not mark.exists()


@pytest.mark.parametrize("name", ["x.pth", "x.pt", "x.ckpt", "x.safetensors"])
@pytest.mark.parametrize("content", [b"", b"garbage" * 100, b"PK\3\4" + bytes(100)], ids=["empty", "garbage", "zip"])
def test_inspect_invalid_checkpoint_exits_7(
    name: str, content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_bytes(content)
    code, result = inspect(tmp_path / name, capsys)
    assert code == result["exit_code"] == 7 and tmp_path.name in result["error"]


def test_inspect_other_path_is_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "garbage").write_bytes(b"\0\1\2")
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("thesis.txt", "dear")
    for name, expected in (("absent", 7), ("empty", 6), ("garbage", 6), ("other.zip", 6)):
        code, result = inspect(tmp_path / name, capsys)
        assert code == result["exit_code"] == expected and name in result["error"], result


def test_inspect_invalid_graph_exits_6(street_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copied = Path(shutil.copytree(street_bundle, tmp_path / "b.spm"))
    graph = copied / "graphs/edit.fp16.onnx"
    garbage = b"\xff" * graph.stat().st_size
    manifest = json.loads((copied / "manifest.json").read_text())
    graph.write_bytes(garbage)
    for record in manifest["graphs"]:
        if record["file"] == "graphs/edit.fp16.onnx":
            record["sha256"] = hashlib.sha256(garbage).hexdigest()
    (copied / "manifest.json").write_text(json.dumps(manifest))
    reseal(copied)
    code, result = inspect(copied, capsys)
    assert code == 6 and "edit.fp16.onnx: not a graph of spmdeploy" in result["error"]

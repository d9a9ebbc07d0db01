"""The command `build`: choice of the library, refused options, output and cleaning."""

from __future__ import annotations

import enum
import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from spmdeploy import cli
from spmdeploy.engines import build as to_engine
from spmdeploy.engines import library as engine_library
from spmdeploy.engines import plan as engine_plan
from spmdeploy.engines.plan import EngineOptions, plan_engines
from spmdeploy.engines.record import Gpu
from spmdeploy.errors import BundleError, UnavailableError, UsageError
from spmdeploy.export import pipeline
from spmdeploy.gpu.driver import GpuFacts
from tests.bundle.conftest import write_street
from tests.engines.test_builder import VERSIONS
from tests.simulators.recording_tensorrt import recording_tensorrt

ORIN = GpuFacts("Orin", "8.7", "12.6", None)
RTX_3060 = GpuFacts("NVIDIA GeForce RTX 3060", "8.6", "13.0", "580.95.05")


class Machine:
    """A simulated machine: its GPU and its installed libraries."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.patch = monkeypatch
        self.gpu(None)
        self.install("tensorrt", None)
        targets = enum.IntEnum("ComputeCapability", ["NONE", "CURRENT", "SM75", "SM120", "SM86"])  # type: ignore[misc]
        self.rtx = SimpleNamespace(__version__="1.7.1.116", __spec__="here", ComputeCapability=targets)
        self.install("tensorrt_rtx", self.rtx)

    def gpu(self, facts: GpuFacts | None) -> None:
        def answer(device: int = 0) -> GpuFacts:
            if facts is None:
                raise OSError("no NVIDIA driver")
            return facts

        self.patch.setattr(engine_plan, "gpu_facts", answer)
        self.patch.setattr(engine_library, "gpu_facts", answer)

    def install(self, module: str, library: Any) -> None:
        """Install a module; None: it is not installed."""
        self.patch.setitem(sys.modules, module, library)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    monkeypatch.setenv("SPMDEPLOY_CACHE", str(tmp_path / "cache"))
    return Machine(monkeypatch)


@pytest.fixture(params=VERSIONS)
def tensorrt(request: pytest.FixtureRequest, shared: Path) -> Any:
    version = request.param
    api = json.loads((shared / f"tensorrt-api/tensorrt-{version}.json").read_text())
    library = recording_tensorrt(version, api)
    library.__spec__ = "here"
    return library


def run(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, dict[str, Any], str]:
    code = cli.main([*map(str, args), "--json"])
    captured = capsys.readouterr()
    (line,) = captured.out.splitlines()
    return code, json.loads(line), captured.err


def test_plan_with_a_gpu_takes_tensorrt(machine: Machine) -> None:
    machine.gpu(ORIN)
    machine.install("tensorrt", SimpleNamespace(__version__="10.3.0", __spec__="here"))
    plan = plan_engines(EngineOptions())
    assert (plan.runtime, plan.version, plan.targets, plan.built_for) == ("tensorrt", "10.3.0", (), Gpu("Orin", "8.7"))
    assert plan.description.startswith("tensorrt 10.3.0 for Orin (sm87): ")
    plan = plan_engines(EngineOptions(targets=("sm86",)))
    assert (plan.runtime, plan.targets, plan.built_for) == ("tensorrt-rtx", ("sm86",), None)


def test_plan_without_tensorrt_takes_rtx(machine: Machine) -> None:
    machine.gpu(RTX_3060)
    plan = plan_engines(EngineOptions())
    assert (plan.runtime, plan.targets, plan.built_for) == ("tensorrt-rtx", ("sm86",), None)
    assert plan.why == "TensorRT is not installed"
    machine.install("tensorrt", SimpleNamespace(__version__="10.3.0", __spec__="here"))
    machine.gpu(None)
    with pytest.raises(UnavailableError, match="no GPU here to build for"):
        plan_engines(EngineOptions())


def test_plan_with_a_broken_tensorrt_takes_rtx(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.gpu(RTX_3060)
    machine.install("tensorrt", SimpleNamespace(__spec__="here"))
    real = engine_library.importlib.import_module

    def broken(name: str) -> Any:
        if name == "tensorrt":
            raise OSError("libnvinfer.so.10: cannot open shared object file")
        return real(name)

    monkeypatch.setattr(engine_library.importlib, "import_module", broken)
    plan = plan_engines(EngineOptions())
    assert plan.runtime == "tensorrt-rtx" and "libnvinfer.so.10" in plan.why
    machine.install("tensorrt_rtx", None)
    with pytest.raises(UnavailableError, match="tensorrt cannot be imported"):
        plan_engines(EngineOptions())


def test_plan_of_rtx_for_an_unlisted_gpu_is_refused(machine: Machine) -> None:
    machine.gpu(ORIN)
    with pytest.raises(UnavailableError, match=r"builds for sm75, sm86, sm120, not for Orin \(sm87\)") as caught:
        plan_engines(EngineOptions(runtime="tensorrt-rtx"))
    assert "--runtime tensorrt" in str(caught.value.hint)


def test_plan_of_targets_sorts_them(machine: Machine) -> None:
    assert plan_engines(EngineOptions(targets=("sm120", "sm86", "sm120"))).targets == ("sm86", "sm120")


REFUSED: list[tuple[dict[str, Any], type[Exception], str, str]] = [
    ({"targets": ("sm90",)}, UsageError, "no target 'sm90'.*builds for sm75, sm86, sm120", "runtime tensorrt"),
    ({"targets": ("sm86", "sm87")}, UsageError, "no target 'sm87'", "Jetson"),
    ({"targets": ("current",)}, UsageError, "no target 'current'", "itself"),
    ({"targets": ("",)}, UsageError, "no target ''", "itself"),
    ({}, UnavailableError, "no GPU here", "--target sm86; .*sm75, sm86, sm120"),
    ({"runtime": "tensorrt"}, UnavailableError, "tensorrt cannot be imported", "JetPack"),
    ({"runtime": "tensorrt", "targets": ("sm86",)}, UsageError, "GPU of this machine only", "--target"),
    ({"runtime": "onnxruntime"}, UsageError, "unknown runtime 'onnxruntime'", "tensorrt-rtx"),
    ({"targets": ("sm86",), "timing_cache": Path("t")}, UsageError, "keeps no timing cache", "leave --timing-cache"),
    ({"max_batch": 65}, UsageError, "1 to 65", "at most 64"),
    ({"max_batch": 0}, UsageError, "1 to 0", "at most 64"),
    ({"max_batch": 2, "opt_batch": 3}, UsageError, "best at 3", "among them"),
]


@pytest.mark.parametrize(("options", "kind", "message", "hint"), REFUSED)
def test_plan_of_impossible_options_is_refused_with_hint(
    machine: Machine, options: dict[str, Any], kind: type[Exception], message: str, hint: str
) -> None:
    with pytest.raises(kind, match=message) as caught:
        plan_engines(EngineOptions(**options))
    assert re.search(hint, str(caught.value.hint)), caught.value.hint


def test_plan_of_tensorrt_without_a_gpu_is_refused(machine: Machine) -> None:
    machine.install("tensorrt", SimpleNamespace(__version__="10.3.0", __spec__="here"))
    with pytest.raises(UnavailableError, match="GPU of this machine, and there is none: no NVIDIA driver"):
        plan_engines(EngineOptions(runtime="tensorrt"))


def test_plan_without_any_library_names_the_extras(machine: Machine) -> None:
    machine.install("tensorrt_rtx", None)
    with pytest.raises(UnavailableError, match="neither TensorRT nor TensorRT-RTX") as caught:
        plan_engines(EngineOptions())
    assert "spmdeploy[tensorrt-rtx]" in str(caught.value.hint)


def test_build_then_inspect_then_clean_handles_one_engine(
    machine: Machine, tensorrt: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    bundle = write_street(tmp_path / "street.spm").path
    machine.gpu(ORIN)
    machine.install("tensorrt", tensorrt)
    code, result, log = run(capsys, "build", bundle)
    assert code == 0 and result["schema"] == "spmdeploy.build/1"
    (engine,) = result["engines"]
    assert engine["built"] and engine["precision"] == "fp16" and engine["gpu"]["name"] == "Orin"
    assert f"tensorrt {tensorrt.__version__} for Orin (sm87)" in log and "engines go into the bundle" in log
    assert "edit.fp16: Timing tactics" in log
    assert not run(capsys, "build", bundle)[1]["engines"][0]["built"]

    code, facts, _ = run(capsys, "inspect", engine["path"])
    assert code == 0 and facts["kind"] == "engine" and facts["fit"] and facts["record"]["version"] == engine["version"]
    assert cli.main(["inspect", engine["path"]]) == 0
    args = capsys.readouterr().out
    assert "fits this machine" in args and "100% FP16, read back from the engine; not yet verified" in args

    machine.gpu(RTX_3060)
    code, facts, _ = run(capsys, "inspect", engine["path"])
    assert code == 0 and not facts["fit"] and "Orin" in facts["differences"][0] and "3060" in facts["differences"][0]
    code, result, _ = run(capsys, "build", bundle, "--clean")
    assert code == 0 and [removed["path"] for removed in result["removed"]] == [engine["path"]]
    assert result["removed"][0]["differences"] == facts["differences"] and not Path(engine["path"]).exists()
    assert cli.main(["build", str(bundle), "--clean"]) == 0
    assert capsys.readouterr().out == "nothing to remove\n"


def test_inspect_of_damaged_or_separated_engine_exits_6(
    machine: Machine, tensorrt: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    machine.gpu(ORIN)
    machine.install("tensorrt", tensorrt)
    path = Path(run(capsys, "build", write_street(tmp_path / "street.spm").path)[1]["engines"][0]["path"])
    path.write_bytes(path.read_bytes()[:-1])
    code, result, _ = run(capsys, "inspect", path)
    assert code == 6 and "truncated" in result["error"]
    alone = shutil.copy(path, tmp_path / "alone.engine")
    code, result, _ = run(capsys, "inspect", alone)
    assert code == 6 and "no engine.json beside it" in result["error"]


def test_build_of_graphs_for_cpus_names_the_command(machine: Machine, tmp_path: Path) -> None:
    bundle = write_street(tmp_path / "street.spm")
    records = tuple(replace(record, graph=f"{record.graph}_cpu") for record in bundle.manifest.graphs)
    cpu_only = replace(bundle, manifest=replace(bundle.manifest, graphs=records))
    with pytest.raises(BundleError, match="only graphs for CPUs") as caught:
        to_engine.build_engines(cpu_only, EngineOptions(targets=("sm86",)))
    assert "spmdeploy export" in str(caught.value.hint)


def test_build_of_missing_graph_exits_6_and_lists_graphs(
    machine: Machine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = write_street(tmp_path / "street.spm").path
    code, result, _ = run(capsys, "build", bundle, "--graph", "refine", "--target", "sm86")
    assert code == 6 and "no graph 'refine' in fp16; there is edit fp32, edit fp16" in result["error"]


@pytest.mark.parametrize(
    ("args", "exit_code", "problem"),
    [
        (["--cpu-only", "--engine"], 2, "from the graph for CPUs"),
        (["--target", "sm86"], 2, "--target is for engines"),
        (["--engine", "--target", "sm90"], 2, "no target 'sm90'"),
        (["--engine"], 4, "no GPU here"),
    ],
)
def test_export_with_impossible_engine_options_ends_at_once(
    machine: Machine, tmp_path: Path, capsys: pytest.CaptureFixture[str], args: list[str], exit_code: int, problem: str
) -> None:
    export = ["export", tmp_path / "absent.pth", "--output", tmp_path / "b.spm", "--classes", "street", *args]
    code, result, _ = run(capsys, *export)
    assert code == exit_code and problem in result["error"]


def test_export_with_engine_builds_one(
    machine: Machine, tensorrt: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.gpu(ORIN)
    machine.install("tensorrt", tensorrt)
    bundle = write_street(tmp_path / "street.spm")
    monkeypatch.setattr(pipeline, "export_bundle", lambda *arguments: pipeline.Export(bundle, (), 1.0))
    args = ["export", "x.pth", "--output", bundle.path, "--classes", "street", "--engine"]
    for precision in ([], ["--precision", "fp32"]):
        code, result, log = run(capsys, *args, *precision)
        (engine,) = result["engines"]
        assert code == 0 and engine["precision"] == ("fp32" if precision else "fp16") and Path(engine["path"]).exists()
        assert "for Orin (sm87)" in log

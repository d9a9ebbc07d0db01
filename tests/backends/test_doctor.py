"""The doctor in machines that are simulated: what is usable, why not, and what to do."""

from __future__ import annotations

import builtins
import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from spmdeploy import cli, default_model
from spmdeploy.backends import doctor
from spmdeploy.bundle.bundle import Bundle, open_bundle
from spmdeploy.engines.store import StoredEngine
from tests.bundle.conftest import write_street
from tests.simulators.records import SAMPLE


class Machine:
    """What is installed and plugged in, for the doctor to find; change it, then `run_checks`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, bundle: Bundle) -> None:
        self.patch, self.bundle = monkeypatch, bundle
        self.gpus(OSError("no NVIDIA driver (libcuda.so.1: no such file)"))
        self.onnxruntime(["CPUExecutionProvider"], {"onnxruntime"})
        self.binding(ImportError("neither PyCUDA (No module named 'pycuda') nor cuda-core (No module named 'cuda')"))
        for runtime in ("tensorrt", "tensorrt-rtx"):
            self.engine_library(runtime, ImportError(f"No module named '{runtime}'"))
        self.engines([])

    def gpus(self, answer: int | OSError) -> None:
        def visible_gpus() -> int:
            if isinstance(answer, OSError):
                raise answer
            return answer

        self.patch.setattr(doctor, "visible_gpus", visible_gpus)

    def onnxruntime(self, providers: list[str] | None, packages: set[str]) -> None:
        library = SimpleNamespace(
            __version__="9.9", __spec__="here", __file__="/nowhere", get_available_providers=lambda: providers
        )
        # None in sys.modules makes an import fail, as if the package were not there.
        self.patch.setitem(sys.modules, "onnxruntime", None if providers is None else library)
        self.patch.setattr(doctor, "_installed", lambda: packages)

    def binding(self, answer: str | Exception) -> None:
        def open_cuda(ordinal: int) -> Any:
            if isinstance(answer, Exception):
                raise answer
            return SimpleNamespace(name=answer)

        self.patch.setattr(doctor, "open_cuda", open_cuda)

    def engine_library(self, runtime: str, found: ModuleType | Exception, *packages: str) -> None:
        """A module that can be imported or cannot, and the packages that say that they are installed."""
        name = runtime.replace("-", "_")
        real_import, real_found = importlib.import_module, importlib.metadata.distributions

        def import_module(wanted: str, package: str | None = None) -> Any:
            if wanted != name:
                return real_import(wanted, package)
            if isinstance(found, Exception):
                raise found
            return found

        def distributions(**query: str) -> Any:
            asked = query.get("name", "")
            if asked.startswith(runtime) and (asked.startswith("tensorrt-rtx") == (runtime == "tensorrt-rtx")):
                return [SimpleNamespace(version="10.16.1")] if asked in packages else []
            return real_found(**query)

        self.patch.setattr("spmdeploy.engines.library.importlib.import_module", import_module)
        self.patch.setattr(doctor.importlib.metadata, "distributions", distributions)
        self.patch.setattr(doctor.importlib.metadata, "version", lambda package: "10.16.1")

    def engines(self, found: list[StoredEngine]) -> None:
        self.patch.setattr("spmdeploy.backends.select_engine.find_engines", lambda bundle, hashing: found)

    def without(self, *packages: str) -> None:
        real = doctor.importlib.util.find_spec
        self.patch.setattr(
            doctor.importlib.util, "find_spec", lambda name, package=None: None if name in packages else real(name)
        )

    def run_checks(self) -> dict[str, doctor.Check]:
        return {finding.name: finding for finding in doctor.run_checks(self.bundle)}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    return Machine(monkeypatch, write_street(tmp_path / "street.spm"))


CUDA = ["CUDAExecutionProvider", "CPUExecutionProvider"]


def test_run_checks_plain_computer_runs_on_cpu(machine: Machine) -> None:
    found = machine.run_checks()
    assert found["onnxruntime on cpu"].usable and found["onnxruntime on cpu"].reason == "onnxruntime 9.9"
    gpu, on_cuda = found["NVIDIA GPU"], found["onnxruntime on cuda"]
    assert not gpu.usable and "no NVIDIA driver" in gpu.reason and "driver" in str(gpu.remedy)
    assert not on_cuda.usable and "built without CUDA" in on_cuda.reason and "spmdeploy[gpu]" in str(on_cuda.remedy)


def test_run_checks_without_backends_names_packages(machine: Machine) -> None:
    machine.onnxruntime(None, set())
    found = machine.run_checks()
    for name in ("onnxruntime on cpu", "onnxruntime on cuda"):
        assert not found[name].usable and "onnxruntime" in found[name].reason
    assert 'pip install "spmdeploy[cpu]"' in str(found["onnxruntime on cpu"].remedy)


def test_check_onnxruntime_both_packages_are_refused(machine: Machine) -> None:
    machine.onnxruntime(CUDA, {"onnxruntime", "onnxruntime-gpu"})
    machine.gpus(1)
    found = machine.run_checks()
    on_cuda = found["onnxruntime on cuda"]
    assert not on_cuda.usable and "both installed" in on_cuda.reason
    assert str(on_cuda.remedy).startswith("pip uninstall onnxruntime onnxruntime-gpu")
    assert "mixed with onnxruntime-gpu" in found["onnxruntime on cpu"].reason


@pytest.mark.parametrize("answer", [0, OSError("the NVIDIA driver answered cuInit with error 100")], ids=str)
def test_check_onnxruntime_without_gpu_is_unusable(answer: int | OSError, machine: Machine) -> None:
    machine.onnxruntime(CUDA, {"onnxruntime-gpu"})
    machine.gpus(answer)
    found = machine.run_checks()
    assert not found["onnxruntime on cuda"].usable
    assert found["onnxruntime on cuda"].reason == found["NVIDIA GPU"].reason
    assert found["onnxruntime on cpu"].usable


def test_check_onnxruntime_gpu_and_package_are_usable(machine: Machine) -> None:
    machine.onnxruntime(CUDA, {"onnxruntime-gpu"})
    machine.gpus(2)
    found = machine.run_checks()
    assert found["NVIDIA GPU"].usable and found["NVIDIA GPU"].reason == "2 visible"
    assert found["onnxruntime on cuda"].usable and "verify --device cuda:0" in found["onnxruntime on cuda"].reason


@pytest.mark.parametrize(("missing", "name"), [("torch", "torch"), ("onnx", "torch"), ("safetensors", "export")])
def test_run_checks_missing_package_blocks_export(missing: str, name: str, machine: Machine) -> None:
    machine.without(missing)
    finding = machine.run_checks()[name]
    assert not finding.usable and finding.reason == f"{missing} is not installed" and "export" in str(finding.remedy)


def test_run_checks_imports_nothing_heavy(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    imported: list[str] = []
    real = builtins.__import__

    def remember(name: str, *arguments: Any, **options: Any) -> Any:
        imported.append(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", remember)
    machine.run_checks()
    assert {"torch", "onnx"}.isdisjoint(imported) and "onnxruntime" in imported


def test_doctor_command_prints_table_and_json(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    machine.onnxruntime(None, set())
    assert cli.main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("onnxruntime on cpu   not usable") for line in lines)
    assert any(line.startswith("onnxruntime on cpu: ") and "pip install" in line for line in lines)
    assert cli.main(["doctor", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["schema"] == "spmdeploy.doctor/1" and set(printed) == {"schema", "machine", "findings"}
    assert {"system", "machine", "python", "cores"} <= set(printed["machine"])
    assert set(printed["findings"][0]) == {"name", "usable", "reason", "remedy"}


def test_run_checks_lists_every_backend(machine: Machine) -> None:
    assert list(machine.run_checks()) == [
        "NVIDIA GPU",
        "CUDA for Python",
        "tensorrt",
        "tensorrt-rtx",
        "engines of street",
        "torch",
        "onnxruntime on cuda",
        "onnxruntime on cpu",
        "onnxruntime-rtx",
        "openvino on cpu",
        "triton",
        "export",
    ]
    for finding in machine.run_checks().values():
        assert finding.usable or (finding.reason and finding.remedy), finding


def library(version: str = "10.16.1") -> ModuleType:
    module = ModuleType("tensorrt")
    module.__version__, module.Runtime = version, object  # type: ignore[attr-defined]
    return module


def test_check_engine_library_with_gpu_is_usable(machine: Machine) -> None:
    machine.gpus(1)
    machine.binding("PyCUDA 2025.1.2")
    machine.engine_library("tensorrt", library(), "tensorrt")
    found = machine.run_checks()
    assert found["CUDA for Python"].reason == "PyCUDA 2025.1.2"
    assert found["tensorrt"].usable and found["tensorrt"].reason == "tensorrt 10.16.1 with PyCUDA 2025.1.2"


def test_check_engine_library_missing_names_package(machine: Machine) -> None:
    found = machine.run_checks()
    for runtime in ("tensorrt", "tensorrt-rtx"):
        assert found[runtime].reason == f"{runtime} is not installed"
        assert f'pip install "spmdeploy[{runtime}]"' in str(found[runtime].remedy)


@pytest.mark.parametrize("module", [ImportError("cannot import name 'tensorrt_libs'"), ModuleType("tensorrt")], ids=str)
def test_check_engine_library_stub_is_named(module: Any, machine: Machine) -> None:
    machine.engine_library("tensorrt", module, "tensorrt")
    finding = machine.run_checks()["tensorrt"]
    assert not finding.usable and "stub" in str(finding.remedy)
    assert "installed without its libraries" in finding.reason or "is empty" in finding.reason


def test_check_engine_library_missing_cuda_library_is_named(machine: Machine) -> None:
    error = OSError("libcudart.so.12: cannot open shared object file: No such file or directory")
    machine.engine_library("tensorrt", error, "tensorrt-cu12")
    finding = machine.run_checks()["tensorrt"]
    assert finding.reason == "tensorrt-cu12 10.16.1 is installed, but the library libcudart.so.12 is missing"
    assert "libcudart.so.12" in str(finding.remedy)


def test_check_engine_library_without_gpu_or_binding_is_unusable(machine: Machine) -> None:
    for runtime in ("tensorrt", "tensorrt-rtx"):
        machine.engine_library(runtime, library("9.9"), runtime)
    machine.binding("cuda-core 1.2.2")
    found = machine.run_checks()
    assert found["tensorrt"].reason == "tensorrt 9.9, but no usable NVIDIA GPU"
    assert found["tensorrt-rtx"].reason.endswith("no usable NVIDIA GPU; it can build engines for other machines")
    assert found["tensorrt"].remedy == found["NVIDIA GPU"].remedy
    machine.gpus(1)
    machine.binding(ImportError("neither PyCUDA nor cuda-core"))
    found = machine.run_checks()
    assert found["tensorrt"].reason == "tensorrt 9.9, but no usable CUDA for Python"
    assert "pip install cuda-core" in str(found["tensorrt"].remedy)


def test_run_checks_driver_error_is_reported(machine: Machine) -> None:
    machine.gpus(1)
    machine.binding(OSError("the NVIDIA driver answered cuInit with error 803"))
    finding = machine.run_checks()["CUDA for Python"]
    assert not finding.usable and "error 803" in finding.reason and finding.remedy


def found_engine(**changes: Any) -> StoredEngine:
    path = Path("engines/edit-fp16-b8/edit.fp16.engine")
    engine = StoredEngine(path, "bundle", SAMPLE, (), (), (), False, None, "")  # type: ignore[arg-type]
    return replace(engine, **changes)


def test_run_checks_engines_of_bundle_are_listed(machine: Machine) -> None:
    finding = machine.run_checks()["engines of street"]
    assert not finding.usable and finding.reason == "no engine was built for this bundle"
    assert "spmdeploy build" in str(finding.remedy)
    reasons = ("GPU: built on NVIDIA A10 (sm86), here none", "tensorrt: built with 10.3, here not installed")
    machine.engines(
        [found_engine(incompatibilities=reasons), found_engine(problems=("truncated: 3 bytes",), record=None)]
    )
    finding = machine.run_checks()["engines of street"]
    assert not finding.usable and all(reason in finding.reason for reason in (*reasons, "truncated: 3 bytes"))
    machine.engines([found_engine(incompatibilities=reasons), found_engine()])
    finding = machine.run_checks()["engines of street"]
    there = "edit-fp16-b8, built for NVIDIA GeForce RTX 3060 (sm86)"
    assert finding.usable and finding.reason.startswith(f"{there}; it cannot cascade, the bundle holds no refine graph")
    machine.engines([found_engine(), found_engine(record=replace(SAMPLE, graph="refine"))])
    assert machine.run_checks()["engines of street"].reason == there


def test_run_checks_cpu_only_bundle_names_export(machine: Machine) -> None:
    whole = open_bundle(default_model())
    on_cpu = tuple(record for record in whole.manifest.graphs if record.graph.endswith("_cpu"))
    machine.bundle = replace(whole, manifest=replace(whole.manifest, graphs=on_cpu))
    finding = machine.run_checks()["engines of street"]
    assert not finding.usable and "for CPUs only" in finding.reason and "spmdeploy export" in str(finding.remedy)


def test_check_onnxruntime_missing_cuda_library_is_named(machine: Machine, tmp_path: Path) -> None:
    machine.onnxruntime(CUDA, {"onnxruntime-gpu"})
    machine.gpus(1)
    (tmp_path / "capi").mkdir()
    (tmp_path / "capi/libonnxruntime_providers_cuda.so").write_bytes(b"")
    loaded = sys.modules["onnxruntime"]
    loaded.__file__ = str(tmp_path / "__init__.py")
    loaded.preload_dlls = lambda: print("Failed to load libcublas.so.13")  # type: ignore[attr-defined]

    def load(text: str) -> None:
        def fail(name: str) -> None:
            raise OSError(text)

        machine.patch.setattr("spmdeploy.backends.onnxruntime_graph.ctypes.CDLL", fail)

    load("libcudnn.so.9: cannot open shared object file: No such file or directory")
    finding = machine.run_checks()["onnxruntime on cuda"]
    assert not finding.usable and "libcudnn.so.9" in finding.reason and "cudnn" in str(finding.remedy)
    load("undefined symbol: Provider_GetHost")  # which ONNX Runtime itself will bring
    assert machine.run_checks()["onnxruntime on cuda"].usable

"""The doctor in machines that are simulated: what is usable, why not, and what to do."""

from __future__ import annotations

import builtins
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from spmdeploy import cli, doctor
from spmdeploy.runtime import cuda


class Machine:
    """What is installed and plugged in, for the doctor to find; change it, then `examine`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.patch = monkeypatch
        self.gpus(OSError("no NVIDIA driver (libcuda.so.1: no such file)"))
        self.onnxruntime(["CPUExecutionProvider"], {"onnxruntime"})

    def gpus(self, answer: int | OSError) -> None:
        def visible_gpus() -> int:
            if isinstance(answer, OSError):
                raise answer
            return answer

        self.patch.setattr(doctor, "visible_gpus", visible_gpus)

    def onnxruntime(self, providers: list[str] | None, packages: set[str]) -> None:
        library = SimpleNamespace(__version__="9.9", __spec__="here", get_available_providers=lambda: providers)
        # None in sys.modules makes an import fail, as if the package were not there.
        self.patch.setitem(sys.modules, "onnxruntime", None if providers is None else library)
        self.patch.setattr(doctor, "_installed", lambda: packages)

    def without(self, *packages: str) -> None:
        real = doctor.importlib.util.find_spec
        self.patch.setattr(
            doctor.importlib.util, "find_spec", lambda name, package=None: None if name in packages else real(name)
        )

    def examine(self) -> dict[str, doctor.Finding]:
        return {finding.name: finding for finding in doctor.examine()}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


CUDA = ["CUDAExecutionProvider", "CPUExecutionProvider"]


def test_a_plain_computer(machine: Machine) -> None:
    found = machine.examine()
    assert found["onnxruntime on cpu"].usable and found["onnxruntime on cpu"].reason == "onnxruntime 9.9"
    gpu, on_cuda = found["NVIDIA GPU"], found["onnxruntime on cuda"]
    assert not gpu.usable and "no NVIDIA driver" in gpu.reason and "driver" in str(gpu.remedy)
    assert not on_cuda.usable and "built without CUDA" in on_cuda.reason and "spmdeploy[gpu]" in str(on_cuda.remedy)


def test_nothing_that_runs_graphs(machine: Machine) -> None:
    machine.onnxruntime(None, set())
    found = machine.examine()
    for name in ("onnxruntime on cpu", "onnxruntime on cuda"):
        assert not found[name].usable and "onnxruntime" in found[name].reason
    assert 'pip install "spmdeploy[cpu]"' in str(found["onnxruntime on cpu"].remedy)


def test_both_packages_at_once(machine: Machine) -> None:
    machine.onnxruntime(CUDA, {"onnxruntime", "onnxruntime-gpu"})
    machine.gpus(1)
    found = machine.examine()
    on_cuda = found["onnxruntime on cuda"]
    assert not on_cuda.usable and "both installed" in on_cuda.reason
    assert str(on_cuda.remedy).startswith("pip uninstall onnxruntime onnxruntime-gpu")
    assert "mixed with onnxruntime-gpu" in found["onnxruntime on cpu"].reason


@pytest.mark.parametrize("answer", [0, OSError("the NVIDIA driver answered cuInit with error 100")], ids=str)
def test_a_cuda_build_without_a_gpu(answer: int | OSError, machine: Machine) -> None:
    machine.onnxruntime(CUDA, {"onnxruntime-gpu"})
    machine.gpus(answer)
    found = machine.examine()
    assert not found["onnxruntime on cuda"].usable
    assert found["onnxruntime on cuda"].reason == found["NVIDIA GPU"].reason
    assert found["onnxruntime on cpu"].usable


def test_a_gpu_and_the_package_for_it(machine: Machine) -> None:
    machine.onnxruntime(CUDA, {"onnxruntime-gpu"})
    machine.gpus(2)
    found = machine.examine()
    assert found["NVIDIA GPU"].usable and found["NVIDIA GPU"].reason == "2 visible"
    assert found["onnxruntime on cuda"].usable and "verify --device cuda:0" in found["onnxruntime on cuda"].reason


@pytest.mark.parametrize(
    ("missing", "name"), [("torch", "torch"), ("onnx", "torch"), ("onnxscript", "export"), ("safetensors", "export")]
)
def test_what_export_needs(missing: str, name: str, machine: Machine) -> None:
    machine.without(missing)
    finding = machine.examine()[name]
    assert not finding.usable and finding.reason == f"{missing} is not installed" and "export" in str(finding.remedy)


def test_examining_imports_nothing_heavy(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    imported: list[str] = []
    real = builtins.__import__

    def remember(name: str, *arguments: Any, **options: Any) -> Any:
        imported.append(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", remember)
    machine.examine()
    assert {"torch", "onnx", "tensorrt"}.isdisjoint(imported) and "onnxruntime" in imported


def test_the_command(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    machine.onnxruntime(None, set())
    assert cli.main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("onnxruntime on cpu   not usable") for line in lines)
    assert any(line.startswith("onnxruntime on cpu: ") and "pip install" in line for line in lines)
    assert cli.main(["doctor", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["schema"] == "spmdeploy.doctor/1" and set(told) == {"schema", "machine", "findings"}
    assert {"system", "machine", "python", "cores"} <= set(told["machine"])
    assert set(told["findings"][0]) == {"name", "usable", "reason", "remedy"}


# --------------------------------------------------------------------------------------------------- asking the driver


class Driver:
    """libcuda with the answers it is to give."""

    def __init__(self, started: int = 0, counted: int = 0, count: int = 0) -> None:
        self.cuInit = lambda flags: started
        self.counted, self.count = counted, count

    def cuDeviceGetCount(self, pointer: Any) -> int:  # noqa: N802 (NVIDIA's name)
        pointer._obj.value = self.count
        return self.counted

    def cuDeviceGet(self, pointer: Any, index: int) -> int:  # noqa: N802
        pointer._obj.value = index
        return 0 if index < self.count else 101

    def cuDeviceGetName(self, name: Any, size: int, device: Any) -> int:  # noqa: N802
        name.value = f"GPU {device}".encode()[:size]
        return 0

    def cuDeviceGetAttribute(self, pointer: Any, attribute: int, device: Any) -> int:  # noqa: N802
        pointer._obj.value = {75: 8, 76: 6}[attribute]
        return 0

    def cuDriverGetVersion(self, pointer: Any) -> int:  # noqa: N802
        pointer._obj.value = 12080
        return 0


def test_the_driver_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    for driver, answer in ((Driver(count=3), 3), (Driver(), 0)):
        monkeypatch.setattr(cuda.ctypes, "CDLL", lambda name, driver=driver: driver)
        assert cuda.visible_gpus() == answer
    for driver, words in ((Driver(started=100), "cuInit with error 100"), (Driver(counted=3), "error 3")):
        monkeypatch.setattr(cuda.ctypes, "CDLL", lambda name, driver=driver: driver)
        with pytest.raises(OSError, match=words):
            cuda.visible_gpus()


def test_the_driver_describes_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cuda.ctypes, "CDLL", lambda name: Driver(count=2))
    monkeypatch.setattr(cuda, "_KERNEL_MODULE_VERSION", tmp_path / "version")
    assert cuda.gpu_facts(1) == cuda.GpuFacts("GPU 1", "8.6", "12.8", None)
    (tmp_path / "version").write_text("580.95.05\n")
    assert cuda.gpu_facts().driver == "580.95.05"
    with pytest.raises(OSError, match="cuDeviceGet with error 101"):
        cuda.gpu_facts(2)


def test_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise OSError(f"{name}: no such file")

    monkeypatch.setattr(cuda.ctypes, "CDLL", fail)
    with pytest.raises(OSError, match="no NVIDIA driver"):
        cuda.visible_gpus()

"""The list of GPUs and the classes of the driver's errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from spmdeploy.gpu import driver
from spmdeploy.gpu.driver import CudaCaptureError, CudaError, CudaMemoryError, MissingFunctionError, cuda_error
from tests.simulators.simulated_gpu import SimulatedGpu
from tests.simulators.simulated_packages import plug_in


def test_gpu_facts_of_a_gpu_are_the_drivers(monkeypatch: pytest.MonkeyPatch) -> None:
    plug_in(monkeypatch, SimulatedGpu(name="NVIDIA H100", capability="9.0"), "")
    facts = driver.gpu_facts()
    assert (facts.name, facts.compute_capability, facts.cuda) == ("NVIDIA H100", "9.0", "13.0")
    assert driver.visible_gpus() == 1 and driver.gpu_uuid() == "GPU-00010203-0405-0607-0809-0a0b0c0d0e0f"


def test_visible_gpus_without_a_driver_gives_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(driver.ctypes, "CDLL", missing)
    with pytest.raises(OSError, match=r"no NVIDIA driver \(.*cannot open"):
        driver.visible_gpus()


def test_driver_without_the_function_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    plug_in(monkeypatch, SimulatedGpu(), "")
    with pytest.raises(MissingFunctionError, match="no function cuNewest"):
        driver.Driver().call("cuNewest")


@pytest.mark.parametrize(
    ("kind", "text", "code"),
    [
        (CudaMemoryError, "", 2),
        (CudaMemoryError, "CUDA_ERROR_OUT_OF_MEMORY: The API call failed", 0),
        (CudaMemoryError, "cuMemAlloc failed: out of memory", 0),
        (CudaCaptureError, "", 901),
        (CudaCaptureError, "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED", 0),
        (CudaCaptureError, "Build process encountered an error and has been invalidated.", 0),
        (MissingFunctionError, "CUDA_ERROR_NOT_FOUND: This indicates that a named symbol was not found.", 0),
        (CudaError, "CUDA_ERROR_ILLEGAL_ADDRESS", 0),
    ],
)
def test_cuda_error_of_a_text_or_code_has_its_class(kind: type[CudaError], text: str, code: int) -> None:
    assert type(cuda_error("cuCall", text, code)) is kind


class Driver:
    """libcuda with given answers."""

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


def test_visible_gpus_returns_count_of_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    for library, answer in ((Driver(count=3), 3), (Driver(), 0)):
        monkeypatch.setattr(driver.ctypes, "CDLL", lambda name, library=library: library)
        assert driver.visible_gpus() == answer
    for library, text in ((Driver(started=100), "cuInit with error 100"), (Driver(counted=3), "error 3")):
        monkeypatch.setattr(driver.ctypes, "CDLL", lambda name, library=library: library)
        with pytest.raises(OSError, match=text):
            driver.visible_gpus()


def test_gpu_facts_describe_the_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(driver.ctypes, "CDLL", lambda name: Driver(count=2))
    monkeypatch.setattr(driver, "_KERNEL_MODULE_VERSION", tmp_path / "version")
    assert driver.gpu_facts(1) == driver.GpuFacts("GPU 1", "8.6", "12.8", None)
    (tmp_path / "version").write_text("580.95.05\n")
    assert driver.gpu_facts().driver == "580.95.05"
    with pytest.raises(OSError, match="cuDeviceGet with error 101"):
        driver.gpu_facts(2)


def test_visible_gpus_without_driver_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise OSError(f"{name}: no such file")

    monkeypatch.setattr(driver.ctypes, "CDLL", fail)
    with pytest.raises(OSError, match="no NVIDIA driver"):
        driver.visible_gpus()

"""The list of GPUs and the classes of the driver's errors."""

from __future__ import annotations

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

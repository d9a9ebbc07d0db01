"""GPUs through a fake nvidia-ml-py: properties, state, energy, and what boards and drivers do not report."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from spmdeploy.bench.nvml import GpuState, _gpu_records, gpu_states, hash_uuid, nvml


def fake_nvml(**answers: Any) -> ModuleType:
    """The module pynvml with one GPU; a function given as None is not supported."""
    library: Any = ModuleType("pynvml")
    library.NVMLError = type("NVMLError", (Exception,), {})
    library.NVML_CLOCK_SM, library.NVML_CLOCK_MEM, library.NVML_TEMPERATURE_GPU = "sm", "memory", "gpu"
    library.closed = 0
    clocks = {"sm": 1700, "memory": 7000}
    functions = {
        "nvmlInit": lambda: None,
        "nvmlDeviceGetCount": lambda: 1,
        "nvmlDeviceGetHandleByIndex": lambda index: f"gpu {index}",
        "nvmlDeviceGetHandleByUUID": lambda uuid: "gpu 0",
        "nvmlDeviceGetUUID": lambda handle: "GPU-12345678-aaaa",
        "nvmlDeviceGetName": lambda handle: b"NVIDIA Imaginary",
        "nvmlDeviceGetCudaComputeCapability": lambda handle: (8, 6),
        "nvmlDeviceGetMemoryInfo": lambda handle: SimpleNamespace(total=8e9),
        "nvmlSystemGetDriverVersion": lambda: "575.1",
        "nvmlDeviceGetPowerUsage": lambda handle: 91_500,
        "nvmlDeviceGetEnforcedPowerLimit": lambda handle: 170_000,
        "nvmlDeviceGetCurrentClocksEventReasons": lambda handle: 0x4 | 0x40,
        "nvmlDeviceGetClockInfo": lambda handle, which: clocks[which],
        "nvmlDeviceGetTemperature": lambda handle, which: 71,
        "nvmlDeviceGetComputeRunningProcesses": lambda handle: [SimpleNamespace(pid=7, usedGpuMemory=123)],
        "nvmlDeviceGetTotalEnergyConsumption": lambda handle: 2500,
    } | answers

    def answering(value: Any) -> Any:
        def answer(*arguments: Any) -> Any:
            if value is None:
                raise library.NVMLError("not supported")
            return value(*arguments)

        return answer

    for name, value in functions.items():
        setattr(library, name, answering(value))

    def shut_down() -> None:
        library.closed += 1

    library.nvmlShutdown = shut_down
    return library


def test_nvml_supported_gpu_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    library = fake_nvml()
    monkeypatch.setitem(sys.modules, "pynvml", library)
    with nvml() as opened:
        (facts,), (state,) = tuple(_gpu_records(opened)), tuple(gpu_states(opened))
        meter = opened.meter("GPU-12345678-aaaa")
        assert meter is not None
        assert (meter.joules(), meter.memory_of(7), meter.memory_of(8)) == (2.5, 123, None)
    assert library.closed == 1
    assert (facts.name, facts.sm, facts.driver, facts.memory_gb) == ("NVIDIA Imaginary", "8.6", "575.1", 8.0)
    assert facts.uuid_hash == hash_uuid("GPU-12345678-aaaa") and "12345678" not in str(facts)
    assert (state.sm_mhz, state.memory_mhz, state.temperature_c) == (1700, 7000, 71)
    assert (state.watts, state.watts_limit, state.processes) == (91.5, 170.0, 1)
    assert state.slowed_by == ("power cap", "thermal slowdown (hardware)") and state.throttled


@pytest.mark.parametrize(
    ("missing", "field"),
    [
        ("nvmlDeviceGetPowerUsage", "watts"),
        ("nvmlDeviceGetTemperature", "temperature_c"),
        ("nvmlDeviceGetComputeRunningProcesses", "processes"),
    ],
)
def test_nvml_unsupported_query_is_none(missing: str, field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(**{missing: None}))
    with nvml() as opened:
        (state,) = gpu_states(opened)
    assert getattr(state, field) is None and state.sm_mhz == 1700


def test_nvml_old_driver_uses_older_name(monkeypatch: pytest.MonkeyPatch) -> None:
    library = fake_nvml(nvmlDeviceGetCurrentClocksThrottleReasons=lambda handle: 0x1)
    del library.nvmlDeviceGetCurrentClocksEventReasons
    monkeypatch.setitem(sys.modules, "pynvml", library)
    with nvml() as opened:
        (state,) = gpu_states(opened)
    assert state.slowed_by == ("idle",) and not state.throttled


def test_nvml_without_energy_counter_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(nvmlDeviceGetTotalEnergyConsumption=None))
    with nvml() as opened:
        meter = opened.meter("GPU-12345678-aaaa")
        assert meter is not None and meter.joules() is None


@pytest.mark.parametrize(("library", "text"), [(None, "nvidia-ml-py"), (fake_nvml(nvmlInit=None), "not supported")])
def test_nvml_unavailable_says_why(library: ModuleType | None, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", library)
    with nvml() as opened:
        assert opened.note is not None and text in opened.note
        assert list(_gpu_records(opened)) == [] and list(gpu_states(opened)) == [] and opened.meter("x") is None


def test_gpu_state_idle_is_not_throttled() -> None:
    assert not GpuState(None, None, None, None, None, ("idle", "application clocks"), None).throttled

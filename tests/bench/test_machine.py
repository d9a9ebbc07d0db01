"""What is said of a machine, read from file systems that are made up."""

from __future__ import annotations

import json
import os
import socket
from dataclasses import asdict
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from spmdeploy.bench import machine as bench_machine
from spmdeploy.bench.machine import (
    BackgroundLoad,
    GpuState,
    LoadMeter,
    Nvml,
    NvmlMissingError,
    describe_jetson,
    describe_machine,
    differences,
    hash_of,
    read_state,
    usable_cores,
)

CPUINFO = """processor\t: 0
model name\t: Imaginary CPU 9000
flags\t\t: fpu avx2 avx512f avx512_vnni sse
cpu MHz\t\t: 2600.500
processor\t: 1
model name\t: Imaginary CPU 9000
cpu MHz\t\t: 1300.000
"""


def write(root: Path, name: str, text: str) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(text)


def test_a_machine_without_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "proc/cpuinfo", CPUINFO)
    write(tmp_path, "proc/meminfo", "MemTotal:       16000000 kB\nMemFree: 1 kB\n")
    write(tmp_path, "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor", "performance\n")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    found = describe_machine(tmp_path)
    assert found.cpu.model == "Imaginary CPU 9000"
    assert found.cpu.features == ("avx2", "avx512f", "avx512_vnni")
    assert (found.cpu.governors, found.cpu.cores_used) == (("performance",), len(usable_cores()))
    assert found.memory_gb == pytest.approx(16.4)
    assert found.variables["OMP_NUM_THREADS"] == "2" and "numpy" in found.libraries
    assert found.jetson is None and "Imaginary CPU 9000" in found.title()
    assert read_state(tmp_path).cpu_mhz == (2600.5, 1300.0)


def test_nothing_is_told_is_no_error(tmp_path: Path) -> None:
    found = describe_machine(tmp_path)
    assert found.memory_gb is None and found.cpu.features == () and found.cpu.model
    state = read_state(tmp_path)
    assert state.cpu_mhz == () and state.cpu_throttled is None and state.gpus == ()


def test_nobody_is_named() -> None:
    text = json.dumps([asdict(describe_machine()), asdict(read_state())])
    assert socket.gethostname() not in text or len(socket.gethostname()) < 4
    assert str(Path.home()) not in text and str(Path.cwd()) not in text
    assert os.uname().release not in text


def test_jetson(tmp_path: Path) -> None:
    assert describe_jetson(tmp_path) is None
    write(tmp_path, "proc/device-tree/model", "NVIDIA Jetson AGX Orin Developer Kit\0")
    write(tmp_path, "etc/nv_tegra_release", "# R36 (release), REVISION: 4.3\nmore\n")
    write(tmp_path, "var/lib/nvpmodel/status", "pmode:0000\n")
    for core in (0, 1):
        folder = f"sys/devices/system/cpu/cpu{core}/cpufreq"
        write(tmp_path, f"{folder}/scaling_min_freq", "729600\n")
        write(tmp_path, f"{folder}/scaling_max_freq", "2201600\n")
    jetson = describe_jetson(tmp_path)
    assert jetson is not None
    assert jetson.model == "NVIDIA Jetson AGX Orin Developer Kit" and jetson.power_mode == "pmode:0000"
    assert jetson.release == "R36 (release), REVISION: 4.3" and not jetson.clocks_locked
    for core in (0, 1):
        write(tmp_path, f"sys/devices/system/cpu/cpu{core}/cpufreq/scaling_min_freq", "2201600\n")
    again = describe_jetson(tmp_path)
    assert again is not None and again.clocks_locked


# ---------------------------------------------------------------------------------------------------------- other load


class _Times:
    """The clocks that a load meter looks at, moved by hand."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root
        self.seconds, self.own = 100.0, 5.0
        monkeypatch.setattr(bench_machine.time, "monotonic", lambda: self.seconds)
        monkeypatch.setattr(bench_machine, "own_cpu_seconds", lambda: self.own)
        self.busy = dict.fromkeys(sorted(usable_cores()), 0.0)
        self.write()

    def write(self) -> None:
        tick = os.sysconf("SC_CLK_TCK")
        lines = [f"cpu{core} {round(spent * tick)} 0 0 9999 77 0 0 0 0 0" for core, spent in self.busy.items()]
        # A core that is not ours, and the sum of all, which must not count.
        write(self.root, "proc/stat", "\n".join(["cpu 1 2 3 4 5 6 7 8 9 10", *lines, "cpu777 99999 0 0 0 0 0 0 0"]))


def test_load_of_others_is_what_we_did_not_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times = _Times(tmp_path, monkeypatch)
    meter = LoadMeter(tmp_path)
    cores = len(times.busy)
    times.seconds += 10
    times.own += 4 * cores
    times.busy = dict.fromkeys(times.busy, 7.0)  # of 10 seconds, 4 were ours on every core
    times.write()
    assert meter.other_load() == BackgroundLoad(0.3) and meter.other_load().is_significant
    times.busy = dict.fromkeys(times.busy, 4.1)
    times.write()
    assert meter.other_load().cpu_share == pytest.approx(0.01) and not meter.other_load().is_significant


def test_load_is_unknown_where_the_system_does_not_tell(tmp_path: Path) -> None:
    assert LoadMeter(tmp_path).other_load() == BackgroundLoad(None) and not BackgroundLoad(None).is_significant


def test_differences() -> None:
    assert differences({"a": 1, "b": 2}, {"a": 1, "b": 3, "c": None}) == ["b: 2 → 3"]


# ---------------------------------------------------------------------------------------------------------------- NVML


def fake_nvml(**answers: Any) -> ModuleType:
    """The module pynvml with one GPU; an answer that is an exception is raised."""
    library: Any = ModuleType("pynvml")
    library.NVMLError = type("NVMLError", (Exception,), {})
    library.NVML_CLOCK_SM, library.NVML_CLOCK_MEM, library.NVML_TEMPERATURE_GPU = "sm", "memory", "gpu"
    library.closed = 0
    clocks = {"sm": 1700, "memory": 7000}
    told = {
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

    for name, value in told.items():
        setattr(library, name, answering(value))

    def shut_down() -> None:
        library.closed += 1

    library.nvmlShutdown = shut_down
    return library


def test_a_gpu_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    library = fake_nvml()
    monkeypatch.setitem(__import__("sys").modules, "pynvml", library)
    with Nvml(required=True) as nvml:
        (facts,), (state,) = tuple(nvml.facts()), tuple(nvml.states())
        meter = nvml.meter("GPU-12345678-aaaa")
        assert meter is not None
        assert (meter.joules(), meter.memory_of(7), meter.memory_of(8)) == (2.5, 123, None)
    assert library.closed == 1
    assert (facts.name, facts.sm, facts.driver, facts.memory_gb) == ("NVIDIA Imaginary", "8.6", "575.1", 8.0)
    assert facts.uuid_hash == hash_of("GPU-12345678-aaaa") and "12345678" not in str(facts)
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
def test_what_a_board_does_not_tell_is_none(missing: str, field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pynvml", fake_nvml(**{missing: None}))
    with Nvml() as nvml:
        (state,) = nvml.states()
    assert getattr(state, field) is None and state.sm_mhz == 1700


def test_the_older_name_of_the_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    library = fake_nvml(nvmlDeviceGetCurrentClocksThrottleReasons=lambda handle: 0x1)
    del library.nvmlDeviceGetCurrentClocksEventReasons
    monkeypatch.setitem(__import__("sys").modules, "pynvml", library)
    with Nvml() as nvml:
        (state,) = nvml.states()
    assert state.slowed_by == ("idle",) and not state.throttled


def test_no_energy_counter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pynvml", fake_nvml(nvmlDeviceGetTotalEnergyConsumption=None))
    with Nvml() as nvml:
        meter = nvml.meter("GPU-12345678-aaaa")
        assert meter is not None and meter.joules() is None


@pytest.mark.parametrize(("library", "words"), [(None, "nvidia-ml-py"), (fake_nvml(nvmlInit=None), "not supported")])
def test_without_nvml(library: ModuleType | None, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pynvml", library)
    with Nvml() as nvml:
        assert not nvml.usable and list(nvml.facts()) == [] and list(nvml.states()) == [] and nvml.meter("x") is None
    with pytest.raises(NvmlMissingError, match=words), Nvml(required=True):
        pass


def test_a_gpu_that_idles_is_not_throttled() -> None:
    assert not GpuState(None, None, None, None, None, ("idle", "application clocks"), None).throttled

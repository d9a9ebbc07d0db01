"""Description of the machine, with fake libraries and file systems."""

from __future__ import annotations

import json
import os
import socket
import sys
from collections import namedtuple
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from spmdeploy.bench import machine as bench_machine
from spmdeploy.bench.machine import (
    BackgroundLoad,
    LoadMeter,
    describe_jetson,
    describe_machine,
    differences,
    read_state,
    require_bench_extra,
    usable_cores,
)
from spmdeploy.errors import UnavailableError

CPU_INFO = {"brand_raw": "Imaginary CPU 9000", "flags": ["avx2", "avx512f", "avx512_vnni", "amx_bf16", "sse"]}
Frequency = namedtuple("Frequency", "current")


@pytest.fixture
def cpu_info(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """The answer of py-cpuinfo, which takes a second."""
    info: dict[str, Any] = dict(CPU_INFO)
    library: Any = ModuleType("cpuinfo")
    library.get_cpu_info = lambda: info
    monkeypatch.setitem(sys.modules, "cpuinfo", library)
    bench_machine._cpu_info.cache_clear()
    yield info
    bench_machine._cpu_info.cache_clear()


def write(root: Path, name: str, text: str) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(text)


def test_describe_machine_without_gpu_names_cpu_features(
    cpu_info: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor", "performance\n")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(total=16_384_000_000))
    found = describe_machine(tmp_path)
    assert found.cpu.model == "Imaginary CPU 9000"
    assert found.cpu.features == ("avx2", "avx512f", "avx512_vnni", "amx_bf16")
    assert (found.cpu.governors, found.cpu.cores_used) == (("performance",), len(usable_cores()))
    assert found.memory_gb == pytest.approx(16.4)
    assert found.variables["OMP_NUM_THREADS"] == "2" and "numpy" in found.libraries
    assert found.jetson is None and "Imaginary CPU 9000" in found.title()


def test_read_state_lists_core_frequencies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psutil.cpu_freq", lambda percpu: [Frequency(2600.5), Frequency(1300.0)])
    write(tmp_path, "sys/devices/system/cpu/cpu0/thermal_throttle/core_throttle_count", "3\n")
    state = read_state(tmp_path)
    assert state.cpu_mhz == (2600.5, 1300.0) and state.cpu_throttled == 3


def test_describe_machine_unknown_properties_are_empty(
    cpu_info: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu_info.clear()

    def unsupported(percpu: bool) -> None:
        raise NotImplementedError

    monkeypatch.setattr("psutil.cpu_freq", unsupported)
    found = describe_machine(tmp_path)
    assert found.cpu.features == () and found.cpu.model
    state = read_state(tmp_path)
    assert state.cpu_mhz == () and state.cpu_throttled is None and state.gpus == ()


def test_describe_machine_contains_no_names_of_host_or_user(cpu_info: dict[str, Any]) -> None:
    text = json.dumps([asdict(describe_machine()), asdict(read_state())])
    assert socket.gethostname() not in text or len(socket.gethostname()) < 4
    assert str(Path.home()) not in text and str(Path.cwd()) not in text
    assert os.uname().release not in text


@pytest.mark.parametrize(("module", "package"), [("psutil", "psutil"), ("cpuinfo", "py-cpuinfo")])
def test_require_bench_extra_missing_package_names_pip_command(
    module: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UnavailableError, match=f"need the package {package}") as caught:
        require_bench_extra()
    assert caught.value.hint == 'pip install "spmdeploy[bench]"'


def test_describe_jetson_reads_release_and_power_mode(tmp_path: Path) -> None:
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


class Clocks:
    """The clocks that a load meter reads, set by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seconds, self.own = 100.0, 5.0
        self.busy = dict.fromkeys(sorted(usable_cores()), 0.0)
        monkeypatch.setattr(bench_machine.time, "monotonic", lambda: self.seconds)
        monkeypatch.setattr(bench_machine, "own_cpu_seconds", lambda: self.own)
        monkeypatch.setattr("psutil.cpu_times", self.cpu_times)

    def cpu_times(self, percpu: bool) -> list[SimpleNamespace]:
        unused = SimpleNamespace(user=9999.0, nice=0.0, system=0.0, idle=0.0)  # not in the affinity mask
        cores = [SimpleNamespace(user=self.busy[core], nice=0, system=0, idle=99, iowait=77) for core in self.busy]
        assert sorted(self.busy) == list(range(len(self.busy))) and percpu
        return [*cores, unused]


def test_load_meter_counts_what_own_processes_did_not_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_machine, "usable_cores", lambda: frozenset({0, 1}))
    monkeypatch.setattr(sys.modules[__name__], "usable_cores", lambda: frozenset({0, 1}))
    clocks = Clocks(monkeypatch)
    meter = LoadMeter()
    cores = len(clocks.busy)
    clocks.seconds += 10
    clocks.own += 4 * cores
    clocks.busy = dict.fromkeys(clocks.busy, 7.0)  # of 10 seconds, 4 were ours on every core
    assert meter.other_load() == BackgroundLoad(0.3) and meter.other_load().is_significant
    clocks.busy = dict.fromkeys(clocks.busy, 4.1)
    assert meter.other_load().cpu_share == pytest.approx(0.01) and not meter.other_load().is_significant
    assert not BackgroundLoad(None).is_significant  # older records


def test_differences_lists_changed_entries() -> None:
    assert differences({"a": 1, "b": 2}, {"a": 1, "b": 3, "c": None}) == ["b: 2 → 3"]

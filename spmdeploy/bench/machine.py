"""Describes the machine a benchmark ran on, without identifying information.

No user, host, path or serial number: a GPU's UUID is hashed, a kernel is identified by its first two version numbers.
Needs the extra `bench`: psutil, py-cpuinfo, and nvidia-ml-py for GPUs.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import os
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spmdeploy.bench.nvml import GpuRecord, GpuState, describe_gpus, gpu_states, nvml
from spmdeploy.errors import UnavailableError

LIBRARIES = (
    "numpy",
    "onnxruntime",
    "onnxruntime-gpu",
    "openvino",
    "torch",
    "triton",
    "tensorrt",
    "tensorrt-rtx",
    "cuda-core",
    "cuda-bindings",
    "pycuda",
)
CPU_FEATURES = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "avx_vnni",
    "amx_tile",
    "amx_bf16",
    "amx_int8",
    "asimddp",
    "i8mm",
    "bf16",
)
"""Instruction sets that decide which kernels a library picks."""
_SPEED_VARIABLES = (
    "OMP_NUM_THREADS",
    "OMP_WAIT_POLICY",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "CUDA_LAUNCH_BLOCKING",
    "NVIDIA_TF32_OVERRIDE",
)
MAX_BACKGROUND_LOAD = 0.05
"""Share of the cores above which the load of other processes invalidates figures."""
_CPUFREQ = "sys/devices/system/cpu/cpu[0-9]*/cpufreq"


@dataclass(frozen=True)
class Cpu:
    model: str
    architecture: str
    cores: int
    """Logical cores of the machine."""
    cores_used: int
    """Logical cores in this process's affinity mask."""
    features: tuple[str, ...]
    """Those of `CPU_FEATURES` that the processor has."""
    governors: tuple[str, ...]
    """Frequency governors; empty if unknown."""


@dataclass(frozen=True)
class Jetson:
    model: str
    release: str | None
    """First line of /etc/nv_tegra_release."""
    power_mode: str | None
    """As stored by nvpmodel."""
    clocks_locked: bool
    """Whether every core's minimum frequency equals its maximum, as set by jetson_clocks."""


@dataclass(frozen=True)
class Machine:
    """Constant properties of the machine."""

    cpu: Cpu
    memory_gb: float | None
    gpus: tuple[GpuRecord, ...]
    gpu_note: str | None
    """Why GPUs could not be queried."""
    jetson: Jetson | None
    system: str
    python: str
    libraries: dict[str, str]
    variables: dict[str, str]
    """Environment variables that affect speed, where set."""

    def hardware(self) -> dict[str, object]:
        """Properties that two records must share for their speeds to be comparable."""
        return {
            "CPU": self.cpu.model,
            "architecture": self.cpu.architecture,
            "cores": self.cpu.cores,
            "cores used": self.cpu.cores_used,
            "GPUs": [f"{gpu.name} {gpu.uuid_hash}" for gpu in self.gpus],
            "Jetson": None if self.jetson is None else f"{self.jetson.model}, power mode {self.jetson.power_mode}",
        }

    def title(self) -> str:
        """One line for tables and charts."""
        cores = f"{self.cpu.cores_used} core{'s' * (self.cpu.cores_used != 1)} of {self.cpu.model}"
        return ", ".join([cores, *(gpu.name for gpu in self.gpus)])


@dataclass(frozen=True)
class State:
    """Changing properties of the machine, read before and after a run."""

    load_average: float | None
    """Runnable processes, averaged over the last minute."""
    cpu_mhz: tuple[float, ...]
    """Current frequency of every core."""
    cpu_throttled: int | None
    """Thermal throttling events of all cores since the system started."""
    gpus: tuple[GpuState, ...]


@dataclass(frozen=True)
class BackgroundLoad:
    """CPU usage of other processes during the run."""

    cpu_share: float | None
    """Share of this process's cores, 0..1; None if unknown."""

    @property
    def is_significant(self) -> bool:
        """Whether other processes used more than `MAX_BACKGROUND_LOAD` of the cores."""
        return self.cpu_share is not None and self.cpu_share > MAX_BACKGROUND_LOAD


def require_bench_extra() -> None:
    """Raises UnavailableError naming the extra where psutil or py-cpuinfo is not installed."""
    _psutil()
    _library("cpuinfo", "py-cpuinfo")


def describe_machine(root: Path = Path("/")) -> Machine:
    """Describe the machine without identifying it.

    Args:
        root: Of the file system, for tests.

    Raises:
        UnavailableError: The extra `bench` is not installed.
    """
    model, features = _cpu_info()
    gpus, note = describe_gpus()
    return Machine(
        cpu=Cpu(
            model=model,
            architecture=platform.machine(),
            cores=os.cpu_count() or 1,
            cores_used=len(usable_cores()),
            features=tuple(name for name in CPU_FEATURES if name in features),
            governors=tuple(sorted(set(_read_all(root, f"{_CPUFREQ}/scaling_governor")))),
        ),
        memory_gb=round(_psutil().virtual_memory().total / 1e9, 1),
        gpus=gpus,
        gpu_note=note,
        jetson=describe_jetson(root),
        system=f"{platform.system()} {'.'.join(platform.release().split('.')[:2])}",
        python=platform.python_version(),
        libraries=library_versions(),
        variables={name: os.environ[name] for name in _SPEED_VARIABLES if name in os.environ},
    )


def describe_jetson(root: Path = Path("/")) -> Jetson | None:
    """None on other machines."""
    model = (_read(root / "proc/device-tree/model") or "").rstrip("\0\n")
    release = _read(root / "etc/nv_tegra_release")
    if release is None and "jetson" not in model.lower():
        return None
    mode = _read(root / "var/lib/nvpmodel/status")
    lowest, highest = (_read_all(root, f"{_CPUFREQ}/scaling_{end}_freq") for end in ("min", "max"))
    return Jetson(
        model=model or "Jetson",
        release=None if release is None else release.splitlines()[0].lstrip("# "),
        power_mode=None if mode is None else mode.strip(),
        clocks_locked=bool(lowest) and lowest == highest,
    )


def read_state(root: Path = Path("/")) -> State:
    """Current state. Raises UnavailableError without the extra `bench`."""
    psutil = _psutil()
    throttled = _read_all(root, "sys/devices/system/cpu/cpu[0-9]*/thermal_throttle/core_throttle_count")
    with nvml() as library:
        gpus = tuple(gpu_states(library))
    return State(
        load_average=round(psutil.getloadavg()[0], 2),
        cpu_mhz=tuple(float(core.current) for core in _cpu_frequencies(psutil)),
        cpu_throttled=sum(map(int, throttled)) if throttled else None,
        gpus=gpus,
    )


def library_versions() -> dict[str, str]:
    """Versions of the installed `LIBRARIES`, without importing them."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def usable_cores() -> frozenset[int]:
    """Logical cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


class LoadMeter:
    """Measures how much of our cores other processes use, from creation to `other_load`.

    The busy time of every core minus the CPU time of our own processes.
    """

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._busy = _busy_seconds()
        self._own = own_cpu_seconds()

    def other_load(self) -> BackgroundLoad:
        """Call after our own child processes have ended: their CPU time is unknown before."""
        elapsed = (time.monotonic() - self._started) * len(usable_cores())
        others = _busy_seconds() - self._busy - (own_cpu_seconds() - self._own)
        return BackgroundLoad(round(min(1.0, max(0.0, others / max(elapsed, 1e-9))), 4))


def own_cpu_seconds() -> float:
    """CPU time of this process and of its terminated children."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def differences(one: Mapping[str, object], other: Mapping[str, object]) -> list[str]:
    """Entries in which two mappings differ, as `name: a → b`."""
    names = [*one, *(name for name in other if name not in one)]
    return [f"{name}: {one.get(name)} → {other.get(name)}" for name in names if one.get(name) != other.get(name)]


def _busy_seconds() -> float:
    """CPU time that the usable cores have spent on any process."""
    cores = usable_cores()
    times = _psutil().cpu_times(percpu=True)
    return float(sum(_busy(core) for number, core in enumerate(times) if number in cores))


def _busy(core: Any) -> float:
    """Idle and iowait are no work; steal belongs to other virtual machines, guest is part of user."""
    return float(sum(getattr(core, name, 0.0) for name in ("user", "nice", "system", "irq", "softirq")))


def _psutil() -> Any:
    return _library("psutil", "psutil")


def _library(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as exc:
        raise UnavailableError(f"benchmarks need the package {package}", 'pip install "spmdeploy[bench]"') from exc


@functools.cache
def _cpu_info() -> tuple[str, frozenset[str]]:
    """Model name and feature flags of the processor."""
    info = _library("cpuinfo", "py-cpuinfo").get_cpu_info()
    model = info.get("brand_raw") or info.get("hardware_raw") or platform.processor() or platform.machine()
    return model, frozenset(info.get("flags", ()))


def _cpu_frequencies(psutil: Any) -> list[Any]:
    try:
        return list(psutil.cpu_freq(percpu=True) or ())
    except (AttributeError, NotImplementedError, OSError):  # virtual machines and ARM boards without cpufreq
        return []


def _read_all(root: Path, pattern: str) -> list[str]:
    """Contents of all matching files, in the order of their paths."""
    return [text.strip() for text in map(_read, sorted(root.glob(pattern))) if text]


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None

"""What a reader must know of the machine to believe and compare figures, and nothing that names its owner.

No user, host, path or serial number: a GPU's UUID is hashed, a kernel is named by its first two numbers.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from spmdeploy.bench.nvml import GpuRecord, GpuState, Nvml, NvmlMissingError, hash_of
from spmdeploy.gpu.driver import gpu_facts, gpu_uuid, visible_gpus

LIBRARIES = (
    "numpy",
    "onnxruntime",
    "onnxruntime-gpu",
    "torch",
    "triton",
    "tensorrt",
    "tensorrt-rtx",
    "cuda-python",
    "pycuda",
)
# Extensions that decide which kernels a library picks.
_CPU_FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_tile", "asimddp", "i8mm", "bf16")
_SPEED_VARIABLES = (
    "OMP_NUM_THREADS",
    "OMP_WAIT_POLICY",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "CUDA_LAUNCH_BLOCKING",
    "NVIDIA_TF32_OVERRIDE",
)
BUSY_ABOVE = 0.05
"""Share of the cores that other processes may use before figures are said to be disturbed."""


@dataclass(frozen=True)
class Cpu:
    model: str
    architecture: str
    cores: int
    """Logical cores of the machine."""
    cores_used: int
    """Those that this process may run on."""
    features: tuple[str, ...]
    governors: tuple[str, ...]
    """Frequency governors; empty where the system does not say."""


@dataclass(frozen=True)
class Jetson:
    model: str
    release: str | None
    """First line of /etc/nv_tegra_release."""
    power_mode: str | None
    """As nvpmodel keeps it."""
    clocks_locked: bool
    """Whether every core's lowest frequency is its highest, which is what jetson_clocks does."""


@dataclass(frozen=True)
class Machine:
    """What does not change during a run."""

    cpu: Cpu
    memory_gb: float | None
    gpus: tuple[GpuRecord, ...]
    gpu_note: str | None
    """Why nothing is known of GPUs."""
    jetson: Jetson | None
    system: str
    python: str
    libraries: dict[str, str]
    variables: dict[str, str]
    """Environment variables that change speeds, where they are set."""

    def hardware(self) -> dict[str, object]:
        """What two records must share for their speeds to be comparable."""
        return {
            "CPU": self.cpu.model,
            "architecture": self.cpu.architecture,
            "cores": self.cpu.cores,
            "cores used": self.cpu.cores_used,
            "GPUs": [f"{gpu.name} {gpu.uuid_hash}" for gpu in self.gpus],
            "Jetson": None if self.jetson is None else f"{self.jetson.model}, power mode {self.jetson.power_mode}",
        }

    def title(self) -> str:
        """One line for tables and pictures."""
        cores = f"{self.cpu.cores_used} core{'s' * (self.cpu.cores_used != 1)} of {self.cpu.model}"
        return ", ".join([cores, *(gpu.name for gpu in self.gpus)])


@dataclass(frozen=True)
class State:
    """What changes: read before and after a run."""

    load_average: float | None
    """Of the last minute, runnable processes."""
    cpu_mhz: tuple[float, ...]
    """Of every core, as the system tells it at this moment."""
    cpu_throttled: int | None
    """How often the cores have been slowed down by heat since the system started."""
    gpus: tuple[GpuState, ...]


@dataclass(frozen=True)
class BackgroundLoad:
    """What other processes took during the run."""

    cpu_share: float | None
    """Of the cores that this process may run on, 0..1; None where the system does not tell."""

    @property
    def is_significant(self) -> bool:
        return self.cpu_share is not None and self.cpu_share > BUSY_ABOVE


def describe_machine(root: Path = Path("/")) -> Machine:
    """root: of the file system; for tests."""
    cpuinfo = _read(root / "proc/cpuinfo") or ""
    gpus, note = _gpus()
    memory = re.search(r"MemTotal:\s+(\d+) kB", _read(root / "proc/meminfo") or "")
    kernel = ".".join(platform.release().split(".")[:2])
    return Machine(
        cpu=Cpu(
            model=_cpu_model(cpuinfo),
            architecture=platform.machine(),
            cores=os.cpu_count() or 1,
            cores_used=len(usable_cores()),
            features=tuple(name for name in _CPU_FEATURES if name in _cpu_flags(cpuinfo)),
            governors=tuple(sorted(set(_frequency_files(root, "scaling_governor")))),
        ),
        memory_gb=None if memory is None else round(int(memory[1]) * 1024 / 1e9, 1),
        gpus=gpus,
        gpu_note=note,
        jetson=describe_jetson(root),
        system=f"{platform.system()} {kernel}",
        python=platform.python_version(),
        libraries=library_versions(),
        variables={name: os.environ[name] for name in _SPEED_VARIABLES if name in os.environ},
    )


def describe_jetson(root: Path = Path("/")) -> Jetson | None:
    """None on anything else."""
    model = (_read(root / "proc/device-tree/model") or "").rstrip("\0\n")
    release = _read(root / "etc/nv_tegra_release")
    if release is None and "jetson" not in model.lower():
        return None
    mode = _read(root / "var/lib/nvpmodel/status")
    lowest, highest = (_frequency_files(root, f"scaling_{end}_freq") for end in ("min", "max"))
    return Jetson(
        model=model or "Jetson",
        release=None if release is None else release.splitlines()[0].lstrip("# "),
        power_mode=None if mode is None else mode.strip(),
        clocks_locked=bool(lowest) and lowest == highest,
    )


def read_state(root: Path = Path("/")) -> State:
    """Now."""
    with Nvml() as nvml:
        gpus = tuple(nvml.states())
    heat = [_read(path) for path in root.glob("sys/devices/system/cpu/cpu[0-9]*/thermal_throttle/core_throttle_count")]
    return State(
        load_average=round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        cpu_mhz=_core_frequencies(root),
        cpu_throttled=sum(int(count) for count in heat if count) if heat else None,
        gpus=gpus,
    )


def library_versions() -> dict[str, str]:
    """Of what is installed; nothing is imported."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def usable_cores() -> frozenset[int]:
    """The logical cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


class LoadMeter:
    """Measures what other processes take of our cores, from its making to `other_load`.

    The system counts the busy time of every core; what our own processes used is taken off.
    """

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root
        self._started = time.monotonic()
        self._busy = _busy_seconds(root)
        self._own = own_cpu_seconds()

    def other_load(self) -> BackgroundLoad:
        """Ask after our own processes have ended: only then is their time known."""
        busy = _busy_seconds(self._root)
        if busy is None or self._busy is None:
            return BackgroundLoad(None)
        elapsed = (time.monotonic() - self._started) * len(usable_cores())
        own = own_cpu_seconds() - self._own
        # Both clocks tick in hundredths of a second.
        return BackgroundLoad(round(min(1.0, max(0.0, (busy - self._busy - own) / max(elapsed, 1e-9))), 4))


def own_cpu_seconds() -> float:
    """CPU time of this process and of its children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _busy_seconds(root: Path) -> float | None:
    """CPU time that the usable cores have spent on anything so far; None where the system does not tell."""
    cores = usable_cores()
    found = re.findall(r"^cpu(\d+) (.+)$", _read(root / "proc/stat") or "", re.MULTILINE)
    ticks = [_busy_ticks(line) for number, line in found if int(number) in cores]
    return sum(ticks) / os.sysconf("SC_CLK_TCK") if ticks else None


def _busy_ticks(line: str) -> int:
    """user, nice, system, irq and softirq of a line of /proc/stat; idle, iowait, steal and guests are not work here."""
    user, nice, system, _, _, irq, softirq, *_ = map(int, line.split())
    return user + nice + system + irq + softirq


def _gpus() -> tuple[tuple[GpuRecord, ...], str | None]:
    """The GPUs, and why not all is known of them."""
    try:
        with Nvml(required=True) as nvml:
            return tuple(nvml.facts()), None
    except NvmlMissingError as error:
        note = str(error)
    try:
        found = [(gpu_facts(index), hash_of(gpu_uuid(index))) for index in range(visible_gpus())]
    except OSError as error:
        return (), str(error)
    return tuple(GpuRecord(gpu.name, gpu.compute_capability, uuid, gpu.driver, None) for gpu, uuid in found), note


def _cpu_model(cpuinfo: str) -> str:
    name = re.search(r"^(?:model name|Model)\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    return name[1].strip() if name else platform.processor() or platform.machine()


def _cpu_flags(cpuinfo: str) -> frozenset[str]:
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    return frozenset(flags[1].split()) if flags else frozenset()


def _core_frequencies(root: Path) -> tuple[float, ...]:
    told = [int(value) / 1000 for value in _frequency_files(root, "scaling_cur_freq")]
    listed: Iterable[str] = re.findall(r"^cpu MHz\s*:\s*([\d.]+)", _read(root / "proc/cpuinfo") or "", re.MULTILINE)
    return tuple(told or (float(value) for value in listed))


def _frequency_files(root: Path, name: str) -> list[str]:
    files = sorted(root.glob(f"sys/devices/system/cpu/cpu[0-9]*/cpufreq/{name}"))
    return [text.strip() for text in map(_read, files) if text]


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None


def differences(one: Mapping[str, object], other: Mapping[str, object]) -> list[str]:
    """What two mappings disagree on, in words: `name: a → b`."""
    names = [*one, *(name for name in other if name not in one)]
    return [f"{name}: {one.get(name)} → {other.get(name)}" for name in names if one.get(name) != other.get(name)]

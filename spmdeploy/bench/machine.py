"""Describes the machine a benchmark ran on, without identifying information.

No user, host, path or serial number: a GPU's UUID is hashed, a kernel is identified by its first two version numbers.
Needs the extra `bench`: psutil, py-cpuinfo, and nvidia-ml-py for GPUs.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.metadata
import os
import platform
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spmdeploy.errors import UnavailableError
from spmdeploy.gpu.driver import gpu_facts, gpu_uuid, visible_gpus

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
# Bits of nvmlDeviceGetCurrentClocksEventReasons, as documented in nvml.h.
_SLOWDOWN_REASONS = {
    0x1: "idle",
    0x2: "application clocks",
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "thermal slowdown (driver)",
    0x40: "thermal slowdown (hardware)",
    0x80: "power brake",
    0x100: "display clocks",
}
_HARMLESS_REASONS = frozenset({"idle", "application clocks", "display clocks"})
_CPUFREQ = "sys/devices/system/cpu/cpu[0-9]*/cpufreq"


@dataclass(frozen=True)
class GpuRecord:
    """Constant properties of one GPU."""

    name: str
    sm: str | None
    """Compute capability, such as 8.6."""
    uuid_hash: str | None
    """First 16 digits of the UUID's SHA-256: distinguishes GPUs without identifying them."""
    driver: str | None
    memory_gb: float | None


@dataclass(frozen=True)
class GpuState:
    """Changing properties of one GPU; None where the board does not report them."""

    sm_mhz: int | None
    memory_mhz: int | None
    temperature_c: int | None
    watts: float | None
    watts_limit: float | None
    slowed_by: tuple[str, ...]
    """Reasons for lowered clocks."""
    processes: int | None
    """Processes that compute on it, this one included."""

    @property
    def throttled(self) -> bool:
        return not _HARMLESS_REASONS.issuperset(self.slowed_by)


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
        return self.cpu_share is not None and self.cpu_share > MAX_BACKGROUND_LOAD


def require_bench_extra() -> None:
    """Raises UnavailableError naming the extra where psutil or py-cpuinfo is not installed."""
    _psutil()
    _library("cpuinfo", "py-cpuinfo")


def describe_machine(root: Path = Path("/")) -> Machine:
    """Raises UnavailableError without the extra `bench`. root: of the file system, for tests."""
    model, features = _cpu_info()
    gpus, note = _gpus()
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
        gpus = tuple(_gpu_states(library))
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


class Nvml:
    """NVML through nvidia-ml-py. Boards differ in what they report: every unsupported query returns None."""

    def __init__(self, library: Any, note: str | None = None) -> None:
        self.library = library
        self.note = note
        """Why NVML is unavailable; None if it is available."""

    def query(self, function: str, *arguments: Any) -> Any:
        if self.library is None:
            return None
        try:
            result = getattr(self.library, function)(*arguments)
        except (self.library.NVMLError, AttributeError):
            return None
        return result.decode() if isinstance(result, bytes) else result  # bytes in older versions of the package

    def handles(self) -> Iterator[Any]:
        for index in range(self.query("nvmlDeviceGetCount") or 0):
            handle = self.query("nvmlDeviceGetHandleByIndex", index)
            if handle is not None:
                yield handle

    def meter(self, uuid: str) -> GpuMeter | None:
        """Energy and memory meter of the GPU with this UUID; None if it is not found."""
        handle = self.query("nvmlDeviceGetHandleByUUID", uuid)
        return None if handle is None else GpuMeter(self, handle)


@contextmanager
def nvml() -> Iterator[Nvml]:
    """NVML, initialized while the context is open. Never raises: `note` says why it is unavailable."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except ImportError:
        yield Nvml(None, "the package nvidia-ml-py is not installed")
        return
    except Exception as exc:  # pynvml.NVMLError, which cannot be named where the import failed
        yield Nvml(None, f"NVML does not respond: {exc}")
        return
    try:
        yield Nvml(pynvml)
    finally:
        pynvml.nvmlShutdown()


class GpuMeter:
    """Energy and memory of one GPU."""

    def __init__(self, library: Nvml, handle: Any) -> None:
        self._nvml = library
        self._handle = handle

    def joules(self) -> float | None:
        """Energy used since the driver was loaded; reported from Volta on."""
        millijoules = self._nvml.query("nvmlDeviceGetTotalEnergyConsumption", self._handle)
        return None if millijoules is None else millijoules / 1000

    def memory_of(self, pid: int) -> int | None:
        """Bytes of GPU memory used by a process; None where this is hidden, as in containers."""
        processes = self._nvml.query("nvmlDeviceGetComputeRunningProcesses", self._handle) or []
        return next((process.usedGpuMemory for process in processes if process.pid == pid), None)


def _gpus() -> tuple[tuple[GpuRecord, ...], str | None]:
    """The GPUs, and why not all their properties are known."""
    with nvml() as library:
        if library.note is None:
            return tuple(_gpu_records(library)), None
    try:
        found = [(gpu_facts(index), hash_uuid(gpu_uuid(index))) for index in range(visible_gpus())]
    except OSError as exc:
        return (), str(exc)
    records = (GpuRecord(gpu.name, gpu.compute_capability, uuid, gpu.driver, None) for gpu, uuid in found)
    return tuple(records), library.note


def _gpu_records(library: Nvml) -> Iterator[GpuRecord]:
    for handle in library.handles():
        uuid = library.query("nvmlDeviceGetUUID", handle)
        sm = library.query("nvmlDeviceGetCudaComputeCapability", handle)
        memory = library.query("nvmlDeviceGetMemoryInfo", handle)
        yield GpuRecord(
            name=library.query("nvmlDeviceGetName", handle) or "unnamed GPU",
            sm=None if sm is None else f"{sm[0]}.{sm[1]}",
            uuid_hash=None if uuid is None else hash_uuid(uuid),
            driver=library.query("nvmlSystemGetDriverVersion"),
            memory_gb=None if memory is None else round(memory.total / 1e9, 1),
        )


def _gpu_states(library: Nvml) -> Iterator[GpuState]:
    constants = library.library
    for handle in library.handles():
        power = library.query("nvmlDeviceGetPowerUsage", handle)
        limit = library.query("nvmlDeviceGetEnforcedPowerLimit", handle)
        reasons = library.query("nvmlDeviceGetCurrentClocksEventReasons", handle)
        if reasons is None:  # its name before driver 535
            reasons = library.query("nvmlDeviceGetCurrentClocksThrottleReasons", handle)
        processes = library.query("nvmlDeviceGetComputeRunningProcesses", handle)
        yield GpuState(
            sm_mhz=library.query("nvmlDeviceGetClockInfo", handle, constants.NVML_CLOCK_SM),
            memory_mhz=library.query("nvmlDeviceGetClockInfo", handle, constants.NVML_CLOCK_MEM),
            temperature_c=library.query("nvmlDeviceGetTemperature", handle, constants.NVML_TEMPERATURE_GPU),
            watts=None if power is None else power / 1000,
            watts_limit=None if limit is None else limit / 1000,
            slowed_by=tuple(name for bit, name in _SLOWDOWN_REASONS.items() if (reasons or 0) & bit),
            processes=None if processes is None else len(processes),
        )


def hash_uuid(uuid: str) -> str:
    return hashlib.sha256(uuid.encode()).hexdigest()[:16]

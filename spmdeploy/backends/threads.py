"""Counts the threads that a backend may use: affinity, cgroup limits and OMP_NUM_THREADS.

Libraries count the cores of the machine, of which a container or `taskset` may allow few.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_CPUS = Path("/sys/devices/system/cpu")
_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUP = Path("/proc/self/cgroup")


def available_threads() -> int:
    """The cores that this process may use, at least 1; fewer if OMP_NUM_THREADS is lower."""
    limits = [_allowed_cores(), *(math.ceil(quota) for quota in _quotas())]
    with suppress(ValueError):  # "4,2" is for nested regions: the first number counts
        limits.append(int(os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]))
    return max(1, min(limits))


def _allowed_cores() -> int:
    """The cores that this process may run on; the hardware threads of one core count once."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    return len({_core_of(cpu) for cpu in os.sched_getaffinity(0)})


def _core_of(cpu: int) -> str:
    try:
        return (_CPUS / f"cpu{cpu}" / "topology" / "thread_siblings_list").read_text(encoding="utf-8")
    except OSError:
        return f"{cpu}\n"


def _quotas() -> Iterator[float]:
    """Cores by each limit on CPU time of this process's control groups, version 2 and 1."""
    try:
        lines = _OWN_CGROUP.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, own = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        base = _CGROUPS / "cpu" if controllers else _CGROUPS
        group = base / own.lstrip("/")
        for folder in (group, *group.parents):  # a container sees its own group as the root
            if not folder.is_relative_to(base):
                break
            with suppress(OSError, ValueError):
                yield _quota_v1(folder) if controllers else _quota_v2(folder)


def _quota_v2(folder: Path) -> float:
    """Raises ValueError where there is no limit."""
    quota, period = (folder / "cpu.max").read_text(encoding="utf-8").split()
    return int(quota) / int(period)


def _quota_v1(folder: Path) -> float:
    """Raises ValueError where there is no limit."""
    quota, period = (int((folder / f"cpu.cfs_{name}_us").read_text(encoding="utf-8")) for name in ("quota", "period"))
    if quota <= 0:
        raise ValueError(f"no limit: {quota}")
    return quota / period

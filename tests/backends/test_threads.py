"""Counting threads under affinity, cgroup limits and OMP_NUM_THREADS."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from spmdeploy.backends import threads
from spmdeploy.backends.threads import available_threads


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Eight cores, no limits; the folder that stands for /sys/fs/cgroup."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(threads, "_allowed_cores", lambda: 8)
    monkeypatch.setattr(threads, "_CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(threads, "_OWN_CGROUP", tmp_path / "own")
    return tmp_path / "cgroup"


def limit(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(content)


def test_available_threads_without_limits_are_the_cores() -> None:
    assert available_threads() == 8


@pytest.mark.parametrize(("value", "count"), [("3", 3), ("2,4", 2), ("64", 8), ("0", 1), ("", 8), ("many", 8)])
def test_available_threads_omp_num_threads_limits(value: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    assert available_threads() == count


@pytest.mark.parametrize(("quota", "count"), [("150000 100000", 2), ("max 100000", 8), ("50000 100000", 1), ("", 8)])
def test_available_threads_cgroup_2_limits(quota: str, count: int, machine: Path, tmp_path: Path) -> None:
    (tmp_path / "own").write_text("0::/app/worker\n")
    limit(machine / "app/worker", cpu__max=quota)
    assert available_threads() == count


def test_available_threads_parent_group_limits(machine: Path, tmp_path: Path) -> None:
    (tmp_path / "own").write_text("0::/app/worker\n")
    limit(machine / "app/worker", cpu__max="400000 100000")
    limit(machine / "app", cpu__max="300000 100000")
    assert available_threads() == 3


@pytest.mark.parametrize(("quota", "count"), [("250000", 3), ("-1", 8)])
def test_available_threads_cgroup_1_limits(quota: str, count: int, machine: Path, tmp_path: Path) -> None:
    (tmp_path / "own").write_text("5:memory:/app\n4:cpu,cpuacct:/app\n0::/\n")
    limit(machine / "cpu/app", cpu__cfs_quota_us=quota, cpu__cfs_period_us="100000")
    assert available_threads() == count


def test_allowed_cores_hardware_threads_of_a_core_count_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(threads, "_CPUS", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 2, 3, 7}, raising=False)
    for cpu, siblings in enumerate(["0,2", "1,3", "0,2", "1,3"]):  # the topology of the last one is not known
        limit(tmp_path / f"cpu{cpu}/topology", thread_siblings_list=f"{siblings}\n")
    assert threads._allowed_cores() == 3


OPENED = """
import spmdeploy, sys
from spmdeploy.backends.registry import open_backend
from spmdeploy.backends.threads import available_threads
from spmdeploy.bundle.bundle import open_bundle
session = open_backend(open_bundle(sys.argv[1]), sys.argv[2], "cpu", "fp32").session
if sys.argv[2] == "openvino":
    used = session._edit._compiled.get_property("INFERENCE_NUM_THREADS")
elif sys.argv[2] == "onnxruntime":
    used = session._edit._session.get_session_options().intra_op_num_threads
else:
    import torch
    used = torch.get_num_threads()
print(used, available_threads())
"""


@pytest.mark.skipif(shutil.which("taskset") is None, reason="taskset is not installed")
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino", "torch"])
def test_backends_under_taskset_use_one_thread(backend: str, street_bundle: Path) -> None:
    first = min(os.sched_getaffinity(0))
    command = ["taskset", "--cpu-list", str(first), sys.executable, "-c", OPENED, str(street_bundle), backend]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["1", "1"], done.stderr

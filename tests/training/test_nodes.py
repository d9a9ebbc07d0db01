"""Training on two nodes with torchrun: one is killed or cut off, and the run resumes on one or on two.

The nodes are network namespaces with a link between them; without the right to make these, two addresses on loopback.
They share the file system. A node that is killed is gone at once: torchrun and its processes get SIGKILL.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from spmdeploy.model.checkpoint import load_checkpoint
from spmdeploy.training.config import TrainConfig, to_json
from spmdeploy.training.run_dir import RunDirectory
from spmdeploy.training.trainer import train
from tests.training.test_trainer import environment, losses

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="signals and namespaces of Linux")]
PORT = 29417
NAMES = ("spmnode0", "spmnode1")


@dataclasses.dataclass(frozen=True)
class Node:
    """Where to start torchrun."""

    address: str
    prefix: tuple[str, ...] = ()
    interface: str = "lo"
    link: tuple[str, ...] = ()
    """The command that cuts it off; none on loopback."""

    def start(self, config: Path, output: Path, *options: str, nodes: str = "2", **torchrun: Any) -> Started:
        """torchrun with one process. torchrun: its further options."""
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes", nodes, "--nproc-per-node", "1"]
        launcher += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{self.first}:{PORT}", "--local-addr", self.address]
        is_host = int(self.address == self.first)  # torchrun does not find out in a namespace
        launcher += ["--rdzv-conf", f"join_timeout=120,last_call_timeout=3,is_host={is_host}"]
        launcher += [word for key, value in torchrun.items() for word in (f"--{key.replace('_', '-')}", str(value))]
        command = [*self.prefix, *launcher, "-m", "spmdeploy", "train", "--output", str(output), *options]
        command += [] if "--resume" in options else ["--config", str(config)]
        variables = {**environment(), "GLOO_SOCKET_IFNAME": self.interface}
        log = output.with_name(f"{output.name}-{self.address}-{time.monotonic_ns()}.log")
        with log.open("wb") as stream:
            process = subprocess.Popen(
                command, stdout=stream, stderr=subprocess.STDOUT, env=variables, start_new_session=True
            )
        _started.append(Started(process, log))
        return _started[-1]

    @property
    def first(self) -> str:
        return f"{self.address.rpartition('.')[0]}.1"


@dataclasses.dataclass(frozen=True)
class Started:
    process: subprocess.Popen[bytes]
    log: Path

    def kill(self) -> None:
        """All processes of the node, at once."""
        if self.process.poll() is not None:
            return
        for process in [*children(self.process.pid), self.process.pid]:
            os.kill(process, signal.SIGKILL)
        self.process.wait()

    def ended(self, seconds: float) -> tuple[int, str]:
        """Exit code and output."""
        try:
            return self.process.wait(seconds), self.log.read_text()
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still runs after {seconds} s:\n{self.log.read_text()}") from None


_started: list[Started] = []


def children(process: int) -> list[int]:
    listed = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return [found for child in map(int, listed) for found in [*children(child), child]]


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    yield
    while _started:
        _started.pop().kill()


@pytest.fixture
def nodes() -> Iterator[tuple[Node, Node]]:
    try:
        for name in NAMES:
            ip("netns", "add", name)
    except (OSError, subprocess.CalledProcessError):
        yield Node("127.0.0.1"), Node("127.0.0.2")
        return
    try:
        ip("link", "add", "spm0", "netns", NAMES[0], "type", "veth", "peer", "name", "spm1", "netns", NAMES[1])
        for index, name in enumerate(NAMES):
            ip("-n", name, "addr", "add", f"10.77.0.{index + 1}/24", "dev", f"spm{index}")
            for device in ("lo", f"spm{index}"):
                ip("-n", name, "link", "set", device, "up")
        first, second = (
            Node(
                f"10.77.0.{index + 1}",
                ("ip", "netns", "exec", name),
                f"spm{index}",
                ("-n", name, "link", "set", f"spm{index}", "down"),
            )
            for index, name in enumerate(NAMES)
        )
        yield first, second
    finally:
        for name in NAMES:
            ip("netns", "del", name)


@pytest.fixture
def given(tmp_path: Path, tiny: TrainConfig) -> tuple[TrainConfig, Path]:
    """A configuration of 24 steps with a checkpoint after each, and its file."""
    schedule = tuple(dataclasses.replace(phase, images=16) for phase in tiny.schedule)
    config = dataclasses.replace(tiny, schedule=schedule, checkpoint_seconds=0)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(to_json(config)))
    return config, path


def wait_for_samples(run: Path, images: int, started: Started) -> None:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        records = RunDirectory(run).metrics()
        if records and records[-1]["images"] >= images:
            return
        assert started.process.poll() is None, started.log.read_text()
        time.sleep(0.02)
    raise AssertionError(started.log.read_text())


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(run / "export" / "generator.safetensors").generator.state_dict()


def report(capfd: pytest.CaptureFixture[str], text: str) -> None:
    with capfd.disabled():
        print(f"\n{text}")


def test_node_killed_ends_the_run_with_the_checkpoint_and_it_resumes_on_one_or_two(
    nodes: tuple[Node, Node], given: tuple[TrainConfig, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config, path = given
    train(config, tmp_path / "one", False, lambda record: None)
    both = [node.start(path, tmp_path / "two") for node in nodes]
    for started in both:
        code, output = started.ended(240)
        assert code == 0, output
    wanted = losses(tmp_path / "two")
    assert len(wanted) == 24
    for single, split in zip(losses(tmp_path / "one"), wanted, strict=True):
        assert split == pytest.approx(single, rel=1e-3, abs=1e-4)

    run = tmp_path / "killed"
    survivor, lost = (node.start(path, run) for node in nodes)
    wait_for_samples(run, 10, survivor)
    lost.kill()
    killed = time.monotonic()
    code, output = survivor.ended(60)
    report(capfd, f"survivor ended after {time.monotonic() - killed:.1f} s")
    assert code == 1 and re.search(r"exitcode\s*: 4", output), output
    assert "has lost the others: " in output and f"the last good checkpoint is {run}/checkpoint.pt" in output
    assert "continue with --resume" in output and 10 <= len(losses(run)) * 2 < 48

    shutil.copytree(run, tmp_path / "alone")
    both = [node.start(path, run, "--resume") for node in nodes]
    for started in both:
        assert started.ended(240)[0] == 0
    assert losses(run) == wanted
    resumed, whole = weights(run), weights(tmp_path / "two")
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())

    alone = nodes[0].start(path, tmp_path / "alone", "--resume", nodes="1")
    assert alone.ended(240)[0] == 0
    for single, split in zip(losses(tmp_path / "alone"), wanted, strict=True):
        assert single == pytest.approx(split, rel=1e-3, abs=1e-4)


def test_node_cut_off_ends_the_run_within_the_timeout(
    nodes: tuple[Node, Node], given: tuple[TrainConfig, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    _, path = given
    run = tmp_path / "cut"
    first, second = (node.start(path, run, "--timeout", "10") for node in nodes)
    wait_for_samples(run, 10, first)
    if nodes[1].link:
        ip(*nodes[1].link)
    else:
        for process in [*children(second.process.pid), second.process.pid]:
            os.kill(process, signal.SIGSTOP)
    cut = time.monotonic()
    code, output = first.ended(60)
    report(capfd, f"first node ended {time.monotonic() - cut:.1f} s after the second was cut off")
    assert code == 1 and f"the last good checkpoint is {run}/checkpoint.pt" in output, output
    second.kill()

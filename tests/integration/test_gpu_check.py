"""`make gpu-check`: steps, budget, reuse and report, with fake commands; slow: whole, on a machine without a GPU."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
ROW = {"status": "measured", "latency_ms": {"p50": 2.5, "p95": 3.5}, "parity": {"max_grey": 1, "psnr_db": 60.0}}
MACHINE = {"gpus": [{"name": "Imaginary GPU"}], "gpu_note": None, "cpu": {"model": "Imaginary CPU"}}
Answer = tuple[int, dict[str, Any]]


@pytest.fixture
def gpu_check() -> Iterator[ModuleType]:
    """The script, which belongs to no package."""
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        yield importlib.import_module("gpu_check")
    finally:
        sys.path.remove(str(ROOT / "tools"))
        sys.modules.pop("gpu_check", None)


def passing(command: list[str]) -> Answer:
    """What every command prints on a machine that has everything."""
    if "bench" in command:
        return 0, {"rows": [ROW], "machine": MACHINE, "warnings": []}
    return 0, {"golden": [{"name": "car", "psnr_db": 50.0}], "checks": []}


def run(
    gpu_check: ModuleType,
    tmp_path: Path,
    patch: pytest.MonkeyPatch,
    answer: Callable[[list[str]], Answer],
    *arguments: str,
) -> tuple[int, dict[str, Any], str, list[list[str]]]:
    """Exit code, JSON, table and commands when `answer` replaces every process."""
    commands: list[list[str]] = []

    def fake(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        if command[1] == "-c":  # preparing the bundles
            return subprocess.CompletedProcess(command, 0, "", "")
        commands.append(command[3:] if command[2] == "spmdeploy" else command[2:])
        code, output = answer(commands[-1])
        return subprocess.CompletedProcess(command, code, json.dumps(output), "stderr of the process")

    patch.setattr(gpu_check.subprocess, "run", fake)
    output = tmp_path / "result/gpu.json"
    code = gpu_check.main(["--output", str(output), "--work", str(tmp_path / "work"), *arguments])
    return code, json.loads(output.read_text()), output.with_suffix(".md").read_text(), commands


def test_check_all_backends_pass_and_are_measured(
    gpu_check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, result, table, commands = run(gpu_check, tmp_path, monkeypatch, passing)
    assert code == 0 and result["passed"] and result["finished"] and result["schema"] == "spmdeploy.gpu-check/3"
    assert result["kernels"]["status"] == "passed" and commands[0] == ["spmdeploy.bench.kernel_check"]
    names = [contender["name"] for contender in result["contenders"]]
    assert names[:2] == ["torch fp32 on cuda:0", "tensorrt fp16 on cuda:0"] and len(set(names)) == len(names) == 12
    assert list(result["contenders"][1]["steps"]) == [
        "build plain",
        "build large",
        "verify",
        "large activations",
        "bench",
    ]
    assert "| tensorrt fp16 on cuda:0 | passed | 2.50 ms | 3.50 ms | 1 levels, 60.0 dB | 50.0 dB |" in table
    assert "Imaginary GPU; Imaginary CPU" in table
    verify = next(command for command in commands if command[0] == "verify" and "tensorrt" in command)
    assert "--thorough" in verify and verify[verify.index("--precision") + 1] == "fp16"


def test_check_unavailable_backend_is_no_failure(
    gpu_check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(command: list[str]) -> Answer:
        missing = any(part.startswith("tensorrt") for part in command)
        return (4, {"error": "tensorrt cannot be imported"}) if missing else passing(command)

    code, result, table, _ = run(gpu_check, tmp_path, monkeypatch, answer)
    assert code == 0 and result["passed"]
    engine = result["contenders"][1]
    assert engine["status"] == "unavailable" and engine["reason"] == "build plain: tensorrt cannot be imported"
    assert "| tensorrt fp16 on cuda:0 | unavailable |" in table and "tensorrt cannot be imported" in table


def test_check_failed_verify_has_no_time_and_exits_5(
    gpu_check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(command: list[str]) -> Answer:
        return (5, {"error": "repeatability: 2 different results"}) if "--thorough" in command else passing(command)

    code, result, table, commands = run(gpu_check, tmp_path, monkeypatch, answer, "--only", "onnxruntime-cuda fp16")
    assert code == 5 and not result["passed"] and "FAILED" in table
    assert [command[0] for command in commands] == ["verify"]
    (failed,) = result["contenders"]
    assert failed["status"] == "failed" and failed["reason"] == "verify: repeatability: 2 different results"
    assert " ms |" not in table


def test_check_budget_used_up_skips_the_rest(
    gpu_check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(0, 10**6, 30))
    monkeypatch.setattr(gpu_check.time, "monotonic", lambda: float(next(clock)))
    code, result, table, _ = run(gpu_check, tmp_path, monkeypatch, passing, "--budget", "400")
    statuses = [contender["status"] for contender in result["contenders"]]
    assert code == 0 and statuses[0] == "passed" and statuses[-1] == "skipped"
    assert result["contenders"][-1]["reason"] == "verify: the budget was used up" and "skipped" in table


def test_check_result_is_on_disk_after_each_backend(
    gpu_check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []

    def answer(command: list[str]) -> Answer:
        written = tmp_path / "result/gpu.json"
        if written.exists():
            seen.append([contender["status"] for contender in json.loads(written.read_text())["contenders"]])
        if len(seen) == 9:
            raise KeyboardInterrupt
        return passing(command)

    with pytest.raises(KeyboardInterrupt):
        run(gpu_check, tmp_path, monkeypatch, answer)
    result = json.loads((tmp_path / "result/gpu.json").read_text())
    assert not result["finished"] and result["contenders"][0]["status"] == "passed" and result["kernels"]
    assert "not finished" in (tmp_path / "result/gpu.md").read_text()


def test_check_reuse_exports_nothing(gpu_check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "work/plain.spm").mkdir(parents=True)
    proof = {"overflowing_norms": 9, "norms": 9, "overflowing_norms_before": 0, "largest_value": 9000.0}
    (tmp_path / "work/large_activations.json").write_text(json.dumps(proof))
    monkeypatch.setattr(gpu_check, "_PREPARE", None)
    _, result, table, _ = run(gpu_check, tmp_path, monkeypatch, passing, "--reuse", "--only", "torch fp32 on cpu")
    assert result["large_activations"] == proof and "9 of 9 norms overflow FP16 statistics" in table


def test_check_nothing_prepared_exits_4(
    gpu_check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(options: Any) -> None:
        raise subprocess.CalledProcessError(1, ["export"])

    monkeypatch.setattr(gpu_check, "prepare", fail)
    assert gpu_check.main(["--output", str(tmp_path / "x.json"), "--work", str(tmp_path), "--only", "torch"]) == 4
    assert "no bundle to check" in capsys.readouterr().err


def test_run_process_that_dies_gives_its_stderr(gpu_check: ModuleType) -> None:
    dying = [sys.executable, "-c", "import os, sys; print('last words', file=sys.stderr, flush=True); os.abort()"]
    code, _, reason = gpu_check._run(dying, gpu_check.Budget(None))
    assert code == -6 and reason == "exit code -6: last words"


@pytest.mark.slow
def test_check_whole_command_without_gpu_passes_on_cpu(
    gpu_check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    arguments = ["--output", tmp_path / "gpu.json", "--work", tmp_path / "work", "--preset", "tiny", "--seconds", "0.1"]
    assert gpu_check.main([str(argument) for argument in arguments]) == 0
    result = json.loads((tmp_path / "gpu.json").read_text())
    statuses = {contender["name"]: contender["status"] for contender in result["contenders"]}
    assert statuses["torch fp32 on cpu"] == statuses["onnxruntime fp32 on cpu"] == "passed"
    assert all(contender["reason"] for contender in result["contenders"] if contender["status"] == "unavailable")
    large = result["large_activations"]
    assert large["overflowing_norms"] == large["norms"] > 100

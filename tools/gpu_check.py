"""Checks and measures everything that can run on a machine with a GPU, in one command: `make gpu-check`.

Two bundles are used: `plain.spm` with seeded random weights (or --bundle), and `large.spm` with the same weights scaled
so that FP16 statistics overflow. Then, the most wanted first, each step in a process of its own:

- `kernels`: our CUDA kernels, streams, pinned memory and CUDA graphs, compared with numpy; needs only PyTorch with CUDA
  and cuda-core (`spmdeploy.bench.kernel_check`);
- for each backend and precision: `spmdeploy build` (engines), `spmdeploy verify --thorough` of plain.spm,
  `spmdeploy verify` of large.spm, `spmdeploy bench` of plain.spm.

The JSON result is written after every step, so a run that is cut off leaves what it has measured. A backend that cannot
run here is listed with its reason. Exit code: 5 if a check failed, 4 if no bundle could be prepared, else 0.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SCHEMA = "spmdeploy.gpu-check/3"
FAILED, NOT_PREPARED, UNAVAILABLE, DIFFERS = 5, 4, 4, 5
PRESETS = ("paper", "small", "tiny")
MIN_STEP_SECONDS = 20.0
"""A step is not started with less of the budget left."""
MAX_STEP_SECONDS = 1800.0
CPU, GPU = "cpu", "cuda:0"


@dataclass(frozen=True)
class Contender:
    """One backend in one precision on one device."""

    backend: str
    """As `spmdeploy bench --backend` names it."""
    precision: str
    device: str = GPU

    @property
    def name(self) -> str:
        return f"{self.backend} {self.precision} on {self.device}"

    @property
    def is_engine(self) -> bool:
        return self.backend.startswith("tensorrt")

    def steps(self, work: Path, seconds: float) -> Iterator[tuple[str, list[str]]]:
        """Name and `spmdeploy` arguments of each step."""
        plain, large = str(work / "plain.spm"), str(work / "large.spm")
        if self.is_engine:
            for bundle in (plain, large):
                runtime = ["--runtime", self.backend, "--precision", self.precision, "--into", "bundle"]
                yield f"build {Path(bundle).stem}", ["build", bundle, *runtime, "--overwrite"]
        if self._is_product:
            chosen = ["--backend", self.backend.removesuffix("-cuda"), "--device", self.device]
            chosen += ["--precision", self.precision]
            yield "verify", ["verify", plain, *chosen, "--thorough"]
            yield "large activations", ["verify", large, *chosen]
        record = work / f"bench {self.name}.json".replace(" ", "_").replace(":", "")
        measured = ["--backend", self.backend, "--device", self.device, "--precision", self.precision]
        measured += ["--baseline", self.backend, "--mask", "large", "--duration", f"{seconds:g}"]
        yield "bench", ["bench", plain, *measured, "--output", str(record), "--overwrite"]

    @property
    def _is_product(self) -> bool:
        """Whether `spmdeploy edit` offers it; other rows are comparisons, which `bench` checks for parity."""
        return not self.backend.startswith("torch") or (self.backend, self.precision) == ("torch", "fp32")


CONTENDERS = (
    Contender("torch", "fp32"),
    Contender("tensorrt", "fp16"),
    Contender("tensorrt-rtx", "fp16"),
    Contender("onnxruntime-cuda", "fp16"),
    Contender("torch", "fp16"),
    Contender("torch-compile", "fp16"),
    Contender("onnxruntime-cuda", "fp32"),
    Contender("tensorrt", "fp32"),
    Contender("tensorrt-rtx", "fp32"),
    Contender("torch-compile", "fp32"),
    Contender("torch", "fp32", CPU),
    Contender("onnxruntime", "fp32", CPU),
)
"""Most wanted first."""


class Budget:
    """Seconds left of the whole run."""

    def __init__(self, seconds: float | None) -> None:
        self._end = None if seconds is None else time.monotonic() + seconds

    def step(self) -> float:
        """Seconds that the next step may take; 0 if it must not be started."""
        if self._end is None:
            return MAX_STEP_SECONDS
        left = self._end - time.monotonic()
        return min(left, MAX_STEP_SECONDS) if left >= MIN_STEP_SECONDS else 0.0


class Report:
    """The result, written to disk after every change: JSON, and a table in Markdown next to it."""

    def __init__(self, output: Path, weights: str) -> None:
        self._output = output
        self.facts: dict[str, Any] = {"schema": SCHEMA, "command": "make gpu-check", "weights": weights}
        self.facts |= {"finished": False, "passed": True, "kernels": None, "contenders": []}

    def save(self) -> None:
        results = [*self.facts["contenders"], *([self.facts["kernels"]] if self.facts["kernels"] else [])]
        self.facts["passed"] = all(result["status"] != "failed" for result in results)
        self._output.parent.mkdir(parents=True, exist_ok=True)
        self._output.write_text(json.dumps(self.facts, indent=1) + "\n", encoding="utf-8")
        self._output.with_suffix(".md").write_text(table(self.facts), encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="the JSON file; the table goes next to it as .md")
    parser.add_argument("--work", type=Path, required=True, help="folder for bundles, engines and records")
    parser.add_argument("--preset", choices=PRESETS, default="paper", help="size of the seeded network")
    parser.add_argument("--bundle", type=Path, help="check the weights of this bundle instead of seeded ones")
    parser.add_argument("--reuse", action="store_true", help="use the bundles that are in the work folder already")
    parser.add_argument("--budget", type=float, help="seconds for the whole run")
    parser.add_argument("--seconds", type=float, default=5.0, help="of measuring for each row")
    parser.add_argument("--only", action="append", help="only contenders whose name contains this; `kernels` is one")
    options = parser.parse_args(arguments)
    return check(options, Budget(options.budget))


def check(options: argparse.Namespace, budget: Budget) -> int:
    """Prepares the bundles and runs every contender. Returns the exit code."""
    report = Report(options.output, str(options.bundle or f"{options.preset}, seeded"))
    if _wanted("kernels", options.only):
        report.facts["kernels"] = run_kernels(budget)
        report.save()
    try:
        report.facts["large_activations"] = prepare(options)
    except (subprocess.CalledProcessError, OSError) as exc:
        print(f"error: no bundle to check: {exc}", file=sys.stderr)
        report.save()
        return NOT_PREPARED
    for contender in CONTENDERS:
        if _wanted(contender.name, options.only):
            run_contender(contender, options.work, options.seconds, budget, report)
    report.facts["finished"] = True
    report.save()
    print(table(report.facts))
    return 0 if report.facts["passed"] else FAILED


def _wanted(name: str, only: list[str] | None) -> bool:
    return not only or any(part in name for part in only)


def prepare(options: argparse.Namespace) -> dict[str, Any] | None:
    """Makes plain.spm and large.spm in the work folder, in a process of its own. Returns the proof of overflow.

    Raises CalledProcessError, OSError. With --reuse a missing large.spm is left out: those checks then fail by name.
    """
    proof = options.work / "large_activations.json"
    if not (options.reuse and (options.work / "plain.spm").exists()):
        options.work.mkdir(parents=True, exist_ok=True)
        if options.bundle:
            plain = options.work / "plain.spm"
            shutil.rmtree(plain, ignore_errors=True)
            copy = shutil.copytree if options.bundle.is_dir() else shutil.copy
            copy(options.bundle, plain)
        source = "bundle" if options.bundle else options.preset
        subprocess.run([sys.executable, "-c", _PREPARE, str(options.work), source], check=True)
    return json.loads(proof.read_text(encoding="utf-8")) if proof.exists() else None


_PREPARE = """
import dataclasses, json, sys
from pathlib import Path
from spmdeploy.bench.seeded_bundles import export_enlarged, export_random
from spmdeploy.bundle.bundle import open_bundle
work, source = Path(sys.argv[1]), sys.argv[2]
plain = work / "plain.spm"
if source != "bundle":
    made = export_random(source, work, ("fp32", "fp16"))
    if plain.exists():
        import shutil
        shutil.rmtree(plain)
    made.rename(plain)
proof = export_enlarged(open_bundle(plain), work / "large.spm")
(work / "large_activations.json").write_text(json.dumps(dataclasses.asdict(proof)))
"""


def run_kernels(budget: Budget) -> dict[str, Any]:
    """Result of the check of our own CUDA code."""
    code, output, reason = _run([sys.executable, "-m", "spmdeploy.bench.kernel_check"], budget)
    facts = _json_of(output) or {}
    status = "passed" if code == 0 else "unavailable" if code == UNAVAILABLE else "failed"
    if code is None:
        status = "skipped"
    print(f"kernels: {status}  {facts.get('error') or reason or ''}", file=sys.stderr)
    return {"name": "kernels", "status": status, "reason": facts.get("error") or reason, "checks": facts.get("checks")}


def run_contender(contender: Contender, work: Path, seconds: float, budget: Budget, report: Report) -> None:
    """Runs the steps of a contender until one fails, saving the report after each."""
    result: dict[str, Any] = {"name": contender.name, "status": "running", "reason": None, "steps": {}}
    report.facts["contenders"].append(result)
    for name, arguments in contender.steps(work, seconds):
        started = time.monotonic()
        code, output, reason = _run([sys.executable, "-m", "spmdeploy", *arguments, "--json"], budget)
        facts = _json_of(output) or {}
        step = {"exit_code": code, "seconds": round(time.monotonic() - started, 1)} | _extract(name, facts)
        result["steps"][name] = step
        if code != 0:
            first = len(result["steps"]) == 1
            result["status"] = (
                "skipped" if code is None else "unavailable" if first and code == UNAVAILABLE else "failed"
            )
            result["reason"] = f"{name}: {facts.get('error') or reason}"
            break
        report.save()
    else:
        result["status"] = "passed"
    report.save()
    print(f"{contender.name}: {result['status']}  {result['reason'] or ''}", file=sys.stderr)


def _run(command: list[str], budget: Budget) -> tuple[int | None, str, str | None]:
    """Exit code (None if the budget did not allow it), stdout, and the reason of a failure."""
    timeout = budget.step()
    if not timeout:
        return None, "", "the budget was used up"
    try:
        done = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", check=False, timeout=timeout
        )
    except subprocess.TimeoutExpired:
        return None, "", f"it did not end within {timeout:.0f} s"
    tail = " ".join(done.stderr.split())[-400:]
    return done.returncode, done.stdout, f"exit code {done.returncode}: {tail}" if done.returncode else None


def _json_of(output: str) -> dict[str, Any] | None:
    try:
        value = json.loads(output.strip().splitlines()[-1])
    except (ValueError, IndexError):
        return None
    return value if isinstance(value, dict) else None


def _extract(step: str, facts: dict[str, Any]) -> dict[str, Any]:
    """What the report keeps of a command's JSON."""
    if step == "bench":
        rows = [{key: row[key] for key in _ROW_FIELDS if key in row} for row in facts.get("rows", [])]
        machine = {"machine": facts["machine"]} if "machine" in facts else {}
        return {"rows": rows, "warnings": facts.get("warnings", [])} | machine
    kept = ("provider", "golden", "checks", "engines", "error", "hint")
    return {key: facts[key] for key in kept if key in facts}


_ROW_FIELDS = ("status", "reason", "ran", "parity", "first_ms", "latency_ms", "edits_per_second", "memory", "notes")
_ROW_FIELDS += ("joules_per_edit", "phases_ms", "floor")


def table(facts: dict[str, Any]) -> str:
    """The report in Markdown: a row for each contender, no time where a check failed."""
    outcome = "passed" if facts["passed"] else "FAILED"
    lines = [f"# `{facts['command']}`: {outcome if facts['finished'] else f'{outcome} so far, not finished'}", ""]
    machine = next((step["machine"] for step in _bench_steps(facts) if "machine" in step), None)
    if machine:
        gpus = ", ".join(gpu["name"] for gpu in machine["gpus"]) or f"no GPU ({machine['gpu_note']})"
        lines += [f"{gpus}; {machine['cpu']['model']}; weights: {facts['weights']}.", ""]
    if large := facts.get("large_activations"):
        lines += [
            f"Large activations: {large['overflowing_norms']} of {large['norms']} norms overflow FP16 statistics "
            f"({large['overflowing_norms_before']} without scaling), largest value {large['largest_value']:.0f}.",
            "",
        ]
    if kernels := facts["kernels"]:
        lines += [f"Kernels: {': '.join(filter(None, (kernels['status'], kernels['reason'])))}.", ""]
    lines += ["| contender | status | median | p95 | from PyTorch FP32 | PSNR, large activations | reason |"]
    lines += ["|---|---|---|---|---|---|---|"]
    lines += [f"| {' | '.join(_cells(result))} |" for result in facts["contenders"]]
    return "\n".join(lines) + "\n"


def _bench_steps(facts: dict[str, Any]) -> list[dict[str, Any]]:
    return [result["steps"]["bench"] for result in facts["contenders"] if "bench" in result["steps"]]


def _cells(result: dict[str, Any]) -> list[str]:
    steps = result["steps"]
    row = next(iter(steps.get("bench", {}).get("rows", [])), {})
    latency = (row.get("latency_ms") or {}) if result["status"] == "passed" else {}
    parity = row.get("parity") or {}
    large = [edit["psnr_db"] for edit in steps.get("large activations", {}).get("golden", [])]
    cell: Callable[[Any, str], str] = lambda value, unit: "" if value is None else f"{value:.2f} {unit}"  # noqa: E731
    return [
        result["name"],
        result["status"],
        cell(latency.get("p50"), "ms"),
        cell(latency.get("p95"), "ms"),
        f"{parity['max_grey']} levels, {parity['psnr_db'] or 'inf'} dB" if parity else "",
        f"{min(psnr for psnr in large if psnr is not None):.1f} dB" if any(psnr is not None for psnr in large) else "",
        (result["reason"] or "").replace("|", "/")[:200],
    ]


if __name__ == "__main__":
    sys.exit(main())

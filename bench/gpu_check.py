"""One command for a machine with a GPU: everything that can run there, built, compared, repeated and timed.

    make gpu-check

Two bundles are made, one with seeded random weights and one whose activations overflow statistics in half precision
(`large_activations` proves that they do). Every contender is a process of its own, so that none can spoil another, and

- gives the pictures that PyTorch in FP32 gives on the same device, within the limits of its precision, on both bundles;
- gives the same bytes every time, and leaves the device's memory as it was: while it runs, and when it is closed;
- does not disturb PyTorch in the same process, nor PyTorch it; engines take PyTorch's tensors where they lie;
- carries a large edit up through its levels, to PyTorch's picture; engines without a copy to the host in between, and
  to the very picture that comes out by way of the host;
- is timed, by the device's events and by the wall clock, but only if all of that holds.

What cannot run appears with the reason. Ends with 5 when a check failed, 4 when nothing could be prepared. Writes JSON
and a table in Markdown beside it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from gpu_cascade import cascade
from gpu_contenders import Contender, Runner, contenders, free_bytes
from numpy.typing import NDArray

from spmdeploy.backends.verify import GoldenSample, measure_deviation, read_golden
from spmdeploy.bench.machine import describe_machine, read_state
from spmdeploy.bundle.bundle import Bundle, open_bundle
from spmdeploy.errors import SpmDeployError, UnavailableError
from spmdeploy.gpu.driver import visible_gpus
from spmdeploy.types import ModelInput

SCHEMA = "spmdeploy.gpu-check/2"
FAILED, NOT_PREPARED = 5, 4
PRESETS = {"paper": ("cityscapes", 32, 64), "small": ("street", 16, 32), "tiny": ("street", 2, 8)}
BUNDLES = ("plain", "large")
BATCHES = (1, 4, 8)
WARM_UP = 20
CPU_REPEATS = 10
"""CPUs are here to be compared with; a second a run, they would take the most of the time."""
SLACK = 4 << 20
"""Bytes by which free memory may differ between two looks: drivers give and take in pieces of 2 MiB."""
CONTENDER_SECONDS = 3600


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="the JSON file; the table goes beside it as .md")
    parser.add_argument("--work", type=Path, required=True, help="folder for bundles, engines and each one's result")
    parser.add_argument("--preset", choices=PRESETS, default="paper", help="size of the seeded network")
    parser.add_argument("--bundle", type=Path, help="check this bundle's weights instead of seeded ones")
    parser.add_argument("--device", choices=("auto", "cpu"), default="auto")
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--only", action="append", help="only contenders whose name holds this")
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    gpu = options.device == "auto" and _gpus() > 0
    if options.contender:
        contender = next(one for one in contenders(gpu) if one.name == options.contender)
        _write_json(_result_file(options.work, contender), judge(contender, options.work, options.repeats))
        return 0
    if options.output is None:
        parser.error("--output says where the result goes")
    return check(options, gpu)


def check(options: argparse.Namespace, gpu: bool) -> int:
    """Prepares the bundles, lets every contender be judged in a process of its own, and writes what came out."""
    before = asdict(read_state())
    try:
        activations = prepare(options)
    except (SpmDeployError, ModuleNotFoundError) as error:
        print(f"error: nothing can be checked: {error}", file=sys.stderr)
        return NOT_PREPARED
    results = []
    for contender in contenders(gpu):
        if options.only and not any(words in contender.name for words in options.only):
            continue
        results.append(_in_own_process(contender, options))
        print(f"{contender.name}: {results[-1]['status']}  {results[-1].get('reason') or ''}", file=sys.stderr)
    passed = all(result["status"] != "failed" for result in results)
    told = {
        "schema": SCHEMA,
        "command": "make gpu-check",
        "passed": passed,
        "machine": {**asdict(describe_machine()), "before": before, "after": asdict(read_state())},
        "weights": str(options.bundle or f"{options.preset}, seeded"),
        "repeats": options.repeats,
        "large_activations": activations,
        "contenders": results,
    }
    _write_json(options.output, told)
    options.output.with_suffix(".md").write_text(table(told), encoding="utf-8")
    print(table(told))
    return 0 if passed else FAILED


def _in_own_process(contender: Contender, options: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, __file__, "--work", options.work, "--repeats", options.repeats]
    command += ["--device", options.device, "--contender", contender.name]
    file = _result_file(options.work, contender)
    file.unlink(missing_ok=True)
    try:
        done = subprocess.run(
            [str(word) for word in command], capture_output=True, text=True, check=False, timeout=CONTENDER_SECONDS
        )
        words = " ".join(done.stderr.split())[-600:]
        how = f"its process ended with {done.returncode}: {words}"
    except subprocess.TimeoutExpired:
        how = f"it did not end within {CONTENDER_SECONDS} s"
    if file.exists():
        result: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return result
    return {"name": contender.name, "device": contender.device, "status": "failed", "reason": how, "checks": []}


def _result_file(work: Path, contender: Contender) -> Path:
    return work / f"{contender.name.replace(' ', '_')}.json"


# ---------------------------------------------------------------------------------------------------------- preparing


def prepare(options: argparse.Namespace) -> dict[str, Any]:
    """The two bundles in the work folder, made anew; returns the proof that the second one's activations overflow."""
    from large_activations import PEAK, enlarge, proof

    from spmdeploy.backends.pytorch import bundled_generator

    options.work.mkdir(parents=True, exist_ok=True)
    plain_path = options.work / "plain.spm"
    if options.bundle:
        shutil.rmtree(plain_path, ignore_errors=True)
        shutil.copytree(options.bundle, plain_path, ignore=shutil.ignore_patterns("engines"))
    else:
        _export_seeded(options, plain_path)
    plain = open_bundle(plain_path)
    generator = bundled_generator(plain)
    golden = [read_golden(plain, edit) for edit in plain.manifest.golden]
    enlarged = enlarge(generator, golden[0])
    _export(enlarged, plain.manifest.classes, options.work / "large.spm")
    layers = [layer for pictures in golden for layer in proof(enlarged, pictures)]
    return {
        "norms_that_overflow_in_halves": sum(layer.overflows for layer in layers),
        "norms": len(layers),
        "norms_that_overflow_without_scaling": sum(layer.overflows for layer in proof(generator, golden[0])),
        "largest_value": max(layer.peak for layer in layers),
        "largest_half": float(np.finfo(np.float16).max),
        "scaled_to": PEAK,
    }


def _export_seeded(options: argparse.Namespace, path: Path) -> None:
    import torch

    from spmdeploy.labels import class_table
    from spmdeploy.model.generator import Generator, GeneratorConfig

    classes, width, hidden = PRESETS[options.preset]
    table = class_table(classes)
    torch.manual_seed(0)
    _export(Generator(GeneratorConfig(len(table), width, hidden)), table, path)


def _export(generator: Any, table: Any, path: Path) -> None:
    from spmdeploy.export.pipeline import ExportOptions, export_bundle
    from spmdeploy.model.checkpoint import save_generator

    checkpoint = path.with_suffix(".safetensors")
    checkpoint.unlink(missing_ok=True)
    save_generator(generator, checkpoint)
    export_bundle(checkpoint, path, ExportOptions(table, overwrite=True), lambda step: print(step, file=sys.stderr))


# ------------------------------------------------------------------------------------------------------------ judging


def judge(contender: Contender, work: Path, repeats: int) -> dict[str, Any]:
    """Everything about one contender, as JSON. What it lacks is a reason; what it does wrong is a failed check."""
    told: dict[str, Any] = {"name": contender.name, "device": contender.device, "status": "passed", "checks": []}
    bundles = {name: open_bundle(work / f"{name}.spm") for name in BUNDLES}
    repeats = repeats if contender.device != "cpu" else min(repeats, CPU_REPEATS)
    checks: list[dict[str, Any]] = told["checks"]
    try:
        with _opened(contender, bundles["plain"]) as runner:
            told |= runner.facts
            checks.append(pictures(runner, contender, bundles["plain"], work))
            checks.append(repeated(runner, contender, bundles["plain"], repeats))
            checks += beside_torch(runner, contender, bundles["plain"])
            if runner.session is not None:
                first = next(iter(_golden(bundles["plain"]).values()))
                checks.append(cascade(runner.session, contender, bundles["plain"], first, work))
            times = latency(runner, bundles["plain"], repeats)
            told["notes"] = list(runner.notes())
        with _opened(contender, bundles["large"]) as runner:
            checks.append(pictures(runner, contender, bundles["large"], work))
        checks += reopened(contender, bundles["plain"])
    except (UnavailableError, ModuleNotFoundError) as error:
        if not checks:
            return told | {"status": "unavailable", "reason": str(error)}
        checks.append({"name": "runs", "passed": False, "reason": str(error)})
    except Exception as error:  # of whatever library: it goes into the table, and the others are still judged
        checks.append({"name": "runs", "passed": False, "reason": f"{type(error).__name__}: {error}"[:600]})
    faults = [f"{found['name']}: {found.get('reason', 'failed')}" for found in checks if not found["passed"]]
    if faults:
        return told | {"status": "failed", "reason": "; ".join(faults)}
    return told | {"milliseconds": times}


@contextmanager
def _opened(contender: Contender, bundle: Bundle) -> Iterator[Runner]:
    with contender.open(bundle, contender.device) as runner:
        yield runner


def _golden(bundle: Bundle) -> dict[str, GoldenSample]:
    return {edit.name: read_golden(bundle, edit) for edit in bundle.manifest.golden}


def pictures(runner: Runner, contender: Contender, bundle: Bundle, work: Path) -> dict[str, Any]:
    """Compared with the reference contender's pictures (which it leaves behind), and with those of the export."""
    name = bundle.path.stem
    kept, limits = work / f"reference.{name}.npz", bundle.manifest.limits[contender.limits]  # type: ignore[index]
    golden = _golden(bundle)
    made = {edit: runner.run(one.inputs) for edit, one in golden.items()}
    of = {edit: (one, one.expected) for edit, one in golden.items()}
    for edit, one in golden.items():
        if runner.refine is not None and one.refined is not None:
            unrounded = runner.refine(one.inputs, one.coarse)
            made[f"{edit} refined"] = np.clip(np.rint(unrounded), 0, 255).astype(np.uint8)
            of[f"{edit} refined"] = one, one.refined
    if contender.name == "torch fp32":
        np.savez(kept, **made)
    faults, drifts = [], []
    with np.load(kept) as reference:
        for name_of, picture in made.items():
            one, at_export = of[name_of]
            keep = one.inputs.mask == 0
            if not np.array_equal(picture[keep], one.inputs.image[keep]):
                faults.append(f"{name_of}: pixels outside the mask were changed")
            for whose, expected in {"torch fp32 here": reference[name_of], "torch at export": at_export}.items():
                drift = measure_deviation(picture, expected, one.inputs.mask)
                drifts.append({"edit": name_of, "from": whose, **drift.to_json()})
                faults += [f"{name_of}, from {whose}: {fault}" for fault in drift.faults(limits)]
    told = {"name": f"pictures of the {name} bundle", "passed": not faults, "drifts": drifts}
    return told | ({"reason": "; ".join(faults)} if faults else {})


def repeated(runner: Runner, contender: Contender, bundle: Bundle, repeats: int) -> dict[str, Any]:
    """The same bytes every time, and no memory that goes with the runs."""
    inputs = next(iter(_golden(bundle).values())).inputs
    digests, free = set(), []
    for number in range(repeats):
        digests.add(hashlib.sha256(runner.run(inputs).tobytes()).hexdigest())
        if contender.device != "cpu" and number in (min(9, repeats - 1), repeats - 1):
            free.append(free_bytes())
    lost = free[0] - free[-1] if free and free[0] is not None and free[-1] is not None else None
    faults = [f"{len(digests)} different results in {repeats} runs"] if len(digests) > 1 else []
    faults += [f"{lost:,} bytes were lost in {repeats} runs"] if lost is not None and lost > SLACK else []
    told = {"name": "repeated", "passed": not faults, "results": len(digests), "runs": repeats, "bytes_lost": lost}
    return told | ({"reason": "; ".join(faults)} if faults else {})


def reopened(contender: Contender, bundle: Bundle) -> list[dict[str, Any]]:
    """Opening, running and closing gives the memory back."""
    if contender.device == "cpu" or free_bytes() is None:
        return []
    inputs, free = next(iter(_golden(bundle).values())).inputs, []
    for _ in range(3):
        with _opened(contender, bundle) as runner:
            runner.run(inputs)
        _let_torch_go()
        free.append(free_bytes() or 0)
    lost = free[0] - free[-1]
    told = {"name": "memory after closing", "passed": lost <= SLACK, "free_bytes": free, "bytes_lost": lost}
    return [told if told["passed"] else told | {"reason": f"{lost:,} bytes stay away after two more sessions"}]


def _let_torch_go() -> None:
    import gc

    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def beside_torch(runner: Runner, contender: Contender, bundle: Bundle) -> list[dict[str, Any]]:
    """PyTorch in the same process, on the same GPU, before and between and after."""
    if contender.device == "cpu":
        return []
    try:
        import torch
    except ImportError:
        return []
    if not torch.cuda.is_available():
        return []
    inputs = next(iter(_golden(bundle).values())).inputs
    alone = runner.run(inputs)
    factor = torch.arange(1 << 20, device="cuda", dtype=torch.float32).reshape(1024, 1024) % 7
    product, stream, faults = factor @ factor, torch.cuda.current_stream().cuda_stream, []
    side = torch.cuda.Stream()
    for _ in range(5):
        with torch.cuda.stream(side):
            again = factor @ factor
        if not np.array_equal(runner.run(inputs), alone):
            faults.append("other pictures beside PyTorch than alone")
        torch.cuda.synchronize()
        if not torch.equal(again, product):
            faults.append("PyTorch computes something else beside it")
        if torch.cuda.current_stream().cuda_stream != stream or torch.cuda.current_device() != 0:
            faults.append("PyTorch's stream or device was changed")
    checks: list[dict[str, Any]] = [{"name": "beside torch", "passed": not faults}]
    if faults:
        checks[0]["reason"] = "; ".join(sorted(set(faults)))
    if runner.run_device is not None:
        checks.append(_on_tensors(runner, inputs, alone))
    return checks


def _on_tensors(runner: Runner, inputs: ModelInput, alone: NDArray[np.uint8]) -> dict[str, Any]:
    import torch

    assert runner.run_device is not None
    tensors = {name: torch.from_numpy(array).cuda() for name, array in inputs._asdict().items()}
    edited = torch.zeros(alone.shape, dtype=torch.uint8, device="cuda")
    for stream in (torch.cuda.current_stream(), torch.cuda.Stream()):
        edited.zero_()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            runner.run_device(tensors, {"edited": edited}, stream.cuda_stream)
            result = edited.clone()
        torch.cuda.synchronize()
        if not np.array_equal(result.cpu().numpy(), alone):
            return {"name": "on torch's tensors", "passed": False, "reason": "other pictures than from host arrays"}
    return {"name": "on torch's tensors", "passed": True}


# ------------------------------------------------------------------------------------------------------------- timing


def latency(runner: Runner, bundle: Bundle, repeats: int) -> dict[str, Any]:
    """Milliseconds of one call by the wall clock and, where possible, by the device's events; copies included."""
    golden = next(iter(_golden(bundle).values()))
    told: dict[str, Any] = {}
    for batch in BATCHES:
        inputs = ModelInput(*(np.repeat(array, batch, axis=0) for array in golden.inputs))
        for _ in range(min(WARM_UP, repeats)):
            runner.run(inputs)
        wall = [_seconds(runner.run, inputs) * 1e3 for _ in range(repeats)]
        device = [runner.timed(inputs) for _ in range(repeats)] if runner.timed else None
        told[str(batch)] = {"wall": _summary(wall), "device": None if device is None else _summary(device)}
    return told


def _seconds(call: Callable[..., Any], inputs: ModelInput) -> float:
    started = time.perf_counter()
    call(inputs)
    return time.perf_counter() - started


def _summary(samples: list[float]) -> dict[str, Any]:
    p50, p95 = np.percentile(samples, (50, 95))
    return {"n": len(samples), "min": round(min(samples), 4), "p50": round(float(p50), 4), "p95": round(float(p95), 4)}


# ------------------------------------------------------------------------------------------------------------- telling


def table(told: dict[str, Any]) -> str:
    """Markdown: a row for each contender, no speed where a check failed."""
    where, large = told["machine"], told["large_activations"]
    gpu = where["gpus"][0]["name"] if where["gpus"] else f"no GPU ({where['gpu_note']})"
    lines = [
        f"# `{told['command']}`: {'passed' if told['passed'] else 'FAILED'}",
        "",
        f"{gpu}; {where['cpu']['model']}; weights: {told['weights']}; {told['repeats']} repeats.",
        f"Large activations: {large['norms_that_overflow_in_halves']} of {large['norms']} norms overflow statistics in "
        f"halves ({large['norms_that_overflow_without_scaling']} without scaling); largest value "
        f"{large['largest_value']:.0f} of {large['largest_half']:.0f}.",
        "",
        "| backend | outcome | largest drift | lowest PSNR | with large activations | same bytes | "
        "batch 1: device p50 / p95 | wall p50 / p95 | batch 8: wall p50 | "
        "large edit: kept on | device p50, wall p50 | by way of the host |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [f"| {' | '.join(_row(result))} |" for result in told["contenders"]]
    said: dict[str, list[str]] = {}
    for result in told["contenders"]:
        for words in (*([result["reason"]] if result.get("reason") else []), *result.get("notes", [])):
            said.setdefault(words, []).append(result["name"])
    lines += ["", *(f"- {', '.join(names)}: {words}" for words, names in said.items())]
    return "\n".join(lines).rstrip() + "\n"


def _row(result: dict[str, Any]) -> list[str]:
    checks = {check["name"]: check for check in result["checks"]}
    plain, large = (checks.get(f"pictures of the {name} bundle") for name in BUNDLES)
    again, times = checks.get("repeated"), result.get("milliseconds", {})
    one, eight = times.get("1", {}), times.get("8", {})
    large_edit = checks.get("cascade", {})
    return [
        result["name"],
        result["status"],
        _worst(plain, "max_grey"),
        _worst(plain, "psnr_db"),
        _worst(large, "psnr_db"),
        f"{again['runs']} of {again['runs']}" if again and again["results"] == 1 else "no" if again else "",
        _pair(one.get("device")),
        _pair(one.get("wall")),
        f"{eight['wall']['p50']:.2f} ms" if eight else "",
        large_edit.get("between_levels", ""),
        *(_edit_time(large_edit.get(name) if times else None) for name in _CASCADE_TIMES),
    ]


_CASCADE_TIMES = ("milliseconds", "milliseconds by way of the host")


def _edit_time(times: dict[str, Any] | None) -> str:
    if not times:
        return ""
    device = "" if times["device"] is None else f"{times['device']:.1f} ms, "
    return f"{device}{times['edit']:.1f} ms"


def _worst(check: dict[str, Any] | None, figure: str) -> str:
    if check is None:
        return ""
    values = [drift[figure] for drift in check["drifts"]]
    if figure == "max_grey":
        return str(max(values))
    lowest = min((value for value in values if value is not None), default=None)
    return "identical" if lowest is None else f"{lowest:.1f} dB"


def _pair(summary: dict[str, Any] | None) -> str:
    return f"{summary['p50']:.2f} / {summary['p95']:.2f} ms" if summary else ""


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1, default=list) + "\n", encoding="utf-8")


# ------------------------------------------------------------------------------------------------------------ machine


def _gpus() -> int:
    try:
        return visible_gpus()
    except OSError:
        return 0


if __name__ == "__main__":
    sys.exit(main())

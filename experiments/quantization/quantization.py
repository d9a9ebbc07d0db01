"""Static INT8 and bf16 on a CPU: accuracy and speed of quantized graphs beside FP32.

    python experiments/quantization/quantization.py --data PHOTOS --output FILE.json

PHOTOS: a data folder as for training (`{train,test}/{images,labels}`); the train photos calibrate, the test photos are
compared. Static quantization of ONNX Runtime: QuantizeLinear and DequantizeLinear around convolutions, weights per
channel, activation ranges from the photos. Deviation is that of the edited pixels from PyTorch in FP32; speed is
measured against eager PyTorch in interleaved runs. Time by operator comes from ONNX Runtime's profiler, which slows the
run.
None of these graphs ships.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

import spmdeploy
from spmdeploy.backends.onnxruntime_profile import profiled_nodes
from spmdeploy.backends.pytorch import TorchSession, bundled_generator
from spmdeploy.backends.verify import measure_deviation
from spmdeploy.bench.machine import LoadMeter, describe_machine
from spmdeploy.bench.workloads import edit_batch, scaled_mask
from spmdeploy.bundle.bundle import Bundle, GraphFiles, open_bundle
from spmdeploy.bundle.manifest import EDIT, ON_CPU
from spmdeploy.imaging import files as images
from spmdeploy.imaging.resize import resize_labels, resize_photo
from spmdeploy.types import ModelInput

SCHEMA = "spmdeploy.quantization/1"
BEGIN, END = "<!-- quantization: written by `make figures` -->", "<!-- end of quantization -->"
MIN_PSNR_DB = 35.0
"""Under the mask, on every photo: below it no option for users."""
CALIBRATION_PHOTOS, TEST_PHOTOS = 8, 9
SHARES = (0.05, 0.12, 0.25)
Run = Callable[[ModelInput], NDArray[np.uint8]]

PROFILED_RUNS = 10
OPERATOR_GROUPS = {
    "convolutions": ("Conv", "FusedConv", "QLinearConv"),
    "conversions": ("QuantizeLinear", "DequantizeLinear", "Transpose", "ReorderInput", "ReorderOutput"),
}
"""Operators by what they do: arithmetic, and conversions between data types or memory layouts."""

VARIANTS: dict[str, tuple[str, ...]] = {
    "int8, every convolution": ("",),
    "int8, all but the main convolutions": ("layout_", "context_"),
    "int8, the layout branch": ("layout_",),
}
"""Name parts of the convolutions that are quantized."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of photos with labels of the bundle's classes")
    parser.add_argument("--bundle", type=Path, help="default: the built-in one")
    parser.add_argument("--seconds", type=float, default=8.0, help="of timing for each; 0: none")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    bundle = open_bundle(options.bundle or spmdeploy.default_model())
    meter, machine = LoadMeter(), describe_machine()
    graphs = dict(quantized_graphs(bundle, photos(options.data / "train", bundle, CALIBRATION_PHOTOS)))
    runs = dict(by_torch(bundle)) | {name: _session(graph) for name, graph in graphs.items()}
    compared = [*photos(options.data / "test", bundle, TEST_PHOTOS)]
    expected = [runs["torch fp32"](case) for case in compared]
    rows = []
    for name, run in runs.items():
        rows.append({"name": name} | worst_deviation(run, compared, expected))
        print(rows[-1], file=sys.stderr)
    if options.seconds:
        case = edit_batch(bundle.manifest.classes, 256, "large", 1)
        samples = time_interleaved(runs, case, options.seconds)
        base = statistics.median(samples["torch fp32"])
        for row in rows:
            times = samples[row["name"]]
            middle = statistics.median(times)
            row |= {"n": len(times), "p50_ms": round(middle, 2), "times_as_fast": round(base / middle, 3)}
            row["samples_ms"] = [round(value, 3) for value in times]
            if row["name"] in graphs:
                row["parts_ms"] = time_by_operator(graphs[row["name"]], case)
    result = {
        "schema": SCHEMA,
        "command": f"python experiments/quantization/quantization.py --data camvid --seconds {options.seconds:g}",
        "subject": bundle.manifest.name,
        "machine": asdict(machine),
        "others": {"cpu_share": meter.other_load().cpu_share},
        "calibrated_on": CALIBRATION_PHOTOS,
        "compared_on": len(compared),
        "least_psnr_db": MIN_PSNR_DB,
        "rows": rows,
    }
    options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(table(result))
    return 0


def with_table(page: str, result: dict[str, Any]) -> str:
    """The page with this result between its markers."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    assert begin and end, "the page has lost its markers"
    return f"{before}{begin}\n\n{table(result)}\n\n{end}{after}"


def table(result: dict[str, Any]) -> str:
    """Markdown, a row for each variant."""
    return "\n".join(_lines(result))


def _lines(result: dict[str, Any]) -> Iterator[str]:
    timed = "p50_ms" in result["rows"][0]
    yield (
        "| | lowest and median PSNR under the mask | largest difference | an edit | against eager PyTorch "
        "| profiled: convolutions, conversions, rest |"
    )
    yield "|---|---|---|---|---|---|"
    for row in result["rows"]:
        psnr = "identical" if row["psnr_db"] is None else f"{row['psnr_db']:.1f} dB, {row['median_psnr_db']:.1f} dB"
        fails = row["psnr_db"] is not None and row["psnr_db"] < result["least_psnr_db"]
        speed = (f"{row['p50_ms']:.0f} ms", f"{row['times_as_fast']:.2f}×") if timed else ("", "")
        spent = ", ".join(f"{value:.0f}" for value in row.get("parts_ms", {}).values())
        cells = (row["name"], psnr + " **too far**" * fails, row["max_grey"], *speed, spent and f"{spent} ms")
        yield f"| {' | '.join(map(str, cells))} |"


def photos(folder: Path, bundle: Bundle, count: int) -> Iterator[ModelInput]:
    """Edits of `count` photos, evenly spread over a folder: their middle square, 5, 12 or 25% of it masked."""
    paths = sorted((folder / "images").iterdir())
    size = bundle.manifest.native_size
    for place in range(count):
        path = paths[place * len(paths) // count]
        photo = images.read_photo(path).pixels
        labels = images.read_labels((folder / "labels" / path.stem).with_suffix(".png"))
        side = min(labels.shape)
        middle = tuple(slice((length - side) // 2, (length + side) // 2) for length in labels.shape)
        box = np.zeros((size, size), bool)
        box[size // 3 : size // 2, size // 4 + 7 * place % 80 : size // 2 + 5 * place % 90] = True
        ids = resize_labels(labels[middle], size, size)[None]
        mask = scaled_mask(box, SHARES[place % len(SHARES)])[None].astype(np.uint8)
        yield ModelInput(resize_photo(photo[middle], size, size)[None], ids, ids.astype(np.int32), mask)


class _Photos(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, cases: list[ModelInput]) -> None:
        self._cases = iter(cases)

    def get_next(self) -> dict[str, NDArray[Any]] | None:
        case = next(self._cases, None)
        return None if case is None else case._asdict()


def by_torch(bundle: Bundle) -> Iterator[tuple[str, Run]]:
    reference = TorchSession(bundled_generator(bundle))
    yield "torch fp32", lambda case: reference.run(case)

    def in_bf16(case: ModelInput) -> NDArray[np.uint8]:
        with torch.autocast("cpu", torch.bfloat16):
            return reference.run(case)

    yield "torch bf16 (autocast)", in_bf16


def quantized_graphs(bundle: Bundle, calibration: Iterator[ModelInput]) -> Iterator[tuple[str, bytes]]:
    """For ONNX Runtime; the first is not quantized."""
    plain = with_plain_weights(_loaded(bundle))
    yield "onnxruntime fp32", plain.SerializeToString()
    cases = list(calibration)
    for name, name_parts in VARIANTS.items():
        yield name, quantized(plain, name_parts, cases)


def _loaded(bundle: Bundle) -> onnx.ModelProto:
    """The graph that ONNX Runtime takes on CPUs, its weights in it wherever the bundle keeps them."""
    record = next(it for it in bundle.manifest.graphs if it.graph == ON_CPU[EDIT] and it.precision == "fp32")
    graph = bundle.read_graph(record)
    with tempfile.TemporaryDirectory() as folder:
        for name, content in {"graph.onnx": graph.content, **graph.weights}.items():
            (Path(folder) / name).write_bytes(content)
        return onnx.load(Path(folder) / "graph.onnx")


def with_plain_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """Folds operations on weights alone (casts of FP16 weights, ones added to biases), as the quantizer requires."""
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in [node for node in model.graph.node if node.op_type in ("Cast", "Add")]:
        if weights.keys() >= set(node.input):
            values = sum(numpy_helper.to_array(weights[name]).astype(np.float32) for name in node.input)
            weights[node.output[0]] = numpy_helper.from_array(np.asarray(values), node.output[0])
            model.graph.node.remove(node)
    read = {name for node in model.graph.node for name in node.input}
    del model.graph.initializer[:]
    model.graph.initializer.extend(tensor for name, tensor in weights.items() if name in read)
    return model


def quantized(model: onnx.ModelProto, name_parts: tuple[str, ...], cases: list[ModelInput]) -> bytes:
    convolutions = [it.name for it in model.graph.node if it.op_type == "Conv" and "LeakyRelu" not in it.name]
    chosen = [
        name for name in convolutions if any(part in name for part in name_parts)
    ]  # above: those that change nothing
    assert chosen, name_parts
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "plain.onnx", Path(folder) / "quantized.onnx"
        source.write_bytes(model.SerializeToString())
        quantize_static(
            source,
            target,
            _Photos(cases),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["Conv"],
            nodes_to_quantize=chosen,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        return target.read_bytes()


def _session(graph: bytes) -> Run:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])

    def run(case: ModelInput) -> NDArray[np.uint8]:
        edited: NDArray[np.uint8] = session.run(["edited"], case._asdict())[0]
        return edited

    return run


def worst_deviation(run: Run, cases: list[ModelInput], expected: list[NDArray[np.uint8]]) -> dict[str, Any]:
    """Worst and median deviation over all cases."""
    deviations = [
        measure_deviation(run(case), reference, case.mask) for case, reference in zip(cases, expected, strict=True)
    ]
    levels = [it.psnr_db for it in deviations]
    finite = np.isfinite(levels).any()
    return {
        "psnr_db": round(min(levels), 2) if finite else None,
        "median_psnr_db": round(float(np.median(levels)), 2) if finite else None,
        "max_grey": max(it.max_grey for it in deviations),
    }


def time_by_operator(graph: bytes, case: ModelInput) -> dict[str, float]:
    """Milliseconds of an edit by kind of operator, each node at its fastest of `PROFILED_RUNS` runs."""
    nodes = profiled_nodes(GraphFiles(graph), "CPUExecutionProvider", case._asdict(), PROFILED_RUNS)
    count = len(nodes) // PROFILED_RUNS
    totals = dict.fromkeys((*OPERATOR_GROUPS, "rest"), 0.0)
    for place in range(count):
        operator = nodes[place]["args"]["op_name"]
        kind = next((name for name, operators in OPERATOR_GROUPS.items() if operator in operators), "rest")
        totals[kind] += min(float(node["dur"]) for node in nodes[place::count]) / 1000
    return {name: round(value, 2) for name, value in totals.items()}


def time_interleaved(runs: dict[str, Run], case: ModelInput, seconds: float) -> dict[str, list[float]]:
    """Milliseconds of every edit, interleaved, about `seconds` for each; the first three are not counted."""
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(3):
        for run in runs.values():
            run(case)
    end = time.perf_counter() + seconds * len(runs)
    while time.perf_counter() < end:
        for name, run in runs.items():
            started = time.perf_counter()
            run(case)
            samples[name].append((time.perf_counter() - started) * 1000)
    return samples


if __name__ == "__main__":
    sys.exit(main())

"""Compares exported graphs with PyTorch in FP32, and defines the limits of the deviation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from spmdeploy.backends.onnxruntime_graph import CachedLayoutGraphs, LoadedGraph
from spmdeploy.backends.verify import GoldenResult, GoldenSample, compare_with_golden
from spmdeploy.bundle.manifest import EDIT, REFINE, ParityLimits
from spmdeploy.model.deploy import OUTPUTS
from spmdeploy.types import LayoutInput

# FP32 backends sum in another order. That changes roundings by 1 level; where an instance norm divides by nearly zero,
# it amplifies the last bits: up to 0.3 levels before rounding, measured with random weights. Hence 2.
#
# With FP16 weights or arithmetic, the difference must be invisible: 40 dB in the mask is a root mean square difference
# of 2.5 levels, which is not visible side by side. Single pixels may deviate further (14 levels were measured with
# random weights); 48 is still less than the black or white dot of an overflow.
FP32_LIMITS = ParityLimits(max_grey=2, mean_grey=0.05, min_psnr_db=55)
HALF_LIMITS = ParityLimits(max_grey=48, mean_grey=1.0, min_psnr_db=40)


def check_graph(path: Path, graph: str, golden: Mapping[str, GoldenSample], limits: ParityLimits) -> list[GoldenResult]:
    """Run a graph file in ONNX Runtime on the CPU on every golden edit.

    Args:
        path: The ONNX file.
        graph: EDIT or REFINE.
        golden: Golden edits by name.
        limits: The largest deviation.
    """
    loaded = LoadedGraph(path, graph)
    results = []
    for name, sample in golden.items():
        inputs = sample.inputs._asdict() | ({"coarse": sample.coarse} if graph == REFINE else {})
        edited, unrounded = loaded.run(OUTPUTS, inputs)
        expected = sample.refined if graph == REFINE else sample.expected
        assert expected is not None, name
        result = compare_with_golden(np.rint(unrounded).astype(np.uint8), expected, sample, name, limits)
        if graph == EDIT and not np.array_equal(np.rint(unrounded), edited):
            result = replace(result, problems=(*result.problems, "its two outputs contradict each other"))
        results.append(result)
    return results


def check_parts(
    layout: Path, picture: Path, golden: Mapping[str, GoldenSample], limits: ParityLimits
) -> list[GoldenResult]:
    """Run the two parts of an `edit` graph in ONNX Runtime on the CPU on every golden edit.

    Args:
        layout: ONNX file of the part that depends on the layout alone.
        picture: ONNX file of the part that needs the image.
        golden: Golden edits by name.
        limits: Allowed deviation from their results.
    """
    parts = CachedLayoutGraphs(layout, picture)
    results = []
    for name, sample in golden.items():
        run = parts.bind(LayoutInput(*sample.inputs[1:]))
        results.append(compare_with_golden(run(sample.inputs.image), sample.expected, sample, name, limits))
    return results


def worst_case(results: list[GoldenResult]) -> dict[str, float | None]:
    """Return the largest differences and the lowest PSNR of the edits, in the form of the manifest."""
    deviations = [result.deviation for result in results]
    psnr = min(deviation.psnr_db for deviation in deviations)
    return {
        "max_grey": max(deviation.max_grey for deviation in deviations),
        "mean_grey": round(max(deviation.mean_grey for deviation in deviations), 4),
        "psnr_db": None if psnr == float("inf") else round(psnr, 2),
    }

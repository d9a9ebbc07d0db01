"""Which part of the network a profiled operation belongs to. Names in exported graphs carry the module's path."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

PROFILED_RUNS = 3
"""The mean of so many is told."""
_STAGE = re.compile(r"stages\.(\d+)")
_MODULE = re.compile(r"\.(features|context_\w+?|layout_\w+?|to_rgb)(?=/|$)")
_LAYER = re.compile(r"\.(?:encoder|decoder)\.\d+")
# What `to_cpu` adds to compute in the box around the mask, and to put that into the whole; at the end what it did once.
_BOX = re.compile(
    r"^(?:box|classes)/|/(?:around|borders|wide|inside|changed)(?:/|$)|/(?:padded|rows|base|base_box|change|changes|everywhere)$"
)
_KINDS = {"features": "main convolution", "context": "context modulation", "layout": "layout branch", "to": "to RGB"}
_ARITHMETIC = "modulation arithmetic"
_OPERATORS = {
    "InstanceNormalization": "normalization",
    "instance_norm": "normalization",
    "Resize": "resize",
    "Upsample": "resize",
    "upsample_bilinear2d": "resize",
    "ReorderInput": "memory layout",
    "ReorderOutput": "memory layout",
}


@dataclass(frozen=True)
class Operation:
    """One operation of one run. name: the module's path, in a graph followed by the operator's own name."""

    name: str
    operator: str
    microseconds: float


@dataclass(frozen=True)
class LayerGroup:
    """Time of one part of the network in one run, from the library's own profiler."""

    stage: str
    """1 (coarsest) to 3, or `-` for what belongs to none."""
    kind: str
    """main convolution, context modulation, layout branch, ..."""
    milliseconds: float
    share: float


@dataclass(frozen=True)
class Profile:
    """Where an edit spends time and memory."""

    parts: tuple[LayerGroup, ...]
    activation_bytes: int | None
    """The most that was held at once beside the weights, where the library tells."""


def group_by_layer(operations: Iterable[Operation], runs: int) -> tuple[LayerGroup, ...]:
    """Time by stage and kind, of the mean run, the longest first.

    Operations that a library has added have no path: they belong to the stage of the one before.
    """
    spent: defaultdict[tuple[str, str], float] = defaultdict(float)
    stage = "-"
    for operation in operations:
        kind = kind_of(operation.name, operation.operator)
        if kind != _OPERATORS["ReorderInput"]:
            stage = stage_of(operation.name)
        spent[stage, kind] += operation.microseconds / 1000 / runs
    total = sum(spent.values()) or 1.0
    parts = [LayerGroup(stage, kind, time, time / total) for (stage, kind), time in spent.items()]
    return tuple(sorted(parts, key=lambda part: -part.milliseconds))


def stage_of(name: str) -> str:
    """The stage's number from 1, or `-`."""
    found = _STAGE.search(name)
    return str(int(found[1]) + 1) if found else "-"


def kind_of(name: str, operator: str) -> str:
    if operator in _OPERATORS:
        return _OPERATORS[operator]
    name = name.removesuffix("_nchwc")  # ONNX Runtime's mark of a node that it moved to its blocked layout
    if _BOX.search(name):
        return "around the mask"
    if module := _MODULE.search(name):
        return _KINDS[module[1].partition("_")[0]]
    if operator in ("Conv", "FusedConv"):  # fused with the activation behind it, whose name it has taken
        return _fused_kind(name.rpartition("/")[2])
    if _LAYER.search(name):
        return _ARITHMETIC
    return "skips and compositing" if _STAGE.search(name) else "conditioning and compositing"


def _fused_kind(activation: str) -> str:
    """`modulation.py` applies two ReLUs in each layer: to the context first, then to the layout. Before its last
    activation `to_cpu` has a convolution that changes nothing."""
    if activation == "Relu":
        return _KINDS["context"]
    if activation in ("LeakyRelu", "same"):
        return _ARITHMETIC
    return _KINDS["layout"] if activation.startswith("Relu") else _KINDS["to"]

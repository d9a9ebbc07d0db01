"""Time of an edit by part of the network, from the profilers of ONNX Runtime and PyTorch.

Names of operations in exported graphs contain the path of the PyTorch module.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from spmdeploy.types import ModelInput

if TYPE_CHECKING:
    from torch import nn

    from spmdeploy.backends.onnxruntime_graph import Graph
    from spmdeploy.backends.pytorch import TorchSession

PROFILED_RUNS = 3
"""Runs whose mean is reported."""
_STAGE = re.compile(r"stages\.(\d+)")
_MODULE = re.compile(r"\.(features|context_\w+?|layout_\w+?|to_rgb)(?=/|$)")
_LAYER = re.compile(r"\.(?:encoder|decoder)\.\d+")
# Nodes that the exporter's CPU graph adds to compute only the box around the mask and to paste it into the whole map.
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
    """One operation of one run. name: the module's path; in a graph, followed by the operator's own name."""

    name: str
    operator: str
    microseconds: float


@dataclass(frozen=True)
class LayerGroup:
    """Time of one part of the network in one run, by the library's own profiler."""

    stage: str
    """1 (coarsest) to 3, or `-` outside the stages."""
    kind: str
    """main convolution, context modulation, layout branch, ..."""
    milliseconds: float
    share: float


@dataclass(frozen=True)
class Profile:
    """Time by part of the network, and memory of activations."""

    parts: tuple[LayerGroup, ...]
    activation_bytes: int | None
    """Largest amount held at once in addition to the weights; None if unavailable."""


def group_by_layer(operations: Iterable[Operation], runs: int) -> tuple[LayerGroup, ...]:
    """Time by stage and kind, averaged over `runs`, longest first.

    Operations added by the library have no path: they belong to the stage of the preceding one.
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
    """The part of the network that a node belongs to, from the node's name and operator."""
    if operator in _OPERATORS:
        return _OPERATORS[operator]
    name = name.removesuffix("_nchwc")  # ONNX Runtime's suffix for nodes in its blocked layout
    if _BOX.search(name):
        return "around the mask"
    if module := _MODULE.search(name):
        return _KINDS[module[1].partition("_")[0]]
    if operator in ("Conv", "FusedConv"):  # fused with the following activation, whose name it takes
        return _fused_kind(name.rpartition("/")[2])
    if _LAYER.search(name):
        return _ARITHMETIC
    return "skips and compositing" if _STAGE.search(name) else "conditioning and compositing"


def _fused_kind(activation: str) -> str:
    """Kind of a convolution from the name of the activation fused with it.

    Each layer of `model/modulation.py` applies two ReLUs, to the context and then to the layout. The CPU graph has an
    identity convolution before its last activation.
    """
    if activation == "Relu":
        return _KINDS["context"]
    if activation in ("LeakyRelu", "same"):
        return _ARITHMETIC
    return _KINDS["layout"] if activation.startswith("Relu") else _KINDS["to"]


def profile_onnxruntime(graph: Graph, provider: str, batch: ModelInput) -> Profile:
    """Profiles a graph in a session of its own. provider: ONNX Runtime's name of it."""
    from spmdeploy.backends.onnxruntime_profile import profiled_nodes

    nodes = profiled_nodes(graph, provider, batch._asdict(), PROFILED_RUNS)
    operations = [
        Operation(
            str(node["name"]).removesuffix("_kernel_time"), str(node["args"]["op_name"]), float(node.get("dur", 0))
        )
        for node in nodes
    ]
    held = [int(node["args"]["mem_bytes_in_use"]) for node in nodes if "mem_bytes_in_use" in node["args"]]
    return Profile(group_by_layer(operations, PROFILED_RUNS), max(held) - min(held) if held else None)


def profile_torch(session: TorchSession, batch: ModelInput) -> Profile:
    """Profiles eager PyTorch. Time of an operator that a module calls includes what the operator calls."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    session.run(batch)
    activities = [ProfilerActivity.CPU]
    if session.device != "cpu":
        activities.append(ProfilerActivity.CUDA)
        torch.cuda.reset_peak_memory_stats(session.device)
    with ExitStack() as stack:
        for name, module in session.edit_graph.named_modules():
            _record_module(module, name, stack)
        with profile(activities=activities) as profiler:
            for _ in range(PROFILED_RUNS):
                session.run(batch)
    operations = [
        Operation(
            module.removeprefix("generator."),
            event.name.removeprefix("aten::"),
            event.cpu_time_total if session.device == "cpu" else event.device_time_total,
        )
        for event in profiler.events()
        if (module := _calling_module(event)) is not None
    ]
    return Profile(group_by_layer(operations, PROFILED_RUNS), _peak_activation_bytes(session))


_MODULE_PREFIX = "module "


def _record_module(module: nn.Module, name: str, stack: ExitStack) -> None:
    """Adds a range named after the module to the profile, until the stack is closed."""
    from torch.profiler import record_function

    open_ranges: list[Any] = []

    def enter(*_: Any) -> None:
        open_ranges.append(record_function(_MODULE_PREFIX + name))
        open_ranges[-1].__enter__()

    def leave(*_: Any) -> None:
        open_ranges.pop().__exit__(None, None, None)

    hooks: list[Callable[[], None]] = [
        module.register_forward_pre_hook(enter).remove,
        module.register_forward_hook(leave).remove,
    ]
    for remove in hooks:
        stack.callback(remove)


def _calling_module(event: Any) -> str | None:
    """The module that called the operator directly; None for module ranges and for operators called by operators."""
    parent = event.cpu_parent
    if event.name.startswith(_MODULE_PREFIX) or parent is None or not parent.name.startswith(_MODULE_PREFIX):
        return None
    return str(parent.name.removeprefix(_MODULE_PREFIX))


def _peak_activation_bytes(session: TorchSession) -> int | None:
    """Peak of torch's GPU allocations without the weights; None on CPUs, where torch does not count."""
    import torch

    if session.device == "cpu":
        return None
    weights = sum(it.numel() * it.element_size() for it in session.edit_graph.parameters())
    return torch.cuda.max_memory_allocated(session.device) - weights

"""Where eager PyTorch spends an edit, by module."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from spmdeploy.backends.base import Session
from spmdeploy.backends.pytorch import TorchSession
from spmdeploy.bench.profile import PROFILED_RUNS, Operation, Profile, group_by_layer
from spmdeploy.bench.workloads import EditBatch

_MARK = "module "


def profiled_in_torch(session: Session, batch: EditBatch) -> Profile:
    """session: a TorchSession. Every operator that a module calls itself counts with all that it calls in turn."""
    assert isinstance(session, TorchSession)
    session.run(*batch.arrays)
    activities = [ProfilerActivity.CPU]
    if session.device != "cpu":
        activities.append(ProfilerActivity.CUDA)
        torch.cuda.reset_peak_memory_stats(session.device)
    with ExitStack() as stack:
        for name, module in session.edit_graph.named_modules():
            _mark(module, name, stack)
        with profile(activities=activities) as profiler:
            for _ in range(PROFILED_RUNS):
                session.run(*batch.arrays)
    operations = [
        Operation(
            module.removeprefix("generator."),
            event.name.removeprefix("aten::"),
            event.cpu_time_total if session.device == "cpu" else event.device_time_total,
        )
        for event in profiler.events()
        if (module := _calling_module(event)) is not None
    ]
    return Profile(group_by_layer(operations, PROFILED_RUNS), _activation_bytes(session))


def _mark(module: nn.Module, name: str, stack: ExitStack) -> None:
    """Names the module's own time in the profile until the stack is closed."""
    open_ranges: list[Any] = []

    def enter(*_: Any) -> None:
        open_ranges.append(record_function(_MARK + name))
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
    """The module whose own code called the operator; None for a module itself, and for operators inside operators."""
    parent = event.cpu_parent
    if event.name.startswith(_MARK) or parent is None or not parent.name.startswith(_MARK):
        return None
    return str(parent.name.removeprefix(_MARK))


def _activation_bytes(session: TorchSession) -> int | None:
    """The most that torch held on the GPU at once, beside the weights; PyTorch does not count on CPUs."""
    if session.device == "cpu":
        return None
    weights = sum(it.numel() * it.element_size() for it in session.edit_graph.parameters())
    return torch.cuda.max_memory_allocated(session.device) - weights

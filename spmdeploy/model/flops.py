"""Counts the operations and bytes of one edit, by running the deploy graph on meta tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from spmdeploy.model.deploy import EditGraph
from spmdeploy.model.generator import Generator, GeneratorConfig
from spmdeploy.types import NATIVE_SIZE


@dataclass(frozen=True)
class Work:
    """The work of one edit at the native size, by the plain generator."""

    gflop: float
    """2 per multiply-add of the convolutions, in units of 1e9."""
    weight_bytes: int
    """In FP32."""
    written_bytes: int
    """Bytes written by all operators, none of them fused; views write nothing."""
    operators: int
    """Operator calls that write a result."""


def edit_gflop(config: GeneratorConfig) -> float:
    """Operations of one edit; see `Work`."""
    return edit_work(config).gflop


def edit_work(config: GeneratorConfig) -> Work:
    """Counts the work of one edit on meta tensors, without computing it."""
    size = NATIVE_SIZE
    with torch.device("meta"):
        generator = Generator(config)
        graph = EditGraph(generator)
        maps = torch.zeros(1, size, size, dtype=torch.uint8)
        image = torch.zeros(1, size, size, 3, dtype=torch.uint8)
        with FlopCounterMode(display=False) as counter, _Written() as written:
            graph(image, maps, maps.to(torch.int32), maps)
    weights = sum(parameter.numel() for parameter in generator.parameters()) * 4
    return Work(float(counter.get_total_flops()) / 1e9, weights, written.bytes, written.operators)


class _Written(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sums the bytes that operators return, except for views of their inputs."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = 0
        self.operators = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        call: Callable[..., Any] = func
        result = call(*args, **(kwargs or {}))
        if not any(returned.alias_info for returned in func._schema.returns):
            outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
            self.bytes += sum(output.numel() * output.element_size() for output in outputs)
            self.operators += bool(outputs)
        return result

"""Graphs recorded from modules compute what the modules do, and what cannot be recorded is an error."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spmdeploy.export.onnx import IR_VERSION, OPSET
from spmdeploy.export.tracing import trace


class Computes(nn.Module):
    """A module of one convolution and a function of two tensors."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 3, kernel_size=(3, 1), stride=(2, 1), padding=(1, 0), bias=False)
        self.function = function

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor]:
        return (self.function(x, y),)


def record(module: nn.Module, *values: Tensor) -> onnx.ModelProto:
    graph = trace(module.eval(), dict(zip("xy", values, strict=True)), ["result"], "whole")
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)


def operators(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


def floats() -> tuple[Tensor, Tensor]:
    x, y = torch.from_numpy(np.random.default_rng(0).normal(0, 2, (2, 2, 3, 8, 6)).astype(np.float32))
    return x, y


@pytest.mark.parametrize(
    "function",
    [
        lambda x, y: x + y,
        lambda x, y: 1 + x,
        lambda x, y: x - 3,
        lambda x, y: 3 - x,
        lambda x, y: 2 * x / y,
        lambda x, y: (x != y) | (x == x),
        lambda x, y: x != 0,
        lambda x, y: x.clamp(min=0.5),
        lambda x, y: torch.clamp(x, -1, 1),
        lambda x, y: torch.round(x).to(torch.int32),
        lambda x, y: torch.where(x == y, x, y.float()),
        lambda x, y: x.permute(0, 2, 3, 1).unsqueeze(1),
        lambda x, y: torch.cat((x[:, :1], y[:, -1:], x), dim=1),
        lambda x, y: x[:, None, :, ::2, 1:-1],
        lambda x, y: x[:, :, ::1] + y,
        lambda x, y: F.pad(x, (1, 2, 0, 3), mode="replicate"),
        lambda x, y: F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False),
        lambda x, y: F.interpolate(x, scale_factor=0.5, mode="bilinear", align_corners=False),
        lambda x, y: F.avg_pool2d(x, 2),
        lambda x, y: F.instance_norm(x, eps=0.1),
        lambda x, y: F.leaky_relu(F.relu(x) - torch.tanh(y), 0.3),
        lambda x, y: x * torch.arange(6).view(1, 1, 1, 6).to(torch.float32),
    ],
)
def test_recorded_graph_computes_the_same(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    x, y = floats()
    module = Computes(function)
    session = onnxruntime.InferenceSession(record(module, x, y).SerializeToString(), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    (result,) = session.run(None, {name: value.numpy() for name, value in (("x", x), ("y", y)) if name in names})
    expected = module(x, y)[0].numpy()
    assert result.dtype == expected.dtype
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-5)


def test_weights_and_nodes_are_named_after_their_layers() -> None:
    module = Computes(lambda x, y: x)
    module.function = lambda x, y: module.layer(x) + module.layer(y)
    model = record(module, *floats())
    assert [node.name for node in model.graph.node] == ["layer/Conv", "layer/Conv_2", "whole/Add"]
    assert [tensor.name for tensor in model.graph.initializer] == ["layer.weight"]
    assert model.graph.node[-1].output == ["result"]


def test_equal_calls_are_one_node_and_unread_ones_none() -> None:
    def function(x: Tensor, y: Tensor) -> Tensor:
        torch.tanh(y)
        return (x + 1) * (x + 1)

    assert operators(record(Computes(function), *floats())) == ["Add", "Mul"]


def test_conversion_to_own_type_is_no_node() -> None:
    assert operators(record(Computes(lambda x, y: x.float().to(torch.float32) + y), *floats())) == ["Add"]


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (lambda x, y: torch.sin(x), "torch.sin"),
        (lambda x, y: x.add_(1), "torch.Tensor.add_"),
        (lambda x, y: torch.var_mean(x)[0], "torch.var_mean"),
        (lambda x, y: x if x.sum() > 0 else y, "torch.Tensor.sum"),
        (lambda x, y: x[0], r"the index 0"),
        (lambda x, y: x[..., 1:], r"the index \(Ellipsis, slice"),
        (lambda x, y: x * len(y.tolist()), "torch.Tensor.tolist"),
        (lambda x, y: x.mT, "torch.Tensor.mT"),
    ],
)
def test_what_has_no_form_is_named(function: Callable[[Tensor, Tensor], Tensor], name: str) -> None:
    with pytest.raises(TypeError, match=f"({name}).* has no form in ONNX"):
        record(Computes(function), *floats())


def test_hooks_are_removed_after_an_error() -> None:
    module = Computes(lambda x, y: torch.sin(module.layer(x)))
    with pytest.raises(TypeError):
        record(module, *floats())
    assert not module.layer._forward_hooks and not module.layer._forward_pre_hooks

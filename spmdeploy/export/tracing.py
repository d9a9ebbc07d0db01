"""Records what a module computes as an ONNX graph, by running it once.

While it runs, every torch function that it calls becomes the nodes that `_FORMS` gives for it. This is far quicker than
torch.onnx, which traces a network several times and searches the result for patterns, and it keeps the names of layers
and weights. A function without a form is an error, and every graph is compared with PyTorch after its export.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils.weak import WeakTensorKeyDictionary


def trace(
    module: nn.Module, inputs: Mapping[str, Tensor], outputs: Sequence[str], name: str, prefix: str = ""
) -> onnx.GraphProto:
    """Run a module and return what it computed.

    Args:
        module: In evaluation mode. Its control flow must not depend on the values of the inputs.
        inputs: Arguments of its `forward` in order, by the names that they get in the graph.
        outputs: Names of the tensors that it returns.
        name: Of the graph and of the nodes outside all submodules.
        prefix: Start of the paths of submodules that is left out of the names.

    Returns:
        A graph with fixed shapes, its nodes named `layer/Operator` after the module that calls the function, and each
        weight named as in `module`, without the prefix.

    Raises:
        TypeError: The module calls a function that has no form here, or looks at the values of a tensor.
    """
    tracer = _Tracer(name)
    for path, weight in module.state_dict(keep_vars=True).items():
        tracer.name_weight(weight, path.removeprefix(prefix))
    for input_name, value in inputs.items():
        tracer.names[value] = input_name
    with torch.no_grad(), _scopes(module, prefix, tracer.scopes), tracer:
        results = module(*inputs.values())
    for output_name, value in zip(outputs, results, strict=True):
        tracer.rename(value, output_name)
    nodes = needed_nodes(tracer.nodes, outputs)
    return helper.make_graph(
        nodes,
        name,
        [_value_info(input_name, value) for input_name, value in inputs.items()],
        [_value_info(output_name, value) for output_name, value in zip(outputs, results, strict=True)],
        tracer.initializers(nodes),
    )


def needed_nodes(
    nodes: Iterable[onnx.NodeProto], outputs: Iterable[str], without: Container[str] = ()
) -> list[onnx.NodeProto]:
    """The nodes that `outputs` are computed by, in order, leaving out those that compute values in `without`."""
    wanted = set(outputs)
    chosen = []
    for node in reversed(list(nodes)):
        if any(output in wanted and output not in without for output in node.output):
            chosen.append(node)
            wanted.update(node.input)
    return chosen[::-1]


class _Tracer(TorchFunctionMode):
    """Adds nodes for each call of a torch function on a named tensor; computes the others as constants."""

    def __init__(self, outermost: str) -> None:
        super().__init__()
        self.nodes: list[onnx.NodeProto] = []
        self.names: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self.scopes = [outermost]
        self._weights: dict[str, Tensor] = {}
        self._constants: dict[tuple[str, tuple[int, ...], bytes], onnx.TensorProto] = {}
        self._computed: dict[tuple[object, ...], str] = {}
        self._counts: Counter[str] = Counter()

    def name_weight(self, weight: Tensor, name: str) -> None:
        self.names[weight], self._weights[name] = name, weight

    def initializers(self, nodes: Iterable[onnx.NodeProto]) -> list[onnx.TensorProto]:
        """The constants and weights that the nodes read."""
        read = {name for node in nodes for name in node.input}
        constants = [tensor for tensor in self._constants.values() if tensor.name in read]
        weights = {name: weight.detach().numpy() for name, weight in self._weights.items() if name in read}
        return [*constants, *(numpy_helper.from_array(weight, name) for name, weight in weights.items())]

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if any(value in self.names for value in _tensors((*args, *kwargs.values()))):
            form = _FORMS.get(func)
            if form is not None:
                if result not in self.names:  # a conversion to its own type returns the tensor itself
                    self.names[result] = form(self, *args, **kwargs)
            elif isinstance(result, Tensor) or func.__name__ != "__get__":  # attributes such as the shape
                raise TypeError(f"{resolve_name(func) or func} has no form in ONNX in {__name__}")
        return result

    def add(self, operator: str, *inputs: Tensor | NDArray[Any] | str, **attributes: Any) -> str:
        """Add a node unless it is there already, and return the name of its output."""
        names = [self._name(value) for value in inputs]
        key = (operator, *names, *attributes.items())
        if key not in self._computed:
            name = f"{self.scopes[-1]}/{operator}"
            self._counts[name] += 1
            if self._counts[name] > 1:
                name = f"{name}_{self._counts[name]}"
            self.nodes.append(helper.make_node(operator, names, [name], name, **attributes))
            self._computed[key] = name
        return self._computed[key]

    def rename(self, value: Tensor, name: str) -> None:
        """Give another name to a value that a node computes."""
        old = self.names[value]
        assert any(old in node.output for node in self.nodes), f"{name} is not computed"
        for node in self.nodes:
            node.input[:] = [name if one == old else one for one in node.input]
            node.output[:] = [name if one == old else one for one in node.output]

    def _name(self, value: Tensor | NDArray[Any] | str) -> str:
        if isinstance(value, str):
            return value
        if isinstance(value, Tensor):
            if value in self.names:
                return str(self.names[value])
            value = value.numpy()
        key = (value.dtype.name, value.shape, value.tobytes())
        if key not in self._constants:
            self._constants[key] = numpy_helper.from_array(value, f"constant_{len(self._constants) + 1}")
        return self._constants[key].name


@contextmanager
def _scopes(module: nn.Module, prefix: str, scopes: list[str]) -> Iterator[None]:
    """Keeps the path of the innermost submodule that is running at the end of `scopes`."""

    def enter(path: str, *_: object) -> None:
        scopes.append(path)

    def leave(*_: object) -> None:
        scopes.pop()

    hooks = []
    for path, submodule in module.named_modules():
        if path:
            hooks.append(submodule.register_forward_pre_hook(partial(enter, path.removeprefix(prefix))))
            hooks.append(submodule.register_forward_hook(leave))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _tensors(values: Sequence[Any]) -> Iterator[Tensor]:
    """The tensors among arguments and in lists of them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _value_info(name: str, value: Tensor) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, _onnx_type(value.dtype), value.shape)


def _onnx_type(dtype: torch.dtype) -> int:
    return helper.np_dtype_to_tensor_dtype(torch.empty(0, dtype=dtype).numpy().dtype)


def _like(value: Tensor | float, other: Tensor) -> Tensor:
    """A number as a tensor of the type of `other`; a tensor as it is."""
    return value if isinstance(value, Tensor) else torch.tensor(value, dtype=other.dtype)


def _ints(*values: int) -> NDArray[np.int64]:
    return np.array(values, np.int64)


def _elementwise(operator: str) -> Callable[..., str]:
    """The form of a function of two values, the second one a tensor or a number."""

    def form(tracer: _Tracer, x: Tensor, y: Tensor | float) -> str:
        return tracer.add(operator, x, _like(y, x))

    return form


def _reversed_sub(tracer: _Tracer, x: Tensor, y: float) -> str:
    return tracer.add("Sub", _like(y, x), x)


def _not_equal(tracer: _Tracer, x: Tensor, y: Tensor | float) -> str:
    return tracer.add("Not", tracer.add("Equal", x, _like(y, x)))


def _function(operator: str) -> Callable[..., str]:
    """The form of a function of one value."""

    def form(tracer: _Tracer, x: Tensor, inplace: bool = False) -> str:
        assert not inplace
        return tracer.add(operator, x)

    return form


def _leaky_relu(tracer: _Tracer, x: Tensor, negative_slope: float, inplace: bool) -> str:
    assert not inplace
    return tracer.add("LeakyRelu", x, alpha=negative_slope)


def _clamp(tracer: _Tracer, x: Tensor, min: float | None = None, max: float | None = None) -> str:
    return tracer.add("Clip", x, *("" if limit is None else _like(limit, x) for limit in (min, max)))


def _cast(tracer: _Tracer, x: Tensor, dtype: torch.dtype = torch.float32) -> str:
    return tracer.add("Cast", x, to=_onnx_type(dtype))


def _permute(tracer: _Tracer, x: Tensor, *dims: int) -> str:
    return tracer.add("Transpose", x, perm=dims)


def _unsqueeze(tracer: _Tracer, x: Tensor, dim: int) -> str:
    return tracer.add("Unsqueeze", x, _ints(dim))


def _concat(tracer: _Tracer, tensors: Sequence[Tensor], dim: int) -> str:
    return tracer.add("Concat", *tensors, axis=dim)


def _index(tracer: _Tracer, x: Tensor, index: tuple[slice | None, ...]) -> str:
    """Slices, after new dimensions for the Nones."""
    if not isinstance(index, tuple) or not all(part is None or isinstance(part, slice) for part in index):
        raise TypeError(f"the index {index} has no form in ONNX in {__name__}")
    new = [axis for axis, part in enumerate(index) if part is None]
    value = tracer.add("Unsqueeze", x, _ints(*new)) if new else tracer.names[x]
    slices = {axis: part for axis, part in enumerate(index) if part not in (None, slice(None), slice(None, None, 1))}
    if not slices:
        return str(value)
    starts = [part.start or 0 for part in slices.values()]
    ends = [np.iinfo(np.int64).max if part.stop is None else part.stop for part in slices.values()]
    steps = [part.step or 1 for part in slices.values()]
    return tracer.add("Slice", value, _ints(*starts), _ints(*ends), _ints(*slices), _ints(*steps))


def _conv2d(
    tracer: _Tracer,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> str:
    return tracer.add(
        "Conv",
        *(value for value in (x, weight, bias) if value is not None),
        kernel_shape=tuple(weight.shape[2:]),
        strides=tuple(stride),
        pads=(*padding, *padding),
        dilations=tuple(dilation),
        group=groups,
    )


def _instance_norm(tracer: _Tracer, x: Tensor, *, eps: float, **others: Any) -> str:
    assert others["use_input_stats"] and others["weight"] is None and others["bias"] is None, others
    channels = x.shape[1]
    return tracer.add(
        "InstanceNormalization", x, np.ones(channels, np.float32), np.zeros(channels, np.float32), epsilon=eps
    )


def _interpolate(tracer: _Tracer, x: Tensor, *, scale_factor: float, mode: str, **others: Any) -> str:
    assert mode == "bilinear" and not any(others.values()), (mode, others)
    scales = np.array([1, 1, scale_factor, scale_factor], np.float32)
    return tracer.add("Resize", x, "", scales, mode="linear", coordinate_transformation_mode="half_pixel")


def _pad(tracer: _Tracer, x: Tensor, pad: Sequence[int], mode: str, value: float | None) -> str:
    assert mode == "replicate" and value is None and len(pad) == 4, (mode, value, pad)
    left, right, top, bottom = pad
    return tracer.add("Pad", x, _ints(0, 0, top, left, 0, 0, bottom, right), mode="edge")


def _avg_pool2d(tracer: _Tracer, x: Tensor, kernel_size: int) -> str:
    sides = (kernel_size, kernel_size)
    return tracer.add("AveragePool", x, kernel_shape=sides, strides=sides)


def _where(tracer: _Tracer, condition: Tensor, x: Tensor, y: Tensor) -> str:
    return tracer.add("Where", condition, x, y)


_FORMS: Mapping[Callable[..., Any], Callable[..., str]] = {
    F.avg_pool2d: _avg_pool2d,
    F.conv2d: _conv2d,
    F.instance_norm: _instance_norm,
    F.interpolate: _interpolate,
    F.leaky_relu: _leaky_relu,
    F.pad: _pad,
    F.relu: _function("Relu"),
    Tensor.__eq__: _elementwise("Equal"),
    Tensor.__getitem__: _index,
    Tensor.__or__: _elementwise("Or"),
    Tensor.__rsub__: _reversed_sub,
    Tensor.add: _elementwise("Add"),
    Tensor.clamp: _clamp,
    Tensor.div: _elementwise("Div"),
    Tensor.float: _cast,
    Tensor.mul: _elementwise("Mul"),
    Tensor.ne: _not_equal,
    Tensor.permute: _permute,
    Tensor.sub: _elementwise("Sub"),
    Tensor.to: _cast,
    Tensor.unsqueeze: _unsqueeze,
    torch.cat: _concat,
    torch.clamp: _clamp,
    torch.round: _function("Round"),
    torch.tanh: _function("Tanh"),
    torch.where: _where,
}
"""How each function of torch is written in ONNX: takes the tracer and the arguments of the function."""

"""Measures the share of FP16 layers, in the typed network before the build and in the engine after it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from typing import Any

from spmdeploy.engines.library import capture_log, library_logger

DATA_MOVEMENT = frozenset(
    {
        *("CONSTANT", "CAST", "IDENTITY", "SHAPE", "SHUFFLE", "SLICE", "CONCATENATION", "GATHER", "PADDING"),
        *("UNSQUEEZE", "SQUEEZE"),
    }
)
"""Layer types of a network that only move values, by name: `LayerType` grew between versions."""

INSPECTOR_DATA_MOVEMENT = frozenset(
    {"Reformat", "NoOp", "Constant", "Shuffle", "Cast", "ShapeHostToDevice", "Signal", "Wait"}
)
"""The same among the layers of an engine, as the inspector names them."""


def network_fp16_share(network: Any) -> float:
    """Return the share of FP16 among layers that compute in floating point, 0..1, by the types of their outputs."""
    counts: Counter[str] = Counter()
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.num_outputs and layer.type.name not in DATA_MOVEMENT:
            counts[layer.get_output(0).dtype.name] += 1
    return _share(counts["HALF"], counts["FLOAT"]) or 0.0


def engine_fp16_share(library: Any, content: bytes, batch: int) -> tuple[float | None, str | None]:
    """Return the same share of a built engine by the library's inspector, or None and the reason. Needs the GPU.

    Args:
        library: The module.
        content: The engine.
        batch: A batch size within the engine's first optimization profile.
    """
    errors: list[str] = []

    def note(severity: str, text: str) -> None:
        if severity.endswith("ERROR"):
            errors.append(" ".join(text.split()))

    try:
        with capture_log(library, note):
            text = _inspect(library, content, batch)
    except Exception as exc:  # a build of an hour must not be lost to any error of the bindings
        return None, f"the inspector failed: {exc!r}"[:300]
    if text is None:
        return None, f"the engine cannot be loaded here: {errors[0] if errors else 'no reason given'}"[:300]
    return inspected_fp16_share(text)


def _inspect(library: Any, content: bytes, batch: int) -> str | None:
    """The inspector's JSON; None when the engine cannot be loaded."""
    runtime = library.Runtime(library_logger(library))
    engine = runtime.deserialize_cuda_engine(content)
    if engine is None:
        return None
    inspector = engine.create_engine_inspector()
    context = engine.create_execution_context()
    if context is not None:  # the inspector reports formats only when shapes are known
        for index in range(engine.num_io_tensors):
            name = engine.get_tensor_name(index)
            if engine.get_tensor_mode(name) == library.TensorIOMode.INPUT:
                context.set_input_shape(name, (batch, *tuple(engine.get_tensor_shape(name))[1:]))
        inspector.execution_context = context
    return str(inspector.get_engine_information(library.LayerInformationFormat.JSON))


def inspected_fp16_share(text: str) -> tuple[float | None, str | None]:
    """Return the share of FP16 in the inspector's JSON, or None and the reason.

    A layer with weights computes in their type; for others the type of the output counts. TensorRT 10 writes
    "Format/Datatype" (and "N/A due to dynamic shapes" where it is unknown), TensorRT 11
    "DataType" ("Migrating IEngineInspector Usage from TensorRT 10.x to 11.x").
    """
    try:
        entries = json.loads(text).get("Layers", [])
    except (ValueError, AttributeError):
        return None, "the inspector's output is not JSON"
    counts = Counter(_inspected_type(entry) for entry in entries if isinstance(entry, dict))
    share = _share(counts["fp16"], counts["fp32"])
    if share is None:
        return None, f"the inspector shows {len(entries)} layers, but not in which type any of them computes"
    return share, None


def _inspected_type(entry: dict[str, Any]) -> str | None:
    if entry.get("LayerType") in INSPECTOR_DATA_MOVEMENT:
        return None
    weights = entry.get("Weights")
    if isinstance(weights, dict) and (kind := _float_type([weights.get("Type")])):
        return kind
    outputs = [output for output in entry.get("Outputs") or [] if isinstance(output, dict)]
    return _float_type(output.get("DataType") or output.get("Format/Datatype") for output in outputs)


def _float_type(names: Iterable[object]) -> str | None:
    """fp16 or fp32 as the inspector may name them; None for other and unknown types."""
    for text in (str(name).lower() for name in names):
        if "bf16" in text or "bfloat" in text:
            continue
        if "half" in text or "fp16" in text or "float16" in text:
            return "fp16"
        if "float" in text or "fp32" in text:
            return "fp32"
    return None


def _share(fp16: int, fp32: int) -> float | None:
    return fp16 / (fp16 + fp32) if fp16 + fp32 else None

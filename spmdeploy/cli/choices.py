"""What the options with few values accept; apart from `options`, so that nothing here waits for typer."""

from __future__ import annotations

from enum import StrEnum


class Backend(StrEnum):
    auto = "auto"
    onnxruntime = "onnxruntime"
    tensorrt = "tensorrt"
    tensorrt_rtx = "tensorrt-rtx"
    torch = "torch"


class PrecisionChoice(StrEnum):
    auto = "auto"
    fp32 = "fp32"
    fp16 = "fp16"


class TilingChoice(StrEnum):
    auto = "auto"
    off = "off"
    crop = "crop"
    cascade = "cascade"

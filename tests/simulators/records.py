"""Records of engines that do not exist, for tests that need no engine."""

from __future__ import annotations

from dataclasses import replace
from datetime import date
from typing import Any

from spmdeploy.engines.record import (
    BATCH,
    BatchRange,
    BuilderFacts,
    EngineFile,
    EngineHost,
    EngineRecord,
    Gpu,
    MeasuredPrecision,
    Port,
    SourceFile,
)

RTX_3060 = Gpu("NVIDIA GeForce RTX 3060", "8.6")
A10 = Gpu("NVIDIA A10", "8.6")

SAMPLE = EngineRecord(
    bundle="tiny",
    graph="edit",
    precision="fp16",
    runtime="tensorrt",
    version="10.16.1",
    gpu=RTX_3060,
    targets=(),
    builder=BuilderFacts("Linux", "x86_64", "580.95.05", "13.0", "0.1.0"),
    strongly_typed=True,
    fallback=None,
    flags=(),
    batch=BatchRange(1, 1, 8),
    inputs=(Port("image", "uint8", (BATCH, 256, 256, 3)),),
    outputs=(Port("edited", "uint8", (BATCH, 256, 256, 3)),),
    computes_in=MeasuredPrecision(0.9, None, 0.92),
    onnx=SourceFile("graphs/edit.fp16.onnx", "a" * 64),
    weights=None,
    engine=EngineFile("edit.fp16.engine", 6, "b" * 64),
    build_seconds=12.5,
    timing_cache=False,
    created=date(2026, 11, 22),
)
HOST = EngineHost({"tensorrt": "10.16.1", "tensorrt-rtx": "1.7.1.116"}, RTX_3060, "Linux", "x86_64")


def sample(**changes: Any) -> EngineRecord:
    return replace(SAMPLE, **changes)


def for_targets(*targets: str, **changes: Any) -> EngineRecord:
    """A record of an engine built by TensorRT-RTX without a GPU."""
    unread = MeasuredPrecision(None, "no GPU", 0.92)
    made = {"runtime": "tensorrt-rtx", "version": "1.7.1.116", "gpu": None, "targets": targets, "computes_in": unread}
    return sample(**made | changes)

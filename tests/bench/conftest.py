"""Records built without measuring."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from spmdeploy.bench.machine import BackgroundLoad, Cpu, Machine, State
from spmdeploy.bench.nvml import GpuRecord, GpuState
from spmdeploy.bench.parity import IN_THIS_RUN, Parity
from spmdeploy.bench.profile import LayerGroup
from spmdeploy.bench.results import BackendInfo, MemoryUsage, Methodology, ModelInfo, Record, Result
from spmdeploy.bench.roofline import PeakRates, RooflineBound
from spmdeploy.bench.schedule import WarmUp
from spmdeploy.stats import ratio_of_medians, summarize

SLOW, FAST = [[800.0, 810.0], [805.0], [790.0, 820.0]], [[400.0, 405.0], [402.0], [395.0, 410.0]]


def measured_row(backend: str = "torch", turns: Sequence[Sequence[float]] = SLOW, **changes: object) -> Result:
    """An engine row with all figures."""
    row = Result(
        scope="engine",
        backend=backend,
        asked_precision="auto",
        size=256,
        mask="large",
        batch=1,
        streams=1,
        status="measured",
        reason=None,
        ran=BackendInfo("cpu", "fp32", f"{backend} 1.0", None, 1000, 2000),
        masked_share=0.25,
        parity=Parity(IN_THIS_RUN, 1, 0.01, 80.0, ()),
        first_ms=900.0,
        warm_up=WarmUp(2.5, 5, (800.0, 801.0, 802.0), True),
        latency_ms=summarize(turns),
        ratio=None if backend == "torch" else ratio_of_medians(SLOW, turns, "torch"),
        edits_per_second=1.25,
        megapixels_per_second=0.08,
        joules_per_edit=None,
        memory=MemoryUsage(100, 200, None, 50),
        floor=RooflineBound(93.8, 150.0, 300.0, "arithmetic", 0.375),
        phases_ms={"run": 800.0},
        notes={"tiling": "crop", "windows": 1, "tiles": 0, "calls": 1},
        parts=(LayerGroup("1", "layout branch", 500.0, 0.6),),
        samples_ms=tuple(map(tuple, turns)),
    )
    return replace(row, **changes)


def empty_row(backend: str, status: str, reason: str, **changes: object) -> Result:
    """A row without figures."""
    figures = "ran parity first_ms warm_up latency_ms ratio edits_per_second megapixels_per_second memory floor"
    nothing: dict[str, object] = dict.fromkeys(figures.split())
    containers: dict[str, object] = {"phases_ms": {}, "notes": {}, "parts": (), "samples_ms": ()}
    return replace(measured_row(backend), **nothing | containers | {"status": status, "reason": reason} | changes)


def record_of(*rows: Result, cpu: str = "Fast CPU", **changes: object) -> Record:
    """A record of these rows."""
    gpu = GpuState(1500, 5000, 60, 90.0, 250.0, ("power cap",), 1)
    state = State(0.1, (2600.0,), None, (gpu,))
    record = Record(
        spmdeploy="0.1.0",
        created="2026-11-22T12:00:00+00:00",
        subject=ModelInfo("street", "its own weights", {"edit fp32": "a" * 64}, 12, 32, 64, 1000, 93.8),
        protocol=Methodology("spmdeploy bench --backend torch", "by a rule", "2 s", "in turns", 1.5),
        machine=Machine(
            cpu=Cpu(cpu, "x86_64", 4, 2, ("avx2",), ("performance",)),
            memory_gb=16.0,
            gpus=(GpuRecord("A GPU", "8.6", "0123456789abcdef", "575.0", 8.0),),
            gpu_note=None,
            jetson=None,
            system="Linux 6.18",
            python="3.11.7",
            libraries={"torch": "1.0", "onnxruntime": "1.0"},
            variables={"OMP_NUM_THREADS": "2"},
        ),
        before=state,
        after=state,
        others=BackgroundLoad(0.01),
        rates=(PeakRates("cpu", "fp32", "numpy 2", 300.0, 20.0),),
        rows=rows,
        warnings=("torch is unstable",),
    )
    return replace(record, **changes)

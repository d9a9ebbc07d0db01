"""Writes the figures of bench/results/bench_*.json into the README, between its markers. `make figures` runs it."""

from __future__ import annotations

from pathlib import Path

from spmdeploy.bench.record import read_record
from spmdeploy.bench.tables import with_figures

HERE = Path(__file__).parent
README = HERE.parent / "README.md"

records = [read_record(path) for path in sorted((HERE / "results").glob("bench_*.json"))]
README.write_text(with_figures(README.read_text(encoding="utf-8"), records), encoding="utf-8")
print(f"{README.name}: the figures of {len(records)} records")

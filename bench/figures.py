"""Writes what lies in bench/results between the markers of README and docs/bench.md. `make figures` runs it."""

from __future__ import annotations

import json
from pathlib import Path

from quantization import with_table

from spmdeploy.bench.results import read_record
from spmdeploy.bench.tables import insert_tables

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
PAGE = HERE.parent / "docs/bench.md"
QUANTISATION = HERE / "results/quantization_street_cpu.json"

records = [read_record(path) for path in sorted((HERE / "results").glob("bench_*.json"))]
README.write_text(insert_tables(README.read_text(encoding="utf-8"), records), encoding="utf-8")
print(f"{README.name}: the figures of {len(records)} records")

if QUANTISATION.exists():
    told = json.loads(QUANTISATION.read_text(encoding="utf-8"))
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8"), told), encoding="utf-8")
    print(f"{PAGE.name}: what quantization costs and gains")

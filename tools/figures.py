"""Writes the committed measurements into README.md and docs/benchmarks.md. Run by `make figures`.

README.md gets the rows of bench/results/bench_*.json, docs/benchmarks.md the table of the quantization experiment.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "experiments/quantization"))

from quantization import with_table  # noqa: E402

from spmdeploy.bench.results import read_record  # noqa: E402
from spmdeploy.bench.tables import insert_tables  # noqa: E402

README = ROOT / "README.md"
BENCHMARKS = ROOT / "docs/benchmarks.md"
RECORDS = ROOT / "bench/results"
QUANTIZATION = ROOT / "experiments/quantization/results/street_cpu.json"


def main() -> None:
    records = [read_record(path) for path in sorted(RECORDS.glob("bench_*.json"))]
    README.write_text(insert_tables(README.read_text(encoding="utf-8"), records), encoding="utf-8")
    print(f"{README.name}: {len(records)} records")
    if QUANTIZATION.exists():
        result = json.loads(QUANTIZATION.read_text(encoding="utf-8"))
        BENCHMARKS.write_text(with_table(BENCHMARKS.read_text(encoding="utf-8"), result), encoding="utf-8")
        print(f"{BENCHMARKS.name}: {QUANTIZATION.relative_to(ROOT)}")


if __name__ == "__main__":
    main()

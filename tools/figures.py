"""Writes the committed measurements into README.md and docs/benchmarks.md. Run by `make figures`.

Only stable rows, measured on an idle machine, are published: in one table of README.md, and in full with a chart and
commands in docs/benchmarks.md. That page also gets the table of the quantization experiment.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "experiments/quantization"))

from quantization import with_table  # noqa: E402

from spmdeploy.bench.plot import plot_comparison  # noqa: E402
from spmdeploy.bench.results import Record, read_record  # noqa: E402
from spmdeploy.bench.tables import (  # noqa: E402
    commands,
    detailed_tables,
    insert_between_markers,
    is_publishable,
    summary_table,
)

README = ROOT / "README.md"
BENCHMARKS = ROOT / "docs/benchmarks.md"
CHART = ROOT / "docs/benchmarks.png"
RECORDS = ROOT / "bench/results"
QUANTIZATION = ROOT / "experiments/quantization/results/street_cpu.json"


def main() -> None:
    records = committed_records()
    for record in records:
        left_out = sum(not is_publishable(record, row) for row in record.rows if row.latency_ms is not None)
        print(f"{record.subject.name}, {record.created}: {left_out} of {len(record.rows)} rows are unstable, not shown")
    README.write_text(readme_page(README.read_text(encoding="utf-8"), records), encoding="utf-8")
    if commands(records):
        CHART.write_bytes(plot_comparison(records))
    BENCHMARKS.write_text(benchmarks_page(BENCHMARKS.read_text(encoding="utf-8"), records), encoding="utf-8")


def committed_records() -> list[Record]:
    return [read_record(path) for path in sorted(RECORDS.glob("bench_*.json"))]


def readme_page(page: str, records: Sequence[Record]) -> str:
    return insert_between_markers(page, summary_table(records))


def benchmarks_page(page: str, records: Sequence[Record]) -> str:
    text = detailed_tables(records)
    if measured := commands(records):
        chart = "![time of one edit by backend and model, milliseconds on a logarithmic axis](benchmarks.png)"
        text = "\n".join([chart, "", text, "```sh", *measured, "```", ""])
    page = insert_between_markers(page, text)
    result = json.loads(QUANTIZATION.read_text(encoding="utf-8")) if QUANTIZATION.exists() else None
    return page if result is None else with_table(page, result)


if __name__ == "__main__":
    main()

"""Tables of records, and the README's table, which must show the committed records."""

from __future__ import annotations

import importlib
import re
from dataclasses import replace
from pathlib import Path

import pytest

from spmdeploy.bench import tables
from spmdeploy.bench.format import format_duration, format_interval, groups
from spmdeploy.bench.machine import BackgroundLoad
from spmdeploy.bench.parity import IN_THIS_RUN, Parity
from spmdeploy.bench.results import Record
from spmdeploy.stats import Interval

from .conftest import FAST, empty_row, measured_row, record_of

ROOT = Path(__file__).parents[2]
DIFFERING = empty_row(
    "torch-compile",
    "differs",
    "its results differ from PyTorch's: largest difference 99 > 2",
    parity=Parity(IN_THIS_RUN, 99, 9.0, 20.0, ("largest difference 99 > 2",)),
)
UNAVAILABLE = empty_row("tensorrt", "unavailable", "no NVIDIA driver")


def a_record() -> Record:
    return record_of(measured_row(), measured_row("onnxruntime", FAST), DIFFERING, UNAVAILABLE)


def test_pages_show_committed_records(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    figures = importlib.import_module("figures")
    records = figures.committed_records()
    for path, write in ((figures.README, figures.readme_page), (figures.BENCHMARKS, figures.benchmarks_page)):
        page = path.read_text(encoding="utf-8")
        assert write(page, records) == page, "run `make figures`"


def test_insert_between_markers_replaces_old_text() -> None:
    page = f"before\n{tables.BEGIN}\nold\n{tables.END}\nafter\n"
    written = tables.insert_between_markers(page, tables.detailed_tables([a_record()]))
    assert written.startswith(f"before\n{tables.BEGIN}\n") and written.endswith(f"{tables.END}\nafter\n")
    assert "old" not in written and "| 402 ms |" in written
    assert tables.insert_between_markers(written, tables.detailed_tables([a_record()])) == written
    assert "make bench" in tables.detailed_tables([])


def test_commands_of_unpublished_records_are_left_out() -> None:
    busy = record_of(measured_row(), others=BackgroundLoad(0.2))
    assert tables.commands([busy, a_record()]) == ["spmdeploy bench --backend torch"]


def test_group_table_differing_row_shows_no_time() -> None:
    heading, rows = tables.group_table(a_record().rows)
    assert [row[0] for row in rows] == ["torch fp32", "onnxruntime fp32"]
    assert all(len(row) == len(heading) for row in rows)
    report = tables.markdown(a_record())
    line = next(line for line in report.splitlines() if "torch-compile" in line)
    assert "no time" in line and "largest difference 99 > 2" in line and " ms" not in line
    assert "torch-compile" not in tables.detailed_tables([a_record()])
    reasons = tables.failure_lines(a_record().rows)
    assert [reason.partition(":")[0] for reason in reasons] == ["torch-compile", "tensorrt"]
    assert "cannot run here: no NVIDIA driver" in reasons[1]


def test_markdown_contains_every_part() -> None:
    report = tables.markdown(a_record())
    for text in (
        "805 ms",
        "2.00 (",
        "38%",
        "1 gray level, 80.0 dB",
        "by a rule",
        "> torch is unstable",
        "layout branch",
    ):
        assert text in report, text
    for table in re.findall(r"(?:^\|.*\n)+", report, re.MULTILINE):
        assert len({line.count("|") for line in table.splitlines()}) == 1


def test_groups_scopes_are_separate() -> None:
    rows = [measured_row(), measured_row(scope="edit"), measured_row(scope="cold-start"), measured_row(batch=4)]
    titles = [title for title, _ in groups(rows)]
    assert len(titles) == len(set(titles)) == 4
    assert [len(group) for _, group in groups(rows)] == [1, 1, 1, 1]


@pytest.mark.parametrize(
    ("milliseconds", "text"),
    [
        (0.0123, "12.3 µs"),
        (0.5, "500 µs"),
        (1.234, "1.23 ms"),
        (12.34, "12.3 ms"),
        (999.4, "999 ms"),
        (61234, "61.2 s"),
    ],
)
def test_format_duration_picks_unit(milliseconds: float, text: str) -> None:
    assert format_duration(milliseconds) == text


def test_format_interval_names_unit_once_or_twice() -> None:
    assert format_interval(Interval(1.0, 2.0)) == "1.00 to 2.00 ms"
    assert format_interval(Interval(900.0, 1100.0)) == "900 ms to 1.10 s"


def test_summary_table_has_a_row_for_each_backend_and_a_column_for_each_scope() -> None:
    record = record_of(measured_row(), measured_row("onnxruntime", FAST), measured_row(scope="edit"))
    lines = tables.summary_table([record]).splitlines()
    assert lines[0].startswith("| backend | street, network alone | street, files to file | from PyTorch FP32 |")
    assert [line.split("|")[1].strip() for line in lines[2:4]] == ["torch fp32", "onnxruntime fp32"]
    assert "402 ms (2.00×) |  |" in lines[3]
    assert "No figures yet" in tables.summary_table([])


def test_summary_table_leaves_out_graphs_as_exported_and_shows_the_largest_deviation() -> None:
    near, far = (Parity(IN_THIS_RUN, levels, 0.1, 70.0 - levels, ()) for levels in (1, 3))
    rows = [
        measured_row("onnxruntime", FAST, scope=scope, parity=it) for scope, it in (("engine", far), ("edit", near))
    ]
    lines = tables.summary_table([record_of(*rows, measured_row("onnxruntime-plain", FAST))]).splitlines()
    assert lines[2].startswith("| onnxruntime fp32 |") and lines[2].endswith("| 3 gray levels, 67.0 dB |")
    assert "onnxruntime-plain" not in "".join(lines[2:4]) and not lines[3]


def test_detailed_tables_unstable_row_is_left_out() -> None:
    stable, unstable = measured_row(), measured_row("onnxruntime", FAST)
    assert unstable.latency_ms is not None
    unstable = replace(unstable, latency_ms=replace(unstable.latency_ms, unstable=True))
    text = tables.detailed_tables([record_of(stable, unstable)])
    assert "torch fp32" in text and "onnxruntime fp32" not in text and "1 unstable row is not shown" in text
    assert "No figures yet" in tables.detailed_tables([record_of(unstable)])


def test_detailed_tables_record_under_load_is_left_out() -> None:
    busy = record_of(measured_row(), others=BackgroundLoad(0.2))
    assert "No figures yet" in tables.detailed_tables([busy])

"""Records as tables and pictures, and the README's table, which must be that of the committed records."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from spmdeploy.bench import format as words
from spmdeploy.bench import tables
from spmdeploy.bench.fidelity import IN_THIS_RUN, Parity
from spmdeploy.bench.plot import LOWEST, WIDTH, plot
from spmdeploy.bench.results import Record, read_record
from spmdeploy.stats import Interval

from .conftest import FAST, empty_row, measured_row, record_of

ROOT = Path(__file__).parents[2]
DIFFERING = empty_row(
    "torch-compile",
    "differs",
    "its picture is not PyTorch's: largest difference 99 > 2",
    parity=Parity(IN_THIS_RUN, 99, 9.0, 20.0, ("largest difference 99 > 2",)),
)
UNAVAILABLE = empty_row("tensorrt", "unavailable", "no NVIDIA driver")


def a_record() -> Record:
    return record_of(measured_row(), measured_row("onnxruntime", FAST), DIFFERING, UNAVAILABLE)


def test_the_readme_shows_the_committed_records() -> None:
    records = [read_record(path) for path in sorted((ROOT / "bench/results").glob("bench_*.json"))]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert tables.insert_tables(readme, records) == readme, "run `make figures`"


def test_committed_records_were_measured_undisturbed() -> None:
    for path in sorted((ROOT / "bench/results").glob("bench_*.json")):
        record = read_record(path)
        assert not record.others.is_significant, path
        assert all(row.status in ("measured", "unavailable") for row in record.rows), path


def test_figures_stand_between_the_markers() -> None:
    readme = f"before\n{tables.README_BEGIN}\nold\n{tables.README_END}\nafter\n"
    written = tables.insert_tables(readme, [a_record()])
    assert written.startswith(f"before\n{tables.README_BEGIN}\n") and written.endswith(f"{tables.README_END}\nafter\n")
    assert "old" not in written and "| 402 ms |" in written and "torch is unstable" in written
    assert tables.insert_tables(written, [a_record()]) == written
    assert "make bench" in tables.insert_tables(readme, [])


def test_a_row_that_differs_shows_no_time() -> None:
    heading, rows = tables.group_table(a_record().rows)
    assert [row[0] for row in rows] == ["torch fp32", "onnxruntime fp32"]
    assert all(len(row) == len(heading) for row in rows)
    told = tables.markdown(a_record())
    line = next(line for line in told.splitlines() if "torch-compile" in line)
    assert "no speed" in line and "largest difference 99 > 2" in line and " ms" not in line
    assert "torch-compile" not in tables.readme_tables([a_record()])
    reasons = tables.failure_lines(a_record().rows)
    assert [reason.partition(":")[0] for reason in reasons] == ["torch-compile", "tensorrt"]
    assert "cannot run here: no NVIDIA driver" in reasons[1]


def test_the_report_is_whole() -> None:
    told = tables.markdown(a_record())
    for text in (
        "805 ms",
        "2.00 (",
        "38%",
        "1 gray level, 80.0 dB",
        "by a rule",
        "> torch is unstable",
        "layout branch",
    ):
        assert text in told, text
    for table in re.findall(r"(?:^\|.*\n)+", told, re.MULTILINE):
        assert len({line.count("|") for line in table.splitlines()}) == 1


def test_scopes_are_never_in_one_table() -> None:
    rows = [measured_row(), measured_row(scope="edit"), measured_row(scope="cold-start"), measured_row(batch=4)]
    titles = [title for title, _ in words.groups(rows)]
    assert len(titles) == len(set(titles)) == 4
    assert [len(group) for _, group in words.groups(rows)] == [1, 1, 1, 1]


@pytest.mark.parametrize(
    ("milliseconds", "told"),
    [
        (0.0123, "12.3 µs"),
        (0.5, "500 µs"),
        (1.234, "1.23 ms"),
        (12.34, "12.3 ms"),
        (999.4, "999 ms"),
        (61234, "61.2 s"),
    ],
)
def test_durations(milliseconds: float, told: str) -> None:
    assert words.duration(milliseconds) == told


def test_spans_name_their_unit_once_or_twice() -> None:
    assert words.span(Interval(1.0, 2.0)) == "1.00 to 2.00 ms"
    assert words.span(Interval(900.0, 1100.0)) == "900 ms to 1.10 s"


# ------------------------------------------------------------------------------------------------------------- picture


def color_in(picture: np.ndarray, color: tuple[int, int, int]) -> int:
    return int((picture == color).all(axis=2).sum())


TORCH, ONNXRUNTIME = (0x9A, 0xA3, 0xAD), (0x2F, 0x7E, 0xD8)


def test_bars_are_as_long_as_their_medians() -> None:
    picture = plot(record_of(measured_row(), measured_row("onnxruntime", FAST)))
    assert picture.dtype == np.uint8 and picture.shape == (LOWEST, WIDTH, 3)
    lengths = [(picture == color).all(axis=2).sum(axis=1).max() for color in (TORCH, ONNXRUNTIME)]
    assert lengths[0] / lengths[1] == pytest.approx(805 / 402, rel=0.1)


def test_a_row_without_figures_has_no_bar() -> None:
    picture = plot(record_of(measured_row(), empty_row("onnxruntime", "differs", "wrong")))
    assert color_in(picture, TORCH) > 1000 and color_in(picture, ONNXRUNTIME) == 0


def test_many_groups_make_a_taller_picture() -> None:
    rows = [measured_row(batch=batch) for batch in range(1, 9)]
    assert plot(record_of(*rows)).shape[0] > LOWEST
    assert plot(record_of(UNAVAILABLE)).shape == (LOWEST, WIDTH, 3)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_any_speed_can_be_drawn(scale: float) -> None:
    turns = [[value * scale for value in turn] for turn in FAST]
    row = measured_row(turns=turns)
    assert row.floor is not None
    picture = plot(record_of(replace(row, floor=replace(row.floor, milliseconds=200 * scale))))
    assert color_in(picture, TORCH) > 1000

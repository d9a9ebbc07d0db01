"""Comparison of two records."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from spmdeploy import cli
from spmdeploy.bench.compare import Comparison, compare
from spmdeploy.bench.results import Record, record_text
from spmdeploy.errors import InputError

from .conftest import FAST, SLOW, empty_row, measured_row, record_of

NAMES = ("a.json", "b.json")


def comparison(before: Record, after: Record, force: bool = False) -> Comparison:
    return compare(before, after, NAMES, force)


def test_compare_medians_gives_verdict() -> None:
    slow, fast = record_of(measured_row(turns=SLOW)), record_of(measured_row(turns=FAST))
    (change,) = comparison(slow, fast).changes
    assert (change.before, change.after, change.verdict) == (805, 402, "faster")
    assert change.speedup.value == pytest.approx(805 / 402)
    assert change.speedup.interval.low > 1.9
    (back,) = comparison(fast, slow).changes
    assert back.verdict == "slower" and back.speedup.value == pytest.approx(402 / 805)
    (same,) = comparison(slow, slow).changes
    assert same.verdict == "no difference shown" and same.speedup.value == 1


def test_compare_other_machine_needs_force() -> None:
    here, there = record_of(measured_row()), record_of(measured_row(), cpu="Slow CPU")
    with pytest.raises(InputError, match="measured on different machines: CPU: Fast CPU → Slow CPU"):
        comparison(here, there)
    forced = comparison(here, there, force=True)
    assert len(forced.changes) == 1 and "CPU: Fast CPU → Slow CPU" in forced.circumstances


@pytest.mark.parametrize("field", ["uuid_hash", "name"])
def test_compare_other_gpu_is_refused(field: str) -> None:
    here = record_of(measured_row())
    gpus = (replace(here.machine.gpus[0], **{field: "other"}),)
    there = replace(here, machine=replace(here.machine, gpus=gpus))
    with pytest.raises(InputError, match="GPUs"):
        comparison(here, there)


def test_compare_other_affinity_is_refused() -> None:
    here = record_of(measured_row())
    there = replace(here, machine=replace(here.machine, cpu=replace(here.machine.cpu, cores_used=1)))
    with pytest.raises(InputError, match="cores used: 2 → 1"):
        comparison(here, there)


def test_compare_other_versions_are_listed() -> None:
    here = record_of(measured_row())
    there = replace(
        here,
        machine=replace(here.machine, libraries={"torch": "2.0", "onnxruntime": "1.0"}, variables={}),
        subject=replace(here.subject, graphs={"edit fp32": "b" * 64}),
        protocol=replace(here.protocol, seconds=None),
    )
    result = comparison(here, there).circumstances
    assert "torch: 1.0 → 2.0" in result and "OMP_NUM_THREADS: 2 → None" in result and "duration: 1.5 → None" in result
    assert any(text.startswith("graphs: ") for text in result) and len(result) == 4


def test_compare_unmatched_rows_are_listed() -> None:
    before = record_of(measured_row(), measured_row("onnxruntime", FAST), measured_row(batch=4))
    after = record_of(
        measured_row(), empty_row("onnxruntime", "differs", "its results differ from PyTorch's"), measured_row(batch=8)
    )
    result = comparison(before, after)
    assert [change.backend for change in result.changes] == ["torch fp32"]
    missing, surplus, lost = result.unmatched
    assert "batch 4" in missing and "not in b.json" in missing
    assert "batch 8" in surplus and "not in a.json" in surplus
    assert "no figures in b.json: its results differ from PyTorch's" in lost


def test_compare_warnings_name_their_record() -> None:
    result = comparison(record_of(measured_row(), warnings=("shaky",)), record_of(measured_row(), warnings=()))
    assert result.warnings == ("a.json: shaky",)


def test_compare_command_prints_table_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [tmp_path / name for name in ("before.json", "after.json")]
    for path, turns in zip(paths, (SLOW, FAST), strict=True):
        path.write_text(record_text(record_of(measured_row(turns=turns))), encoding="utf-8")
    arguments = ["bench", "compare", *map(str, paths)]
    assert cli.main(arguments) == 0
    table = capsys.readouterr().out
    assert "805 ms" in table and "402 ms" in table and "faster" in table
    assert cli.main([*arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["schema"] == "spmdeploy.bench-compare/1" and result["changes"][0]["verdict"] == "faster"

    paths[1].write_text(record_text(record_of(measured_row(), cpu="Slow CPU")), encoding="utf-8")
    assert cli.main([*arguments, "--json"]) == 7
    assert "different machines" in json.loads(capsys.readouterr().out)["error"]
    assert cli.main([*arguments, "--force"]) == 0
    assert "differs: CPU" in capsys.readouterr().out

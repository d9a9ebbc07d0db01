"""Compares two records: what became faster or slower, and what is within noise."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from spmdeploy.bench.format import backend_name, title
from spmdeploy.bench.machine import differences
from spmdeploy.bench.results import Record, Result
from spmdeploy.errors import InputError
from spmdeploy.stats import Ratio, ratio_of_runs


@dataclass(frozen=True)
class Change:
    """One case that both records measured, in milliseconds."""

    case: str
    backend: str
    before: float
    after: float
    speedup: Ratio
    """Speed of the later record relative to the earlier, with a 95% interval."""
    verdict: str
    """faster, slower, or `no difference shown` where the interval contains 1."""


@dataclass(frozen=True)
class Comparison:
    """Changes from one record to another."""

    changes: tuple[Change, ...]
    unmatched: tuple[str, ...]
    """Cases with figures in only one record, and why."""
    circumstances: tuple[str, ...]
    """Other differences: machine, libraries, weights, methodology."""
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self)


def compare(before: Record, after: Record, names: tuple[str, str], force: bool = False) -> Comparison:
    """Compares two records, row by row.

    Args:
        before: The older record.
        after: The newer record.
        names: Of the two files, for messages.
        force: Compare records of different machines too.

    Raises:
        InputError: The records are of different machines, and `force` is not set.
    """
    other_machine = differences(before.machine.hardware(), after.machine.hardware())
    if other_machine and not force:
        raise InputError(
            f"{names[0]} and {names[1]} were measured on different machines: {'; '.join(other_machine)}",
            "measure both on one machine, or use --force",
        )
    first, second = ({row.identity: row for row in record.rows} for record in (before, after))
    both = [key for key in first if key in second]
    measured = [key for key in both if first[key].status == second[key].status == "measured"]
    return Comparison(
        changes=tuple(_change(first[key], second[key]) for key in measured),
        unmatched=(
            *(_unmatched(first[key], names[1]) for key in first if key not in second),
            *(_unmatched(second[key], names[0]) for key in second if key not in first),
            *(_missing_case(first[key], second[key], names) for key in both if first[key].status != second[key].status),
        ),
        circumstances=(*other_machine, *_environment_differences(before, after)),
        warnings=tuple(
            f"{name}: {text}" for name, record in zip(names, (before, after), strict=True) for text in record.warnings
        ),
    )


def _change(before: Result, after: Result) -> Change:
    assert before.latency_ms is not None and after.latency_ms is not None
    speedup = ratio_of_runs(before.samples_ms, after.samples_ms, "before")
    verdict = "faster" if speedup.value > 1 else "slower"
    if speedup.interval.contains(1):
        verdict = "no difference shown"
    return Change(title(after), backend_name(after), before.latency_ms.p50, after.latency_ms.p50, speedup, verdict)


def _unmatched(row: Result, missing_in: str) -> str:
    return f"{title(row)}, {backend_name(row)}: not in {missing_in}"


def _missing_case(before: Result, after: Result, names: tuple[str, str]) -> str:
    """For a case measured in one record only."""
    without, name = (before, names[0]) if before.status != "measured" else (after, names[1])
    return f"{title(without)}, {backend_name(without)}: no figures in {name}: {without.reason}"


def _environment_differences(before: Record, after: Record) -> list[str]:
    """Facts that may explain a change, besides the code."""

    def facts(record: Record) -> dict[str, object]:
        machine = record.machine
        return {
            "spmdeploy": record.spmdeploy,
            "weights": f"{record.subject.name}, {record.subject.weights}",
            "graphs": " ".join(f"{name} {digest[:12]}" for name, digest in sorted(record.subject.graphs.items())),
            "protocol": f"{record.protocol.warm_up}; {record.protocol.measuring}; {record.protocol.masks}",
            "duration": record.protocol.seconds,
            "system": machine.system,
            "Python": machine.python,
            "governors": machine.cpu.governors,
            "GPU driver": [gpu.driver for gpu in machine.gpus],
            "clocks locked": machine.jetson and machine.jetson.clocks_locked,
            **machine.libraries,
            **machine.variables,
        }

    return differences(facts(before), facts(after))

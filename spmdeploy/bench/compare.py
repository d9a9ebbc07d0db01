"""Two records side by side: what became faster, what slower, and what cannot be told from noise."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from spmdeploy.bench import format as words
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
    """How many times faster the later record is; its interval says what noise allows."""
    verdict: str
    """faster, slower, or `no difference shown` where the interval holds 1."""


@dataclass(frozen=True)
class Comparison:
    """What changed from one record to another."""

    changes: tuple[Change, ...]
    unmatched: tuple[str, ...]
    """Cases that only one of them has figures for, and why."""
    circumstances: tuple[str, ...]
    """What else differs: machine, libraries, weights, protocol."""
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def compare(before: Record, after: Record, names: tuple[str, str], force: bool = False) -> Comparison:
    """names: of the two files, for messages. Raises InputError for records of different machines, unless forced."""
    other_machine = differences(before.machine.hardware(), after.machine.hardware())
    if other_machine and not force:
        raise InputError(
            f"{names[0]} and {names[1]} were measured on different machines: {'; '.join(other_machine)}",
            "measure both on one machine; --force compares them all the same",
        )
    first, second = ({row.identity: row for row in record.rows} for record in (before, after))
    both = [key for key in first if key in second]
    measured = [key for key in both if first[key].status == second[key].status == "measured"]
    return Comparison(
        changes=tuple(_change(first[key], second[key]) for key in measured),
        unmatched=(
            *(_unmatched(first[key], names[1]) for key in first if key not in second),
            *(_unmatched(second[key], names[0]) for key in second if key not in first),
            *(
                _missing_cases(first[key], second[key], names)
                for key in both
                if first[key].status != second[key].status
            ),
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
    if speedup.interval.holds(1):
        verdict = "no difference shown"
    title, backend = words.title(after), words.backend(after)
    return Change(title, backend, before.latency_ms.p50, after.latency_ms.p50, speedup, verdict)


def _unmatched(row: Result, missing_in: str) -> str:
    return f"{words.title(row)}, {words.backend(row)}: not in {missing_in}"


def _missing_cases(before: Result, after: Result, names: tuple[str, str]) -> str:
    """Measured in one, not in the other."""
    without, name = (before, names[0]) if before.status != "measured" else (after, names[1])
    return f"{words.title(without)}, {words.backend(without)}: no figures in {name}: {without.reason}"


def _environment_differences(before: Record, after: Record) -> list[str]:
    """What may explain a change besides the code."""

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

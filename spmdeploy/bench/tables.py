"""A record as tables: for the terminal, and in Markdown for reports and the README."""

from __future__ import annotations

from collections.abc import Sequence

from spmdeploy.bench import format as words
from spmdeploy.bench.results import Record, Result

Table = tuple[Sequence[str], Sequence[Sequence[str]]]
"""Heading and rows."""

README_BEGIN = "<!-- figures: written by `make figures` from bench/results -->"
README_END = "<!-- end of figures -->"


def group_table(rows: Sequence[Result]) -> Table:
    """The measured rows of one group. Columns that would be empty are left out."""
    measured = [row for row in rows if row.status == "measured"]
    baseline = next((row.ratio.baseline for row in measured if row.ratio is not None), "baseline")
    columns = {
        "backend": [words.backend(row) for row in measured],
        "median": [words.duration(row.latency_ms.p50) if row.latency_ms else "" for row in measured],
        "95% interval": [words.span(row.latency_ms.p50_interval) if row.latency_ms else "" for row in measured],
        "p95": [words.duration(row.latency_ms.p95) if row.latency_ms else "" for row in measured],
        "n": [str(row.latency_ms.n) if row.latency_ms else "" for row in measured],
        f"times {baseline}": [words.times(row) for row in measured],
        "edits/s": [words.digits(row.edits_per_second or 0) for row in measured],
        "tiling": [_tiling(row) for row in measured],
        "MP/s": [words.digits(row.megapixels_per_second or 0) for row in measured],
        "of the floor's speed": [f"{row.floor.reached:.0%}" if row.floor else "" for row in measured],
        "peak RAM": [words.size(row.memory.peak) if row.memory else "" for row in measured],
        "GPU memory": [words.size(row.memory.device) if row.memory else "" for row in measured],
        "activations": [words.size(row.memory.activations) if row.memory else "" for row in measured],
        "energy/edit": [f"{row.joules_per_edit:.3g} J" if row.joules_per_edit else "" for row in measured],
        "from PyTorch FP32": [words.drift(row) for row in measured],
        "": ["unstable" if row.latency_ms and row.latency_ms.unstable else "" for row in measured],
    }
    kept = {name: cells for name, cells in columns.items() if any(cells)}
    return tuple(kept), list(zip(*kept.values(), strict=True))


def _tiling(row: Result) -> str:
    """How an edit was cut up, and how often the network was called."""
    if "tiling" not in row.notes:
        return ""
    counts = ", ".join(f"{row.notes[name]} {name}" for name in ("windows", "tiles", "calls"))
    return f"{row.notes['tiling']}: {counts}"


def failure_lines(rows: Sequence[Result]) -> list[str]:
    """A line for each backend that has no figures."""
    said = {"unavailable": "cannot run here", "differs": "no speed", "crashed": "failed"}
    return [f"{words.backend(row)}: {said[row.status]}: {row.reason}" for row in rows if row.status != "measured"]


def phase_lines(rows: Sequence[Result]) -> list[str]:
    """A line for each backend whose phases were timed."""
    return [f"{words.backend(row)}: {words.phases(row)}" for row in rows if row.phases_ms]


def heading(record: Record) -> list[str]:
    """What was measured, on what, how."""
    return [
        f"{words.subject(record)}, {record.subject.parameters / 1e6:.1f} M parameters",
        f"on {record.machine.title()}; {record.machine.system}, Python {record.machine.python}, "
        f"{words.versions(record)}",
        f"{record.created}, `{record.protocol.command}`",
    ]


def markdown(record: Record) -> str:
    """A whole report."""
    lines = ["# Benchmark", "", *(f"{line}  " for line in heading(record)), ""]
    lines += [f"> {warning}" for warning in record.warnings] + [""] * bool(record.warnings)
    for title, rows in words.groups(record.rows):
        lines += [f"## {title[0].upper()}{title[1:]}", ""]
        if any(row.status == "measured" for row in rows):
            lines += [*markdown_table(group_table(rows)), ""]
        said = phase_lines(rows) + failure_lines(rows)
        lines += [f"- {line}" for line in said] + [""] * bool(said)
        for row in rows:
            if row.parts:
                lines += [f"Where {words.backend(row)} spends it:", "", *markdown_table(parts_table(row)), ""]
    protocol = record.protocol
    lines += [f"Masks: {protocol.masks}. Warm-up: {protocol.warm_up}. Measured {protocol.measuring}."]
    return "\n".join(lines) + "\n"


def parts_table(row: Result) -> Table:
    """Time by kind of layer (the longest first) and by stage, `-` being what belongs to none."""
    spent = {(part.kind, part.stage): part.milliseconds for part in row.parts}
    stages = sorted({part.stage for part in row.parts}, key=lambda stage: (stage == "-", stage))
    sums = {kind: sum(spent.get((kind, stage), 0.0) for stage in stages) for kind, _ in spent}
    whole = sum(sums.values())
    rows = [
        (
            kind,
            *(words.duration(spent[kind, stage]) if (kind, stage) in spent else "" for stage in stages),
            words.duration(total),
            f"{total / whole:.1%}",
        )
        for kind, total in sorted(sums.items(), key=lambda item: -item[1])
    ]
    return ("part", *(f"stage {stage}" if stage != "-" else stage for stage in stages), "all", "share"), rows


def readme_tables(records: Sequence[Record]) -> str:
    """What stands between the markers in the README: everything measured, in one table for each machine."""
    if not records:
        return "No figures yet: `make bench` measures them on a quiet machine.\n"
    lines: list[str] = []
    for record in records:
        measured = [row for row in record.rows if row.latency_ms is not None]
        baseline = next((row.ratio.baseline for row in measured if row.ratio is not None), "baseline")
        heading = ("", "backend", "median", "95% interval", f"times {baseline}", "peak RAM", "from PyTorch FP32")
        cells = [
            (
                words.title(row),
                words.backend(row) + (" (unstable)" if row.latency_ms.unstable else ""),
                words.duration(row.latency_ms.p50),
                words.span(row.latency_ms.p50_interval),
                words.times(row),
                words.size(row.memory.peak if row.memory else None),
                words.drift(row),
            )
            for row in measured
            if row.latency_ms is not None
        ]
        about = (
            f"{words.subject(record)} on {record.machine.title()} ({words.versions(record)}), {record.created[:10]}:"
        )
        lines += [about, "", *markdown_table((heading, cells)), ""]
        lines += [f"> {warning}" for warning in record.warnings] + [""] * bool(record.warnings)
    return "\n".join(lines)


def insert_tables(readme: str, records: Sequence[Record]) -> str:
    """The README with the figures of these records between its markers."""
    before, begin, rest = readme.partition(README_BEGIN)
    _, end, after = rest.partition(README_END)
    assert begin and end, "the README has lost its markers"
    return f"{before}{begin}\n\n{readme_tables(records)}\n{end}{after}"


def markdown_table(table: Table) -> list[str]:
    heading, rows = table
    lines = ["| " + " | ".join(cells) + " |" for cells in (heading, *rows)]
    return [lines[0], "|" + "---|" * len(heading), *lines[1:]]

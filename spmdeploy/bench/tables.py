"""Tables of records: for the terminal, and in Markdown for reports and the README."""

from __future__ import annotations

from collections.abc import Sequence

from spmdeploy.bench.format import (
    backend_name,
    format_bytes,
    format_deviation,
    format_duration,
    format_interval,
    format_model,
    format_number,
    format_phases,
    format_speedup,
    format_versions,
    groups,
)
from spmdeploy.bench.results import Record, Result

Table = tuple[Sequence[str], Sequence[Sequence[str]]]
"""Heading and rows."""

BEGIN = "<!-- figures: written by `make figures` from bench/results -->"
END = "<!-- end of figures -->"
NO_FIGURES = "No figures yet: `make bench` measures them on an idle machine.\n"

_SHORT_SCOPES = {
    "engine": "network alone",
    "cached-layout": "further image, cached layout",
    "edit": "files to file",
    "cold-start": "cold start",
}


def group_table(rows: Sequence[Result]) -> Table:
    """The measured rows of one group, without empty columns."""
    measured = [row for row in rows if row.status == "measured"]
    baseline = next((row.ratio.baseline for row in measured if row.ratio is not None), "baseline")
    columns = {
        "backend": [backend_name(row) for row in measured],
        "median": [format_duration(row.latency_ms.p50) if row.latency_ms else "" for row in measured],
        "95% interval": [format_interval(row.latency_ms.p50_interval) if row.latency_ms else "" for row in measured],
        "p95": [format_duration(row.latency_ms.p95) if row.latency_ms else "" for row in measured],
        "n": [str(row.latency_ms.n) if row.latency_ms else "" for row in measured],
        f"times {baseline}": [format_speedup(row) for row in measured],
        "edits/s": [format_number(row.edits_per_second or 0) for row in measured],
        "tiling": [_tiling(row) for row in measured],
        "MP/s": [format_number(row.megapixels_per_second or 0) for row in measured],
        "of the roofline": [f"{row.floor.reached:.0%}" if row.floor else "" for row in measured],
        "peak RAM": [format_bytes(row.memory.peak) if row.memory else "" for row in measured],
        "GPU memory": [format_bytes(row.memory.device) if row.memory else "" for row in measured],
        "activations": [format_bytes(row.memory.activations) if row.memory else "" for row in measured],
        "energy/edit": [f"{row.joules_per_edit:.3g} J" if row.joules_per_edit else "" for row in measured],
        "from PyTorch FP32": [format_deviation(row) for row in measured],
        "": ["unstable" if row.latency_ms and row.latency_ms.unstable else "" for row in measured],
    }
    kept = {name: cells for name, cells in columns.items() if any(cells)}
    return tuple(kept), list(zip(*kept.values(), strict=True))


def _tiling(row: Result) -> str:
    """Tiling of an edit, and number of calls of the network."""
    if "tiling" not in row.notes:
        return ""
    counts = ", ".join(f"{row.notes[name]} {name}" for name in ("windows", "tiles", "calls"))
    return f"{row.notes['tiling']}: {counts}"


def failure_lines(rows: Sequence[Result]) -> list[str]:
    """One line for each backend without figures."""
    labels = {"unavailable": "cannot run here", "differs": "no time", "crashed": "failed"}
    return [f"{backend_name(row)}: {labels[row.status]}: {row.reason}" for row in rows if row.status != "measured"]


def phase_lines(rows: Sequence[Result]) -> list[str]:
    """One line for each backend with timed phases."""
    return [f"{backend_name(row)}: {format_phases(row)}" for row in rows if row.phases_ms]


def heading(record: Record) -> list[str]:
    """Model, machine and command of a record."""
    return [
        f"{format_model(record)}, {record.subject.parameters / 1e6:.1f} M parameters",
        f"on {record.machine.title()}; {record.machine.system}, Python {record.machine.python}, "
        f"{format_versions(record)}",
        f"{record.created}, `{record.protocol.command}`",
    ]


def markdown(record: Record) -> str:
    """A report of a record."""
    lines = ["# Benchmark", "", *(f"{line}  " for line in heading(record)), ""]
    lines += [f"> {warning}" for warning in record.warnings] + [""] * bool(record.warnings)
    for heading_text, rows in groups(record.rows):
        lines += [f"## {heading_text[0].upper()}{heading_text[1:]}", ""]
        if any(row.status == "measured" for row in rows):
            lines += [*markdown_table(group_table(rows)), ""]
        notes = phase_lines(rows) + failure_lines(rows)
        lines += [f"- {line}" for line in notes] + [""] * bool(notes)
        for row in rows:
            if row.parts:
                lines += [f"{backend_name(row)} by part:", "", *markdown_table(parts_table(row)), ""]
    protocol = record.protocol
    lines += [f"Masks: {protocol.masks}. Warm-up: {protocol.warm_up}. Measured {protocol.measuring}."]
    return "\n".join(lines) + "\n"


def parts_table(row: Result) -> Table:
    """Time by kind of layer, longest first, and by stage; `-`: outside the stages."""
    spent = {(part.kind, part.stage): part.milliseconds for part in row.parts}
    stages = sorted({part.stage for part in row.parts}, key=lambda stage: (stage == "-", stage))
    sums = {kind: sum(spent.get((kind, stage), 0.0) for stage in stages) for kind, _ in spent}
    whole = sum(sums.values())
    rows = [
        (
            kind,
            *(format_duration(spent[kind, stage]) if (kind, stage) in spent else "" for stage in stages),
            format_duration(total),
            f"{total / whole:.1%}",
        )
        for kind, total in sorted(sums.items(), key=lambda item: -item[1])
    ]
    return ("part", *(f"stage {stage}" if stage != "-" else stage for stage in stages), "all", "share"), rows


def summary_table(records: Sequence[Record]) -> str:
    """The table in the README: the median of every backend, a column for each model and scope.

    The graphs as exported (`-plain`) are in docs/benchmarks.md only. The deviation is the largest of a backend.
    """
    rows = [(record, row) for record, row in _published(records) if not row.backend.endswith("-plain")]
    if not rows:
        return NO_FIGURES
    columns: dict[str, dict[str, str]] = {}
    deviations: dict[str, Result] = {}
    for record, row in rows:
        column = columns.setdefault(f"{record.subject.name}, {_SHORT_SCOPES[row.scope]}", {})
        assert row.latency_ms is not None
        times = f" ({format_number(row.ratio.value)}×)" if row.ratio is not None else ""
        column[backend_name(row)] = format_duration(row.latency_ms.p50) + times
        worst = deviations.setdefault(backend_name(row), row)
        deviations[backend_name(row)] = max(worst, row, key=_deviation)
    cells = [
        (name, *(column.get(name, "") for column in columns.values()), format_deviation(worst))
        for name, worst in deviations.items()
    ]
    table = markdown_table((("backend", *columns, "from PyTorch FP32"), cells))
    ratios = f"Medians; in parentheses, times as fast as {_baselines(rows)}. "
    return "\n".join([*table, "", ratios + _circumstances(records), ""])


def _deviation(row: Result) -> tuple[float, float]:
    """For comparison: the largest difference, then the negated PSNR; of equal images the least."""
    if row.parity is None or row.parity.psnr_db is None:
        return -1.0, 0.0
    return row.parity.max_grey, -row.parity.psnr_db


def detailed_tables(records: Sequence[Record]) -> str:
    """The tables in docs/benchmarks.md: one for each model and scope."""
    if not (rows := _published(records)):
        return NO_FIGURES
    lines: list[str] = []
    for record in records:
        for heading_text, group in groups([row for one, row in rows if one is record]):
            lines += [f"**{record.subject.name}**: {heading_text}", "", *markdown_table(group_table(group)), ""]
    return "\n".join([*lines, _circumstances(records), ""])


def _published(records: Sequence[Record]) -> list[tuple[Record, Result]]:
    return [(record, row) for record in records for row in record.rows if is_publishable(record, row)]


def _baselines(rows: Sequence[tuple[Record, Result]]) -> str:
    return " or ".join(dict.fromkeys(f"`{row.ratio.baseline}`" for _, row in rows if row.ratio is not None))


def _circumstances(records: Sequence[Record]) -> str:
    """Machine and date of the published rows, and how many rows are not published."""
    published = _published(records)
    versions: dict[str, dict[str, None]] = {}
    for record, _ in published:
        versions.setdefault(record.machine.title(), {}).update(dict.fromkeys(format_versions(record).split(", ")))
    machines = "; ".join(f"{machine} ({', '.join(libraries)})" for machine, libraries in versions.items())
    about = f"Measured on {machines}, {', '.join(dict.fromkeys(record.created[:10] for record, _ in published))}."
    measured = sum(row.latency_ms is not None for record in records for row in record.rows)
    if left_out := measured - len(published):
        about += f" {left_out} unstable row{'s are' if left_out > 1 else ' is'} not shown."
    return about


def is_publishable(record: Record, row: Result) -> bool:
    """Whether a measured row is stable and other processes did not use the cores during the run."""
    return row.latency_ms is not None and not row.latency_ms.unstable and not record.others.is_significant


def commands(records: Sequence[Record]) -> list[str]:
    """The commands of the records with published rows."""
    return [it.protocol.command for it in records if any(is_publishable(it, row) for row in it.rows)]


def insert_between_markers(page: str, text: str) -> str:
    """Replaces the text between the markers of a page in Markdown."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    assert begin and end, "the page has no markers for the figures"
    return f"{before}{begin}\n\n{text}\n{end}{after}"


def markdown_table(table: Table) -> list[str]:
    """The lines of a table in Markdown."""
    heading, rows = table
    lines = ["| " + " | ".join(cells) + " |" for cells in (heading, *rows)]
    return [lines[0], "|" + "---|" * len(heading), *lines[1:]]

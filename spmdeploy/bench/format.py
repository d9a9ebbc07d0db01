"""Formats figures of records for tables, charts and comparisons."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from spmdeploy.bench.results import Record, Result
from spmdeploy.stats import Interval, Ratio

SCOPES = {
    "engine": "the network alone, arrays to arrays",
    "cached-layout": "the network for a further image under a cached layout",
    "edit": "an edit, files to file",
    "cold-start": "cold start: `spmdeploy edit`, from the start of the process to its end",
}


def groups(rows: Sequence[Result]) -> Iterator[tuple[str, list[Result]]]:
    """The rows of each case under its title, in their order."""
    for _, group in groupby(rows, key=lambda row: row.case):
        own = list(group)
        yield title(own[0]), own


def title(row: Result) -> str:
    """Title of a group of rows: the work that every backend did."""
    share = f" ({row.masked_share:.0%})" if row.masked_share is not None else ""
    parts = [SCOPES[row.scope], f"{row.size}×{row.size}", f"{row.mask} mask{share}"]
    if row.batch > 1:
        parts.append(f"batch {row.batch}")
    if row.streams > 1:
        parts.append(f"{row.streams} streams")
    return ", ".join(parts)


def backend_name(row: Result) -> str:
    """Backend, precision and device of a row."""
    if row.ran is None:
        return row.backend if row.asked_precision == "auto" else f"{row.backend} {row.asked_precision}"
    device = "" if row.ran.device == "cpu" else f" {row.ran.device}"
    return f"{row.backend} {row.ran.precision}{device}"


def format_duration(milliseconds: float) -> str:
    """Three significant digits in a readable unit."""
    if milliseconds >= 1000:
        return f"{format_number(milliseconds / 1000)} s"
    return f"{format_number(milliseconds)} ms" if milliseconds >= 1 else f"{format_number(milliseconds * 1000)} µs"


def format_number(value: float) -> str:
    """Three significant digits, never in powers of ten."""
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def format_interval(interval: Interval) -> str:
    """Both ends of an interval; the unit once if it is the same."""
    low, high = format_duration(interval.low), format_duration(interval.high)
    unit = high.rpartition(" ")[2]
    return f"{low.removesuffix(f' {unit}')} to {high}"


def format_deviation(row: Result) -> str:
    """Largest difference from PyTorch in FP32 and PSNR under the mask."""
    if row.parity is None:
        return ""
    if row.parity.psnr_db is None:
        return "identical"
    levels = row.parity.max_grey
    return f"{levels} gray level{'s' * (levels != 1)}, {row.parity.psnr_db:.1f} dB"


def format_speedup(row: Result) -> str:
    """Speed relative to the baseline; empty for the baseline itself."""
    return "" if row.ratio is None else format_ratio(row.ratio)


def format_ratio(ratio: Ratio) -> str:
    """A ratio with its interval."""
    return f"{format_number(ratio.value)} ({format_number(ratio.interval.low)} to {format_number(ratio.interval.high)})"


def format_phases(row: Result) -> str:
    """Time by phase, in order; imports are part of the phases before them."""
    return ", ".join(f"{name} {format_duration(value)}" for name, value in row.phases_ms.items())


def format_bytes(count: int | None) -> str:
    """In MB or GB of powers of ten; empty for None."""
    if count is None:
        return ""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def format_model(record: Record) -> str:
    """The model of a record."""
    facts = record.subject
    return f"`{facts.name}` ({facts.weights}, {facts.gflop:.1f} GFLOP an edit)"


def format_versions(record: Record) -> str:
    """Versions of the libraries that were measured."""
    ran = " ".join(row.ran.provider for row in record.rows if row.ran is not None)
    return ", ".join(f"{name} {version}" for name, version in record.machine.libraries.items() if version in ran)

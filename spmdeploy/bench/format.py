"""Figures in words, the same in tables, pictures and comparisons."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from spmdeploy.bench.results import Record, Result
from spmdeploy.stats import Interval, Ratio

SCOPES = {
    "engine": "the network alone, arrays to arrays",
    "frame": "the network for one more image under a layout that is kept",
    "edit": "an edit, files to file",
    "cold-start": "cold start: `spmdeploy edit`, from the start of the process to its end",
}


def groups(rows: Sequence[Result]) -> Iterator[tuple[str, list[Result]]]:
    """The rows of each case under its title, in their order."""
    for _, group in groupby(rows, key=lambda row: row.case):
        own = list(group)
        yield title(own[0]), own


def title(row: Result) -> str:
    """What every backend of a group did."""
    share = f" ({row.masked_share:.0%})" if row.masked_share is not None else ""
    parts = [SCOPES[row.scope], f"{row.size}×{row.size}", f"{row.mask} mask{share}"]
    if row.batch > 1:
        parts.append(f"batch {row.batch}")
    if row.streams > 1:
        parts.append(f"{row.streams} streams")
    return ", ".join(parts)


def backend(row: Result) -> str:
    """Who computed, and in which precision."""
    if row.ran is None:
        return row.backend if row.asked_precision == "auto" else f"{row.backend} {row.asked_precision}"
    device = "" if row.ran.device == "cpu" else f" {row.ran.device}"
    return f"{row.backend} {row.ran.precision}{device}"


def duration(milliseconds: float) -> str:
    """Three digits, in the unit in which they are readable."""
    if milliseconds >= 1000:
        return f"{digits(milliseconds / 1000)} s"
    return f"{digits(milliseconds)} ms" if milliseconds >= 1 else f"{digits(milliseconds * 1000)} µs"


def tick(milliseconds: float) -> str:
    """A round number on an axis."""
    if milliseconds == 0:
        return "0"
    if milliseconds >= 1000:
        return f"{milliseconds / 1000:g} s"
    return f"{milliseconds:g} ms"


def digits(value: float) -> str:
    """Three significant digits, never in powers of ten."""
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def span(interval: Interval) -> str:
    """Both ends; the unit once where they share it."""
    low, high = duration(interval.low), duration(interval.high)
    unit = high.rpartition(" ")[2]
    return f"{low.removesuffix(f' {unit}')} to {high}"


def drift(row: Result) -> str:
    """How far its picture is from PyTorch's: the largest difference, and the PSNR under the mask."""
    if row.parity is None:
        return ""
    if row.parity.psnr_db is None:
        return "identical"
    levels = row.parity.max_grey
    return f"{levels} gray level{'s' * (levels != 1)}, {row.parity.psnr_db:.1f} dB"


def times(row: Result) -> str:
    """How many times as fast as the baseline; nothing for the baseline itself."""
    return "" if row.ratio is None else factor(row.ratio)


def factor(ratio: Ratio) -> str:
    """A ratio with its interval."""
    return f"{digits(ratio.value)} ({digits(ratio.interval.low)} to {digits(ratio.interval.high)})"


def phases(row: Result) -> str:
    """Where the time went, in the order in which it passed; what is imported is part of what stands before."""
    return ", ".join(f"{name} {duration(value)}" for name, value in row.phases_ms.items())


def size(count: int | None) -> str:
    if count is None:
        return ""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def subject(record: Record) -> str:
    """What was edited with."""
    facts = record.subject
    return f"`{facts.name}` ({facts.weights}, {facts.gflop:.1f} GFLOP an edit)"


def versions(record: Record) -> str:
    """Of the libraries that took part."""
    ran = " ".join(row.ran.provider for row in record.rows if row.ran is not None)
    return ", ".join(f"{name} {version}" for name, version in record.machine.libraries.items() if version in ran)

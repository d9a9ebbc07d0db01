"""A record as a picture for a slide: a bar for each median, every sample as a dot, the counted floor as a line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from spmdeploy.bench import format as words
from spmdeploy.bench.results import Record, Result

WIDTH, LOWEST = 1600, 900
"""Pixels; 16:9 unless there is more to show than fits."""
_FINER = 2
"""Drawn larger by this and shrunk: Pillow's lines and dots have no soft edges of their own."""
_MARGIN, _NAMES, _FIGURES = 60, 280, 430
"""Left and right of everything; for the names left of the bars; for the figures right of them."""
_TITLE, _HEADING, _GAP, _AXIS, _LINE = 130, 84, 20, 50, 32
_THINNEST, _THICKEST = 48, 96
"""Of the bars: as thick as the space allows."""
_PAPER, _INK, _PALE, _GRID, _ALARM = "#ffffff", "#1d2430", "#6b7480", "#e4e8ed", "#b3261e"
_COLOURS = {
    "torch": "#9aa3ad",
    "torch-compile": "#b08bd0",
    "onnxruntime": "#2f7ed8",
    "onnxruntime-cuda": "#1b4f9c",
    "tensorrt": "#63a51f",
    "tensorrt-rtx": "#2f7d32",
}


@dataclass(frozen=True)
class _Scale:
    """Milliseconds to pixels; the axis starts at 0, because lengths are what a bar compares."""

    left: float
    width: float
    longest: float

    def at(self, milliseconds: float) -> float:
        return self.left + self.width * milliseconds / self.longest


def plot(record: Record) -> NDArray[np.uint8]:
    """uint8 (H, 1600, 3) RGB."""
    panels = [
        (title, [row for row in rows if row.status != "unavailable"]) for title, rows in words.groups(record.rows)
    ]
    panels = [(title, rows) for title, rows in panels if rows]
    footer = _footer(record)
    bars = sum(row.latency_ms is not None for _, rows in panels for row in rows)
    below = _LINE * len(footer) + _MARGIN
    bare = _TITLE + sum(_panel_height(rows, 0) for _, rows in panels) + below
    bar = max(_THINNEST, min(_THICKEST, (LOWEST - bare) // max(bars, 1)))
    page = _Page(max(LOWEST, bare + bar * bars), bar)
    page.text(_MARGIN, 46, f"{record.subject.name}: what an edit costs", 42)
    page.text(_MARGIN, 100, _subtitle(record), 22, _PALE)
    top = _TITLE + (page.height - bare - bar * bars) // 3
    for title, rows in panels:
        page.panel(top, title, rows)
        top += _panel_height(rows, bar)
    for place, (line, color) in enumerate(footer):
        page.text(_MARGIN, page.height - below + _LINE * (place + 0.5), line, 19, color)
    return page.finished()


class _Page:
    """A canvas that is drawn on in the pixels of the finished picture."""

    def __init__(self, height: int, bar: int) -> None:
        self.height = height
        self._bar_height = bar
        self._image = Image.new("RGB", (WIDTH * _FINER, height * _FINER), _PAPER)
        self._draw = ImageDraw.Draw(self._image, "RGBA")

    def finished(self) -> NDArray[np.uint8]:
        return np.asarray(self._image.resize((WIDTH, self.height), Image.Resampling.BOX))

    def text(self, left: float, top: float, text: str, size: int, color: str = _INK, anchor: str = "lm") -> None:
        font = ImageFont.load_default(size=size * _FINER)
        # Pillow's own font has letters, digits and little else.
        plain = text.replace("×", "x").replace("µ", "u").replace("`", "").replace("…", "...")
        self._draw.text((left * _FINER, top * _FINER), plain, fill=color, font=font, anchor=anchor)

    def line(self, start: tuple[float, float], end: tuple[float, float], color: str, width: float = 1) -> None:
        places = [coordinate * _FINER for coordinate in (*start, *end)]
        self._draw.line(places, fill=color, width=round(width * _FINER))

    def box(self, left: float, top: float, right: float, bottom: float, color: str) -> None:
        self._draw.rectangle([coordinate * _FINER for coordinate in (left, top, right, bottom)], fill=color)

    def dot(self, left: float, top: float, radius: float, color: str) -> None:
        ends = (left - radius, top - radius, left + radius, top + radius)
        self._draw.ellipse([coordinate * _FINER for coordinate in ends], fill=color)

    # -- a panel

    def panel(self, top: float, title: str, rows: Sequence[Result]) -> None:
        self.text(_MARGIN, top + 24, title[0].upper() + title[1:], 27)
        measured = [row for row in rows if row.latency_ms is not None]
        top += _HEADING
        if measured:
            width = WIDTH - 2 * _MARGIN - _NAMES - _FIGURES
            scale = _Scale(_MARGIN + _NAMES, width, _longest(measured))
            bottom = top + len(measured) * (self._bar_height + _GAP)
            self._axis(scale, top, bottom)
            for place, row in enumerate(measured):
                self._bar(scale, top + place * (self._bar_height + _GAP), row)
            self._floors(scale, top, bottom, measured)
            top = bottom + _AXIS
        for row in rows:
            if row.latency_ms is None:
                self.text(_MARGIN + _NAMES - 18, top, words.backend(row), 22, _INK, "rm")
                self.text(_MARGIN + _NAMES, top, f"no speed: {_shortened(row.reason or '', 95)}", 19, _ALARM)
                top += _LINE

    def _axis(self, scale: _Scale, top: float, bottom: float) -> None:
        for value in _ticks(scale.longest):
            place = scale.at(value)
            self.line((place, top - 6), (place, bottom - 6), _GRID)
            self.text(place, bottom + 14, words.tick(value), 17, _PALE, "mm")

    def _bar(self, scale: _Scale, top: float, row: Result) -> None:
        assert row.latency_ms is not None
        figures, bottom = row.latency_ms, top + self._bar_height
        middle = (top + bottom) / 2
        self.text(scale.left - 18, middle, words.backend(row), 23, _INK, "rm")
        self.box(scale.left, top, scale.at(figures.p50), bottom, _COLOURS[row.backend])
        samples = [sample for turn in row.samples_ms for sample in turn]
        beyond = sum(sample > scale.longest for sample in samples)
        for place, sample in enumerate(samples):
            if sample <= scale.longest:  # the golden ratio spreads neighbors without chance
                level = top + 5 + (self._bar_height - 10) * (place * 0.618034 % 1)
                self.dot(scale.at(sample), level, 2.2, f"{_INK}59")
        self.line((scale.at(figures.p50), top - 4), (scale.at(figures.p50), bottom + 4), _INK, 2)
        low, high = scale.at(figures.p50_interval.low), scale.at(figures.p50_interval.high)
        self.line((low, middle), (max(high, low + 1), middle), _INK, 6)

        left = scale.left + scale.width + 30
        self.text(left, middle - 13, words.duration(figures.p50), 26)
        if row.ratio is not None:
            low, high = row.ratio.interval.low, row.ratio.interval.high
            self.text(left + 130, middle - 13, f"{words.digits(row.ratio.value)}× {row.ratio.baseline}", 26)
            self.text(left + 270, middle - 12, f"({words.digits(low)} to {words.digits(high)})", 17, _PALE)
        more = [words.drift(row), f"n = {figures.n}"]
        more += ["unstable"] * figures.unstable + [f"{beyond} beyond"] * bool(beyond)
        self.text(left, middle + 17, ", ".join(more), 17, _PALE)

    def _floors(self, scale: _Scale, top: float, bottom: float, rows: Sequence[Result]) -> None:
        """Rows of one device and precision share a floor."""
        for milliseconds in sorted({row.floor.milliseconds for row in rows if row.floor is not None}):
            if milliseconds > scale.longest:
                continue
            place = scale.at(milliseconds)
            for start in np.arange(top - 12, bottom - 6, 10):
                self.line((place, start), (place, min(start + 5, bottom - 6)), _ALARM, 1.5)
            label = f"all counted work at this machine's full rate: {words.duration(milliseconds)}"
            self.text(place, top - 24, label, 16, _ALARM, "mm")


def _panel_height(rows: Sequence[Result], bar: int) -> int:
    measured = sum(row.latency_ms is not None for row in rows)
    return _HEADING + measured * (bar + _GAP) + (_AXIS if measured else 0) + (len(rows) - measured) * _LINE


def _longest(rows: Sequence[Result]) -> float:
    """The end of the axis: nearly all samples; the few beyond are counted in words."""
    return 1.08 * max(row.latency_ms.p95 for row in rows if row.latency_ms is not None)


def _ticks(longest: float) -> list[float]:
    """Round numbers from 0, four to eight of them."""
    power = 10.0 ** np.floor(np.log10(longest))
    step = next(power * part for part in (0.1, 0.2, 0.25, 0.5, 1.0, 2.0) if longest / (power * part) <= 8)
    return [float(value) for value in np.arange(0, longest, step)]


def _subtitle(record: Record) -> str:
    return f"{words.subject(record)} on {record.machine.title()}; {words.versions(record)}"


def _footer(record: Record) -> list[tuple[str, str]]:
    how = (
        "Bar: median. Thick line: its 95% bootstrap interval. Dots: every sample, none removed. "
        "Times: ratio of medians, in turns in one run."
    )
    missing = dict.fromkeys(words.backend(row) for row in record.rows if row.status == "unavailable")
    absent = [(f"Not run here: {', '.join(missing)}; the record says why.", _PALE)] if missing else []
    warnings = [(_shortened(f"Mind: {warning}", 150), _ALARM) for warning in record.warnings[:3]]
    more = [(f"and {len(record.warnings) - 3} more warnings in the record", _ALARM)] if record.warnings[3:] else []
    return [(how, _PALE), *absent, *warnings, *more]


def _shortened(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"

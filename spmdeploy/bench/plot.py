"""Charts of records with matplotlib: one record in detail, and backends of several models on one logarithmic axis."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from spmdeploy.bench.format import (
    backend_name,
    format_deviation,
    format_duration,
    format_model,
    format_ratio,
    format_versions,
    groups,
)
from spmdeploy.bench.results import Record, Result
from spmdeploy.bench.tables import is_publishable
from spmdeploy.errors import UnavailableError

_WIDTH, _MIN_HEIGHT, _DPI = 16.0, 9.0, 100
_INK, _PALE, _ALERT, _BAR = "#1d2430", "#6b7480", "#b3261e", "#9bbce0"
_REFERENCE_BAR = "#c4cad1"
_MAX_WARNINGS = 3


def plot_record(record: Record) -> bytes:
    """Returns a PNG chart of one record: bars for medians, dots for samples, a line for the roofline bound."""
    panels = [(title, [row for row in rows if row.status != "unavailable"]) for title, rows in groups(record.rows)]
    panels = [(title, rows) for title, rows in panels if rows]
    heights = [0.55 * max(len(rows), 2) + 0.6 for _, rows in panels] or [1.0]
    figure, axes = _figure(max(_MIN_HEIGHT, sum(heights) + 2.8), heights)
    figure.suptitle(f"{record.subject.name}: time of an edit", x=0.01, ha="left", fontsize=20, color=_INK)
    about = f"{format_model(record)} on {record.machine.title()}; {format_versions(record)}".replace("`", "")
    for axis, (title, rows) in zip(axes, panels, strict=False):
        _bars(axis, title[0].upper() + title[1:].replace("`", ""), rows)
    if not panels:
        axes[0].axis("off")
    missing = dict.fromkeys(backend_name(row) for row in record.rows if row.status == "unavailable")
    footer = [about, "Bar: median. Line: its 95% bootstrap interval. Dots: all samples. Ratios: of medians."]
    footer += [f"Not run here: {', '.join(missing)}."] if missing else []
    alerts = [f"Warning: {warning}" for warning in record.warnings[:_MAX_WARNINGS]]
    alerts += [f"and {len(record.warnings) - _MAX_WARNINGS} more warnings"] if record.warnings[_MAX_WARNINGS:] else []
    height = figure.get_figheight()
    for number, (text, color) in enumerate([*((t, _PALE) for t in footer), *((t, _ALERT) for t in alerts)][::-1]):
        figure.text(0.01, (0.12 + 0.24 * number) / height, text, fontsize=10, color=color)
    below = (0.24 * len(footer + alerts) + 0.2) / height
    figure.get_layout_engine().set(rect=(0, below, 1, 1 - below))
    return _png(figure)


def plot_comparison(records: Sequence[Record], scope: str = "engine") -> bytes:
    """Returns a PNG chart of several records: a group of bars for each model, medians in ms on a logarithmic axis.

    Only publishable rows of one mask and batch are drawn: those of the first such case of each record.
    """
    chosen = [(record, _first_case(record, scope)) for record in records]
    chosen = [(record, rows) for record, rows in chosen if rows]
    heights = [0.5 * len(rows) + 0.5 for _, rows in chosen] or [1.0]
    figure, axes = _figure(sum(heights) + 1.2, heights, sharex=True)
    if not chosen:
        axes[0].axis("off")
    for axis, (record, rows) in zip(axes, chosen, strict=False):
        axis.set_title(f"{record.subject.name}, {record.subject.gflop:.1f} GFLOP", loc="left", fontsize=12, color=_INK)
        medians = [row.latency_ms.p50 for row in rows if row.latency_ms is not None]
        colors = [_REFERENCE_BAR if row.backend.startswith("torch") else _BAR for row in rows]
        axis.barh(range(len(rows)), medians, color=colors, height=0.7)
        axis.set_yticks(range(len(rows)), [backend_name(row) for row in rows])
        axis.invert_yaxis()
        axis.set_xscale("log", subs=[2, 5])
        axis.xaxis.set_major_formatter(_tick_formatter)
        axis.xaxis.set_minor_formatter(_tick_formatter)
        for place, value in enumerate(medians):
            axis.annotate(
                format_duration(value), (value, place), xytext=(5, 0), textcoords="offset points", va="center"
            )
        _clean(axis)
    if chosen:
        record, rows = chosen[0]
        medians = [row.latency_ms.p50 for _, group in chosen for row in group if row.latency_ms is not None]
        axes[-1].set_xlim(10 ** np.floor(np.log10(min(medians))), 1.5 * max(medians))
        axes[-1].set_xlabel("median, logarithmic")
        machines = dict.fromkeys(record.machine.title() for record, _ in chosen)
        figure.suptitle(f"{_title(rows)}, on {'; '.join(machines)}", x=0.01, ha="left", fontsize=11, color=_PALE)
    return _png(figure)


def _title(rows: Sequence[Result]) -> str:
    """Title of the case that these rows measured."""
    return next(groups(rows))[0].replace("`", "")


def _first_case(record: Record, scope: str) -> list[Result]:
    stable = [row for row in record.rows if row.scope == scope and is_publishable(record, row)]
    first = next(groups(stable), None)
    return [] if first is None else first[1]


def _bars(axis: Any, title: str, rows: Sequence[Result]) -> None:
    axis.set_title(title, loc="left", fontsize=13, color=_INK)
    longest = 1.08 * max((row.latency_ms.p95 for row in rows if row.latency_ms is not None), default=1.0)
    for place, row in enumerate(rows):
        if row.latency_ms is None:
            axis.text(0, place, f"  {(row.reason or '')[:120]}", color=_ALERT, va="center", fontsize=9)
            continue
        figures = row.latency_ms
        axis.barh(place, figures.p50, height=0.7, color=_REFERENCE_BAR if row.ratio is None else _BAR, zorder=1)
        samples = np.concatenate([np.asarray(turn, float) for turn in row.samples_ms if turn])
        shown = samples[samples <= longest]
        spread = (np.arange(len(shown)) * 0.618034 % 1 - 0.5) * 0.5  # low-discrepancy, deterministic
        axis.scatter(shown, place + spread, s=4, color=_INK, alpha=0.35, linewidths=0, zorder=2)
        low, high = figures.p50_interval.low, figures.p50_interval.high
        axis.plot([low, high], [place, place], color=_INK, linewidth=4, zorder=3)
        details = [format_duration(figures.p50)]
        details += [f"{format_ratio(row.ratio)}× {row.ratio.baseline}"] if row.ratio is not None else []
        details += [format_deviation(row), f"n = {figures.n}"] + ["unstable"] * figures.unstable
        beyond = len(samples) - len(shown)
        details += [f"{beyond} beyond the axis"] * bool(beyond)
        axis.annotate(
            "   ".join(details), (1.01, place), xycoords=("axes fraction", "data"), va="center", fontsize=9, color=_INK
        )
    for bound in sorted({row.floor.milliseconds for row in rows if row.floor is not None}):
        if bound <= longest:
            axis.axvline(bound, color=_ALERT, linestyle=":", linewidth=1.2)
            axis.text(bound, -0.62, f"roofline {format_duration(bound)}", color=_ALERT, fontsize=8, ha="center")
    axis.set_xlim(0, longest)
    axis.set_ylim(len(rows) - 0.5, -0.8)
    axis.set_yticks(range(len(rows)), [backend_name(row) for row in rows])
    axis.xaxis.set_major_formatter(_tick_formatter)
    _clean(axis)


def format_tick(milliseconds: float) -> str:
    """Label of an axis."""
    return f"{milliseconds / 1000:g} s" if milliseconds >= 1000 else f"{milliseconds:g} ms"


def _tick_formatter(value: float, _: int) -> str:
    return format_tick(value)


def _clean(axis: Any) -> None:
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="x", color="#e4e8ed", zorder=0)
    axis.set_axisbelow(True)


def _figure(height: float, ratios: Sequence[float], sharex: bool = False) -> tuple[Any, Sequence[Any]]:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as exc:
        raise UnavailableError("charts need the package matplotlib", 'pip install "spmdeploy[bench]"') from exc
    figure = Figure((_WIDTH, height), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(ratios), 1, height_ratios=ratios, sharex=sharex, squeeze=False)
    return figure, list(axes[:, 0])


def _png(figure: Any) -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format="png", metadata={"Software": None})
    return content.getvalue()

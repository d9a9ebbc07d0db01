"""Report of a run: loss and metric curves and the last contact sheets in one HTML file, made from metrics.jsonl."""

from __future__ import annotations

import base64
import html
import math
from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from spmdeploy.errors import InputError
from spmdeploy.files import atomic_write
from spmdeploy.training.logging import POSITION
from spmdeploy.training.run_dir import RunDirectory

WIDTH, HEIGHT, MARGIN = 420, 200, 44
"""Of a chart, in pixels."""
SHEETS = 2
"""The last contact sheets that are shown."""

Points = list[tuple[float, float]]


def write_report(output: Path) -> Path:
    """Writes RUN/report.html from RUN/metrics.jsonl and returns its path.

    Args:
        output: the run's folder, also of a run that is still going on.

    Raises:
        InputError: the folder holds no metrics yet.
    """
    run = RunDirectory(output)
    records = run.metrics()
    if not records:
        raise InputError(f"{output}: no metrics to plot", "name the --output folder of a run that has begun")
    curves: dict[str, Points] = defaultdict(list)
    for record in records:
        for name, value in record.items():
            if name not in POSITION and isinstance(value, int | float):
                curves[f"{record['kind']}: {name}"].append((record["images"], value))
    for record, images_per_second in _speeds(records):
        curves["samples per second"].append((record["images"], images_per_second))
    charts = "\n".join(_chart(name, points) for name, points in sorted(curves.items()))
    sheets = sorted(output.glob("samples/*.png"))[-SHEETS:]
    images = "\n".join(_figure(sheet) for sheet in reversed(sheets))
    title = html.escape(output.resolve().name)
    page = (
        f'<!doctype html><meta charset="utf-8"><title>{title}</title>\n'
        "<style>body{font:14px sans-serif;margin:1.5em}svg,figure{display:inline-block;margin:.5em}"
        "figure img{max-width:100%}</style>\n"
        f"<h1>{title}</h1><p>{records[-1]['images']} samples, {len(records)} records</p>\n{charts}\n{images}\n"
    )
    target = output / "report.html"
    with atomic_write(target) as stream:
        stream.write(page.encode("utf-8"))
    return target


def _speeds(records: Sequence[dict[str, Any]]) -> list[tuple[dict[str, Any], float]]:
    """Training speed between each record and the one before in the same phase."""
    training = [record for record in records if record["kind"] == "train"]
    speeds = []
    for before, after in pairwise(training):
        seconds = after["seconds"] - before["seconds"]
        if before["phase"] == after["phase"] and seconds > 0:
            speeds.append((after, (after["images"] - before["images"]) / seconds))
    return speeds


def _chart(name: str, points: Points) -> str:
    """A line chart as SVG; values that are not finite are left out."""
    points = [(x, y) for x, y in points if math.isfinite(y)]
    if not points:
        return ""
    (left, right), (low, high) = ((min(axis), max(axis)) for axis in zip(*points, strict=True))

    def place(x: float, y: float) -> str:
        across = MARGIN + (x - left) / ((right - left) or 1) * (WIDTH - MARGIN - 10)
        down = HEIGHT - 24 - (y - low) / ((high - low) or 1) * (HEIGHT - 54)
        return f"{across:.1f},{down:.1f}"

    line = " ".join(place(x, y) for x, y in points)
    last = points[-1][1]
    return (
        f'<svg width="{WIDTH}" height="{HEIGHT}" role="img" aria-label="{html.escape(name)}">'
        f'<text x="{MARGIN}" y="16" font-weight="bold">{html.escape(name)} = {last:.4g}</text>'
        f'<text x="2" y="34" font-size="11">{high:.3g}</text>'
        f'<text x="2" y="{HEIGHT - 24}" font-size="11">{low:.3g}</text>'
        f'<text x="{MARGIN}" y="{HEIGHT - 6}" font-size="11">{left:g}</text>'
        f'<text x="{WIDTH - 10}" y="{HEIGHT - 6}" font-size="11" text-anchor="end">{right:g} samples</text>'
        f'<polyline fill="none" stroke="#1f5fbf" stroke-width="1.5" points="{line}"/></svg>'
    )


def _figure(sheet: Path) -> str:
    data = base64.b64encode(sheet.read_bytes()).decode("ascii")
    caption = html.escape(f"after {int(sheet.stem)} samples" if sheet.stem.isdigit() else sheet.stem)
    return (
        f'<figure><img src="data:image/png;base64,{data}" alt="{caption}"><figcaption>{caption}</figcaption></figure>'
    )

"""How far a run is, for a terminal."""

from __future__ import annotations

from typing import Any

from spmdeploy.training.config import TrainConfig

BAR = 24
"""Characters of the bar."""


def progress_line(record: dict[str, Any], config: TrainConfig) -> str:
    """One line for a record of the metrics: the phase's bar, images per second, time left in it, and the figures.

    The time left is that of the phase: phases differ too much in speed to say more before they have begun.
    """
    phase = config.schedule[record["phase"]]
    done = min(1.0, record["phase_images"] / phase.images)
    bar = "█" * round(done * BAR) + "·" * (BAR - round(done * BAR))
    stages = "+".join(str(stage + 1) for stage in phase.stages)
    speed = record["phase_images"] / record["seconds"] if record["seconds"] else 0.0
    left = _duration((phase.images - record["phase_images"]) / speed) if speed else "?"
    known = ("kind", "images", "phase", "phase_images", "seconds")
    figures = " ".join(f"{name} {value:.3f}" for name, value in record.items() if name not in known)
    return f"stage {stages} {bar} {done:4.0%} {speed:.1f} images/s, {left} left, {record['kind']}: {figures}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"

"""What an edit did: windows, pyramid levels, time per phase, and notes for the user."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

from spmdeploy.editing.options import EditOptions
from spmdeploy.editing.plan import PlannedWindow
from spmdeploy.tiling.windows import CROP_LIMIT, Window
from spmdeploy.types import Progress

# Gray levels at a window's last level above which a note is added. Tiles side by side without blending score 2; where
# tiles differ by 16, bands in the sky were visible (docs/large-images.md).
SEAM_SCORE_LIMIT = 2.0
TILE_MISMATCH_LIMIT = 12.0

Phase = Literal["validate", "plan", "prepare", "run", "stitch"]


class PhaseTimer:
    """Milliseconds per phase, batches run, and progress of one edit."""

    def __init__(self, progress: Progress | None = None) -> None:
        """progress: called after every step, first with (0, total)."""
        self.milliseconds: dict[str, float] = dict.fromkeys(("validate", "plan", "prepare", "run", "stitch"), 0.0)
        self.batches = 0
        self._progress = progress
        self._done = self._total = 0

    @contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """Add the time spent in the context to a phase; an exception adds nothing."""
        start = time.perf_counter()
        yield
        self.milliseconds[name] += (time.perf_counter() - start) * 1000

    def begin(self, total: int) -> None:
        """Report that `total` steps (windows and tiles) are ahead."""
        self._total = total
        self.advance(0)

    def advance(self, steps: int) -> None:
        """Report that so many more steps are done."""
        self._done += steps
        if self._progress is not None:
            self._progress(self._done, self._total)


@dataclass(frozen=True, slots=True)
class LevelReport:
    """What one pyramid level did. height, width: of the whole window at this level."""

    height: int
    width: int
    tiles: int
    refined: bool
    """By the network; else upsampled, because the photo has no detail of this size."""
    seam_score: float | None
    """Gray levels by which steps across the tiles' borders exceed steps elsewhere; None where no border is masked."""
    tile_mismatch: float | None
    """Mean distance in gray levels of two neighboring tiles where both show the same masked pixels, before blending;
    None where none does."""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, floats rounded to four decimals."""
        return {name: round(value, 4) if isinstance(value, float) else value for name, value in asdict(self).items()}


@dataclass(frozen=True, slots=True)
class WindowReport:
    """What was done in one window."""

    plan: PlannedWindow
    levels: tuple[LevelReport, ...] = ()
    """One for each level of the plan."""
    between_levels: Literal["device", "host"] | None = None
    """Where the image was kept between levels; None without levels."""
    notes: tuple[str, ...] = ()

    @property
    def window(self) -> Window:
        """The window in the photo."""
        return self.plan.edit_window.window

    @property
    def scale(self) -> float:
        """Pixels generated per pixel of the photo along the longer side, at most 1."""
        return 1.0 if self.plan.levels else self.plan.letterbox.scale

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values: place and size in the photo, scale, levels."""
        window = self.window
        return {
            "top": window.top,
            "left": window.left,
            "height": window.height,
            "width": window.width,
            "scale": round(self.scale, 4),
            "cascade": bool(self.plan.levels),
            "levels": [level.to_json() for level in self.levels],
            "between_levels": self.between_levels,
        }


@dataclass(frozen=True, slots=True)
class EditReport:
    """How an edit was made."""

    backend: str
    device: str
    precision: str
    provider: str
    options: EditOptions
    """As requested."""
    tiling: Literal["off", "crop", "cascade"]
    """The mode that ran; "cascade" where at least one window was refined."""
    tiling_reason: str
    match_surroundings: bool
    """Whether colors and noise were matched to the surroundings."""
    match_surroundings_reason: str
    windows: tuple[WindowReport, ...]
    batches: int
    """Calls of the session."""
    edited_pixels: int
    milliseconds: dict[str, float]
    """Of each phase: validate, plan, prepare, run (the session alone), stitch."""
    notes: tuple[str, ...]

    @property
    def tiles(self) -> int:
        """Over all levels of all windows."""
        return sum(window.plan.tiles for window in self.windows)

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        return {
            "backend": self.backend,
            "device": self.device,
            "precision": self.precision,
            "provider": self.provider,
            **asdict(self.options),
            "tiling": self.tiling,
            "tiling_reason": self.tiling_reason,
            "match_surroundings": self.match_surroundings,
            "match_surroundings_reason": self.match_surroundings_reason,
            "windows": [window.to_json() for window in self.windows],
            "tiles": self.tiles,
            "batches": self.batches,
            "edited_pixels": self.edited_pixels,
            "milliseconds": {phase: round(spent, 3) for phase, spent in self.milliseconds.items()},
            "notes": list(self.notes),
        }


def report_notes(windows: Sequence[WindowReport]) -> tuple[str, ...]:
    """What the user should know, one sentence each."""
    notes = []
    for number, entry in enumerate(windows, start=1):
        window, letterbox = entry.window, entry.plan.letterbox
        name = f"window {number} of {len(windows)}"
        notes += [f"{name}: {note}" for note in entry.notes]
        if entry.scale < 1 / CROP_LIMIT:
            size = f"{window.width}×{window.height} pixels and is edited at {letterbox.width}×{letterbox.height}"
            notes.append(f"{name} is {size}: detail is lost")
        skipped = sum(not level.refined for level in entry.levels)
        if skipped:
            which = f"{skipped} of its {len(entry.levels)} levels {'is' if skipped == 1 else 'are'} only upsampled"
            notes.append(f"{name}: {which}: the photo is smooth at that size")
        for last in entry.levels[-1:]:
            if (last.seam_score or 0) > SEAM_SCORE_LIMIT:
                notes.append(
                    f"{name}: steps at the borders of tiles exceed others by {last.seam_score:.1f} gray levels"
                )
            if (last.tile_mismatch or 0) > TILE_MISMATCH_LIMIT:
                differ = f"its tiles differed by {last.tile_mismatch:.0f} gray levels before they were blended"
                notes.append(f"{name}: {differ}; bands may be visible")
    return tuple(notes)

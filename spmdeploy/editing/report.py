"""What an edit did: which windows, through which levels, how long, and what its user should know."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from spmdeploy.editing.pyramid import LevelReport
from spmdeploy.tiling.letterbox import Letterbox
from spmdeploy.tiling.pyramid import PyramidLevel
from spmdeploy.tiling.windows import CROP_LIMIT, EditWindow

# Of a window's last level, in gray levels, beyond which the user is told. Tiles put side by side without any blending
# have a score of 2; where they differ by 16, sky has been seen to come out in bands (docs/large-images.md).
SEAM_SCORE_LIMIT = 2.0
TILE_MISMATCH_LIMIT = 12.0


@dataclass(frozen=True, slots=True)
class WindowReport:
    """site: the window and what was edited in it. frame: how it lay in the model's input. levels: those it was carried
    up through, measured: what each did, between_levels: in whose memory its picture was kept; none where it was edited
    at once. notes: why in the host's, where the session could have kept it on the device."""

    site: EditWindow
    frame: Letterbox
    levels: tuple[PyramidLevel, ...] = ()
    measured: tuple[LevelReport, ...] = ()
    between_levels: Literal["device", "host"] | None = None
    notes: tuple[str, ...] = ()

    @property
    def scale(self) -> float:
        """Pixels that the network made along a pixel of the photo, at most 1."""
        return 1.0 if self.levels else self.frame.scale

    @property
    def tiles(self) -> int:
        return sum(len(level.tiles) for level in self.levels)

    def to_json(self) -> dict[str, Any]:
        window = self.site.window
        return {
            "top": window.top,
            "left": window.left,
            "height": window.height,
            "width": window.width,
            "scale": round(self.scale, 4),
            "cascade": bool(self.levels),
            "levels": [report.to_json() for report in self.measured],
            "between_levels": self.between_levels,
        }


@dataclass(frozen=True, slots=True)
class EditReport:
    """How an edit was made.

    tiling is the mode that ran ("auto" is resolved, tiling_reason says why; "cascade" where at least one window was
    carried up); batches counts calls of the session; milliseconds has an entry per phase: validate, plan, prepare, run
    (the session alone), stitch.
    """

    backend: str
    device: str
    precision: str
    provider: str
    tiling: Literal["off", "crop", "cascade"]
    tiling_reason: str
    windows: tuple[WindowReport, ...]
    batches: int
    feather: int
    match_surroundings: bool
    edited_pixels: int
    milliseconds: dict[str, float]
    notes: tuple[str, ...]

    @property
    def tiles(self) -> int:
        """Over all levels of all windows."""
        return sum(window.tiles for window in self.windows)

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        return {
            "backend": self.backend,
            "device": self.device,
            "precision": self.precision,
            "provider": self.provider,
            "tiling": self.tiling,
            "tiling_reason": self.tiling_reason,
            "windows": [window.to_json() for window in self.windows],
            "tiles": self.tiles,
            "batches": self.batches,
            "feather": self.feather,
            "match_surroundings": self.match_surroundings,
            "edited_pixels": self.edited_pixels,
            "milliseconds": {phase: round(spent, 3) for phase, spent in self.milliseconds.items()},
            "notes": list(self.notes),
        }


def report_notes(windows: Sequence[WindowReport]) -> tuple[str, ...]:
    """What is worth telling the user, a sentence each."""
    notes = []
    for number, entry in enumerate(windows, start=1):
        window, frame = entry.site.window, entry.frame
        name = f"window {number} of {len(windows)}"
        notes += [f"{name}: {note}" for note in entry.notes]
        if entry.scale < 1 / CROP_LIMIT:
            size = f"{window.width}×{window.height} pixels and is edited at {frame.width}×{frame.height}"
            notes.append(f"{name} is {size}: detail is lost")
        smooth = sum(not level.refined for level in entry.measured)
        if smooth:
            which = f"{smooth} of its {len(entry.measured)} doublings {'is' if smooth == 1 else 'are'} enlarged only"
            notes.append(f"{name}: {which}: the photo is smooth at that size")
        for last in entry.measured[-1:]:
            if (last.seam_score or 0) > SEAM_SCORE_LIMIT:
                notes.append(
                    f"{name}: steps at the borders of tiles exceed others by {last.seam_score:.1f} gray levels"
                )
            if (last.tile_mismatch or 0) > TILE_MISMATCH_LIMIT:
                differ = f"its tiles differed by {last.tile_mismatch:.0f} gray levels before they were blended"
                notes.append(f"{name}: {differ}; bands of light may show")
    return tuple(notes)

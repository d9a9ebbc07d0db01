"""One edit of files as it is asked for. Imports nothing heavy: what is asked for can be refused at once."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from spmdeploy.errors import UsageError

if TYPE_CHECKING:
    from spmdeploy.tiling.outpaint import Padding

DEFAULT_DILATION = 8
"""Pixels by which a mask made from changed labels is grown unless told otherwise: label maps cut objects tightly, and
what is left of an object's outline or shadow would show."""


@dataclass(frozen=True)
class EditRequest:
    """What to edit. One of `labels` and `fill` says what becomes of it; one of `mask`, `edited_from` and `extend` says
    where."""

    image: Path
    output: Path
    labels: Path | None = None
    fill: str | None = None
    """One class, by name or id, for everything under the mask."""
    mask: Path | None = None
    edited_from: Path | None = None
    """The label map before it was edited: the mask is what differs."""
    extend: Padding | None = None
    """Pixels to grow the picture by: what is new is the mask. Labels and instances then have the size of the result."""
    instances: Path | None = None
    mask_threshold: int | None = None
    """1 to 255: pixels of the mask file of at least this value are edited; None: it must be clearly binary."""
    mask_alpha: Literal["opaque", "transparent"] | None = None
    """Take this part of the mask file's alpha channel as the mask."""
    grow: int | None = None
    """Pixels to grow the mask by; None: `DEFAULT_DILATION` with edited_from, else 0."""
    sheet: Path | None = None
    """Where to put a picture of before, labels, mask and after side by side."""
    explain: Path | None = None
    """Where to put a picture of the windows and tiles over the photo."""
    overwrite: bool = False
    match_surroundings: bool = False
    """See `Editor.edit`."""

    def __post_init__(self) -> None:
        if (self.labels is None) == (self.fill is None):
            raise UsageError("give either labels or fill", "--labels FILE for a label map, --fill CLASS for one class")
        if sum(given is not None for given in (self.mask, self.edited_from, self.extend)) != 1:
            raise UsageError(
                "give one of mask, edited_from and extend",
                "--mask FILE, --edited-from FILE with the labels before the change, or --extend LEFT,TOP,RIGHT,BOTTOM "
                "(to edit and to extend are two steps)",
            )
        if self.edited_from is not None and self.labels is None:
            raise UsageError("edited_from needs labels to compare with", "add --labels FILE, or use --mask")
        if self.match_surroundings and self.labels is None:
            raise UsageError(
                "match_surroundings needs the labels of the photo's known pixels too",
                "give --labels FILE instead of --fill, or leave --match-surroundings out",
            )
        if self.mask is None and (self.mask_threshold is not None or self.mask_alpha is not None):
            raise UsageError("mask_threshold and mask_alpha are about a mask file", "add --mask FILE")
        if self.mask_threshold is not None and not 1 <= self.mask_threshold <= 255:
            raise UsageError(f"mask_threshold is {self.mask_threshold}, which is not within 1 and 255")
        if self.grow is not None and self.extend is not None:
            raise UsageError("grow enlarges a mask, and an extension has none", "leave one of them out")
        if self.grow is not None and not 0 <= self.grow <= 1024:
            raise UsageError(f"grow is {self.grow}, which is not within 0 and 1024 pixels")
        self._check_names()

    def _check_names(self) -> None:
        """An output may take the place of the photo, if overwriting is allowed, but of nothing else it is made from."""
        sources = (self.labels, self.mask, self.edited_from, self.instances)
        written_too = (*sources, self.image, self.output)
        for written, others in (
            (self.output, sources),
            (self.sheet, written_too),
            (self.explain, (*written_too, self.sheet)),
        ):
            same = written and next((other for other in others if other and _same_file(written, other)), None)
            if same:
                raise UsageError(f"{written} would be written over {same}, which is needed too", "choose another name")

    @property
    def mask_description(self) -> str:
        """What messages call the mask."""
        if self.extend is not None:
            return "the extension"
        name = str(self.mask) if self.mask else f"the difference of {self.labels} and {self.edited_from}"
        return f"{name}, grown by {self.growth}," if self.growth else name

    @property
    def growth(self) -> int:
        """Pixels to grow the mask by."""
        if self.grow is not None:
            return self.grow
        return 0 if self.edited_from is None else DEFAULT_DILATION


def parse_padding(text: str) -> Padding:
    """ "LEFT,TOP,RIGHT,BOTTOM" in pixels. UsageError for anything else."""
    from spmdeploy.tiling.outpaint import Padding

    words = text.replace(",", " ").split()
    if len(words) != 4 or not all(re.fullmatch(r"-?[0-9]{1,9}", word) for word in words):
        raise UsageError(
            f"extend is {text!r}, not four whole numbers",
            "give the pixels to add on the left, top, right and bottom, for example 0,0,256,0",
        )
    return Padding(*map(int, words))


def _same_file(first: Path, second: Path) -> bool:
    try:
        return os.path.realpath(first) == os.path.realpath(second)
    except ValueError:  # a zero byte in a name, which reading the file reports
        return False

"""Configuration of training data: folders, crops and mask kinds."""

from __future__ import annotations

import typing
from dataclasses import dataclass, field
from typing import Any, Literal

from spmdeploy.errors import InputError

MaskKind = Literal["strokes", "extension", "outpainting", "class", "instance"]
MASK_KINDS: tuple[MaskKind, ...] = typing.get_args(MaskKind)

LARGEST_SCALE = 8
"""A crop enlarged further is a few pixels wide."""


@dataclass(frozen=True)
class ExtraData:
    """A second data folder whose classes are mapped onto the first one's."""

    root: str
    """Folder in the same layout as the main one."""
    share: float
    """Part of all training samples that come from this folder, 0..1."""
    rename: dict[str, str] = field(default_factory=dict)
    """Its class name -> the main folder's class name, for those that are not called the same."""


@dataclass(frozen=True)
class DataConfig:
    """Where samples come from and how they are cut."""

    root: str
    """Folder with train/{images,labels,inst_map|inst_map_cc} and labels.json."""
    extra: tuple[ExtraData, ...] = ()
    """Further folders to mix in."""
    crop: int = 256
    """Side of the square that the network sees; a multiple of 128."""
    smallest_scale: float = 1.0
    """Crops come from squares of crop/scale pixels, scale drawn from here to `largest_scale`; the paper has 1."""
    largest_scale: float = 1.0
    """Above 1 the network also sees pictures enlarged, as its last stage does where it refines large ones."""
    relighting: float = 0.0
    """Training photos are brightened, tinted and given another contrast by factors up to e to this power, so that
    colors must be read off the known pixels instead of being remembered for each class; the paper has 0."""
    holes: tuple[MaskKind, ...] = MASK_KINDS
    """The kinds of holes, one drawn for each sample."""
    validation: int = 32
    """Training pictures held out for validation, as blocks of neighbors (frames of a film are near duplicates)."""
    validation_blocks: int = 8
    """How many such blocks, spread evenly over the sorted names; the neighbors of a block are not used at all."""

    def __post_init__(self) -> None:
        require(self.crop > 0 and self.crop % 128 == 0, "data.crop", self.crop, "a multiple of 128")
        require(self.smallest_scale > 0, "data.smallest_scale", self.smallest_scale, "more than 0")
        require(
            self.smallest_scale <= self.largest_scale <= LARGEST_SCALE,
            "data.largest_scale",
            self.largest_scale,
            f"from the smallest, {self.smallest_scale}, to {LARGEST_SCALE}",
        )
        require(0 <= self.relighting <= 1, "data.relighting", self.relighting, "in [0, 1]")
        require(bool(self.holes), "data.holes", self.holes, "at least one kind")
        require(self.validation >= 0, "data.validation", self.validation, "zero or more pictures")
        require(self.validation_blocks >= 1, "data.validation_blocks", self.validation_blocks, "at least one block")


def require(holds: bool, name: str, value: Any, expected: str) -> None:
    if not holds:
        raise InputError(f"{name} is {value!r}, expected {expected}")

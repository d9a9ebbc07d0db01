"""Closed choices, array types and constants that the whole package shares."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias, get_args

if TYPE_CHECKING:  # help texts must not wait for numpy: the aliases below are strings
    from typing import Any

    import numpy as np
    from numpy.typing import NDArray

Precision = Literal["fp32", "fp16"]
"""Of a graph."""
BackendPrecision = Literal["fp32", "tf32", "fp16", "bf16"]
"""What a backend computes in."""
WeightsDtype = Literal["float32", "float16"]
Tiling = Literal["auto", "off", "crop", "cascade"]
"""off: the whole image at once. crop: context windows, shrunk where they are larger than the model. cascade: large
windows are refined coarse to fine in tiles. auto: off where the image has the model's size, else cascade where the
model can refine, else crop."""
MaskAlpha = Literal["opaque", "transparent"]
"""The part of a mask file's alpha channel that is edited."""
ChannelOrder = Literal["RGB", "BGR"]
Modulation = Literal["spm", "spade"]
"""spm: the paper's block. spade: its ablation, the block of Park et al. (CVPR 2019), modulated by the layout alone."""
MODULATIONS: tuple[Modulation, ...] = get_args(Modulation)
StageCount = Literal[3, 1]
"""3: the paper's. 1: its single-scale ablation, the full-size stage alone on the masked image."""
STAGE_COUNTS: tuple[StageCount, ...] = get_args(StageCount)

NATIVE_SIZE = 256
"""Height and width of the deploy graph's images (paper, section 4.1)."""

Image: TypeAlias = "NDArray[np.uint8]"
"""uint8 (H, W, 3), RGB, 0..255."""
Mask: TypeAlias = "NDArray[np.bool_]"
"""bool (H, W), True = edit."""
LabelMap: TypeAlias = "NDArray[np.integer[Any]]"
"""Integer (H, W): class or instance ids."""
Boxes: TypeAlias = "NDArray[np.int64]"
"""int64 (N, 4): top, left, bottom and right of each box; bottom and right are exclusive."""
Indices: TypeAlias = "NDArray[np.intp]"
"""Positions along one axis of an array."""
Canvas: TypeAlias = "NDArray[np.float32]"
"""float32 (H, W, 3), RGB, 0..255: an image that has not been rounded."""
Progress: TypeAlias = Callable[[int, int], None]
"""Called with the number of steps done and the total."""


class ModelInput(NamedTuple):
    """Inputs of the deploy graph, for one image (size, size[, 3]) or a batch (B, size, size[, 3])."""

    image: NDArray[np.uint8]
    """RGB, 0..255."""
    labels: NDArray[np.uint8]
    """Class ids."""
    instances: NDArray[np.int32]
    """Instance ids, or the labels where there are no instances."""
    mask: NDArray[np.uint8]
    """0 = keep, anything else = edit."""


class LayoutInput(NamedTuple):
    """`ModelInput` without the image."""

    labels: NDArray[np.uint8]
    instances: NDArray[np.int32]
    mask: NDArray[np.uint8]


class Padding(NamedTuple):
    """Pixels to extend an image by, on each side."""

    left: int
    top: int
    right: int
    bottom: int

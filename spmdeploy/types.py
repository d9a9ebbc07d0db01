"""Closed choices and constants that the whole package shares."""

from __future__ import annotations

from typing import Literal, get_args

Precision = Literal["fp32", "fp16"]
WeightsDtype = Literal["float32", "float16"]
ChannelOrder = Literal["RGB", "BGR"]
Modulation = Literal["spm", "spade"]
"""spm: the paper's block. spade: its ablation, the block of Park et al. (CVPR 2019), modulated by the layout alone."""
MODULATIONS: tuple[Modulation, ...] = get_args(Modulation)
StageCount = Literal[3, 1]
"""3: the paper's. 1: its single-scale ablation, the full-size stage alone on the masked image."""
STAGE_COUNTS: tuple[StageCount, ...] = get_args(StageCount)

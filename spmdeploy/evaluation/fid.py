"""The Inception v3 whose features define FID (Heusel et al. 2017), from the file that pytorch-fid publishes.

It differs from torchvision's Inception v3 in its weights and in the pooling inside its blocks, so that torchvision's
file gives another distance. The file is identified by its SHA-256; images are resized to 299 × 299 as in pytorch-fid.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from spmdeploy.errors import InputError
from spmdeploy.inputs import regular_file
from spmdeploy.training.pretrained import read_state_dict

PUBLISHED_FILE = "pt_inception-2015-12-05-6726825d.pth"
PUBLISHED_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"

SIDE = 299
BATCH_NORM_EPS = 1e-3

BranchStep: TypeAlias = str | tuple[str, ...]
"""A convolution by its name in the block, "/STRIDE" behind it where it has no padding; several of them on the same
input, stacked; or a pooling."""
Branch: TypeAlias = tuple[BranchStep, ...]

_A: tuple[Branch, ...] = (
    ("branch1x1",),
    ("branch5x5_1", "branch5x5_2"),
    ("branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"),
    ("average", "branch_pool"),
)
_B: tuple[Branch, ...] = (
    ("branch3x3/2",),
    ("branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3/2"),
    ("pool",),
)
_C: tuple[Branch, ...] = (
    ("branch1x1",),
    ("branch7x7_1", "branch7x7_2", "branch7x7_3"),
    ("branch7x7dbl_1", "branch7x7dbl_2", "branch7x7dbl_3", "branch7x7dbl_4", "branch7x7dbl_5"),
    ("average", "branch_pool"),
)
_D: tuple[Branch, ...] = (
    ("branch3x3_1", "branch3x3_2/2"),
    ("branch7x7x3_1", "branch7x7x3_2", "branch7x7x3_3", "branch7x7x3_4/2"),
    ("pool",),
)
_E: tuple[Branch, ...] = (
    ("branch1x1",),
    ("branch3x3_1", ("branch3x3_2a", "branch3x3_2b")),
    ("branch3x3dbl_1", "branch3x3dbl_2", ("branch3x3dbl_3a", "branch3x3dbl_3b")),
)
STEM: Branch = (
    "Conv2d_1a_3x3/2",
    "Conv2d_2a_3x3/1",
    "Conv2d_2b_3x3",
    "pool",
    "Conv2d_3b_1x1",
    "Conv2d_4a_3x3/1",
    "pool",
)
BLOCKS: dict[str, tuple[Branch, ...]] = {
    "Mixed_5b": _A,
    "Mixed_5c": _A,
    "Mixed_5d": _A,
    "Mixed_6a": _B,
    "Mixed_6b": _C,
    "Mixed_6c": _C,
    "Mixed_6d": _C,
    "Mixed_6e": _C,
    "Mixed_7a": _D,
    "Mixed_7b": (*_E, ("average", "branch_pool")),
    "Mixed_7c": (*_E, ("maximum", "branch_pool")),  # on purpose: the last block of FID's network takes the maximum
}


class FidInception:
    """Computes the 2048 features that FID compares."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        """state: the file's tensors; each convolution `NAME.conv.weight` with its batch norm `NAME.bn.*`."""
        names = [name.removesuffix(".conv.weight") for name in state if name.endswith(".conv.weight")]
        self._convolutions = {name: _fold_batch_norm(state, name) for name in names}

    @classmethod
    def from_file(cls, path: Path) -> FidInception:
        """Loads the weights of the published file.

        Raises:
            InputError: It is another file.
        """
        try:
            digest = hashlib.sha256(regular_file(path).read_bytes()).hexdigest()
        except OSError as exc:
            raise InputError(f"{path}: cannot be read: {exc}", f"give pytorch-fid's {PUBLISHED_FILE}") from exc
        if digest != PUBLISHED_SHA256:
            raise InputError(
                f"{path}: its SHA-256 is {digest[:16]}…, that of FID's Inception {PUBLISHED_SHA256[:16]}…",
                f"FID is defined by pytorch-fid's {PUBLISHED_FILE}; features of any other network are not FID's",
            )
        return cls(read_state_dict(path))

    @torch.no_grad()
    def pooled(self, image: Tensor) -> Tensor:
        """Features of images, float (N, 3, h, w), RGB in [-1, 1]: float (N, 2048)."""
        x = F.interpolate(image, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
        x = self._branch(x, "", STEM)
        for name, branches in BLOCKS.items():
            x = torch.cat([self._branch(x, f"{name}.", branch) for branch in branches], dim=1)
        return x.mean(dim=(2, 3))

    def _branch(self, x: Tensor, block: str, steps: Branch) -> Tensor:
        for step in steps:
            if isinstance(step, tuple):
                x = torch.cat([self._convolve(x, block + name) for name in step], dim=1)
            elif step == "average":
                x = F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
            elif step == "maximum":
                x = F.max_pool2d(x, 3, stride=1, padding=1)
            elif step == "pool":
                x = F.max_pool2d(x, 3, stride=2)
            else:
                x = self._convolve(x, block + step)
        return x

    def _convolve(self, x: Tensor, step: str) -> Tensor:
        name, _, stride = step.partition("/")
        weight, bias = self._convolutions[name]
        padding = [0, 0] if stride else [side // 2 for side in weight.shape[2:]]
        return F.relu(F.conv2d(x, weight, bias, stride=int(stride or 1), padding=padding))


def _fold_batch_norm(state: Mapping[str, Tensor], name: str) -> tuple[Tensor, Tensor]:
    """Weight and bias of a convolution with its batch norm folded in."""
    scale = state[f"{name}.bn.weight"] / torch.sqrt(state[f"{name}.bn.running_var"] + BATCH_NORM_EPS)
    shift = state[f"{name}.bn.bias"] - state[f"{name}.bn.running_mean"] * scale
    return state[f"{name}.conv.weight"] * scale.view(-1, 1, 1, 1), shift

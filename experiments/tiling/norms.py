"""The deploy graphs in eager PyTorch with configurable instance-norm statistics and color transfer."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scenes import read_generator
from torch import Tensor

from spmdeploy.model import deploy, modulation
from spmdeploy.model.deploy import COLOR_BLOCK, EditGraph, RefineGraph
from spmdeploy.tiling.pyramid import PyramidLevel
from spmdeploy.types import ModelInput

Canvas = NDArray[np.float32]
Moments = tuple[Tensor, Tensor]
"""Mean and variance of each channel."""

MIN_SIDE = 16
"""Maps of this side and larger use the given statistics. The variance of fewer values is no estimate: with statistics
given for all maps, images overflow."""

MAX_VARIANCE_RATIO = 4.0
"""Largest ratio between a tile's own variance and the given one after clamping."""


class ExperimentSession:
    """Session in eager PyTorch whose last stage can be modified.

    Attributes:
        norms: Context managers, one for each call of the last stage; once exhausted, `statistics` applies.
        statistics: "tile": norms use the tile's statistics, as in the shipped graphs; "coarse": those of the coarse
            edit in the upper left `content` of its rows and columns (the rest is padding); "bounded": the latter,
            clamped by `clamp_moments`.
        color_block: Side of the blocks whose mean colors come from the previous level; 0: no color transfer.
    """

    backend, device, precision, provider, notes = "torch", "cpu", "fp32", "eager", ()
    size, refines, refine_unsupported = 256, True, None

    def __init__(self, path: Path) -> None:
        """path: bundle or checkpoint."""
        generator = read_generator(path)
        self._edit, self._last_stage = EditGraph(generator).eval(), RefineGraph(generator).eval()
        self._norms_of_last = len(generator.stages[-1].encoder) + len(generator.stages[-1].decoder)
        self.statistics: Literal["tile", "coarse", "bounded"] = "tile"
        self.color_block = COLOR_BLOCK
        self.content = (self.size, self.size)
        self.norms: Iterator[AbstractContextManager[None]] = iter(())
        self.coarse: list[Moments | None] = []
        self.runs = 0

    def run(self, inputs: ModelInput) -> NDArray[np.uint8]:
        return np.rint(self.edit(inputs)).astype(np.uint8)

    def run_unrounded(self, inputs: ModelInput) -> Canvas:
        sums: dict[int, MomentSums] = {}
        content = torch.zeros(1, 1, self.size, self.size)
        content[..., : self.content[0], : self.content[1]] = 1
        with replay_norms([], lambda number, x: sums.setdefault(number, MomentSums()).add(x, content)):
            image = self.edit(inputs)
        self.coarse = collect_moments(sums, MIN_SIDE)[-self._norms_of_last :]
        return image

    def edit(self, inputs: ModelInput) -> Canvas:
        return self._outputs(self._edit, *inputs)

    def refine(self, inputs: ModelInput, coarse: Canvas) -> Canvas:
        by_default = {
            "tile": nullcontext(),
            "coarse": replay_norms(self.coarse),
            "bounded": replay_norms(self.coarse, bound=MAX_VARIANCE_RATIO),
        }[self.statistics]
        with next(self.norms, by_default), replaced(deploy, *self._color_transfer()):
            return self._outputs(self._last_stage, *inputs, coarse)

    def _color_transfer(self) -> tuple[str, Any]:
        """Name and value to replace in the deploy module."""
        if self.color_block:
            return "COLOR_BLOCK", self.color_block
        return "_transfer_low_frequencies", lambda coarse, refined, mask: refined

    def _outputs(self, graph: torch.nn.Module, *inputs: NDArray[Any]) -> Canvas:
        """float32 (B, H, W, 3), unrounded."""
        self.runs += len(inputs[0])
        with torch.inference_mode():
            return np.asarray(graph(*(torch.from_numpy(np.ascontiguousarray(array)) for array in inputs))[1])

    def close(self) -> None:
        pass


@contextmanager
def replaced(module: ModuleType, name: str, value: Any) -> Iterator[None]:
    own = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, own)


def normalized(x: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    return (x - mean) * torch.rsqrt(variance + modulation.NORM_EPS)


def moments(x: Tensor) -> Moments:
    variance, mean = torch.var_mean(x, dim=(2, 3), keepdim=True, correction=0)
    return mean, variance


def pool_moments(level: PyramidLevel) -> AbstractContextManager[None]:
    """Norms that use the exact mean and variance over all tiles of a level, which must run as one batch."""
    weights = weights_of(level)

    def norm(x: Tensor) -> Tensor:
        share = torch.nn.functional.adaptive_avg_pool2d(weights, x.shape[-2:])
        share = share / share.sum()
        mean = (share * x).sum(dim=(0, 2, 3), keepdim=True)
        return normalized(x, mean, (share * (x - mean) ** 2).sum(dim=(0, 2, 3), keepdim=True))

    return replaced(modulation, "instance_norm", norm)


def weights_of(level: PyramidLevel) -> Tensor:
    """Blend weights, float (tiles, 1, size, size): each pixel of the level counts once."""
    return torch.from_numpy(np.stack([level.weights(tile) for tile in level.tiles]))[:, None]


def replay_norms(
    moments: Sequence[Moments | None],
    watch: Callable[[int, Tensor], None] = lambda *_: None,
    bound: float | None = None,
) -> AbstractContextManager[None]:
    """Norms that use the given moments in order; for None and beyond the end, the tile's own.

    `watch(number, x)` receives the input of each norm. bound: see `clamp_moments`.
    """
    given = enumerate(itertools.chain(moments, itertools.repeat(None)))

    def norm(x: Tensor) -> Tensor:
        number, found = next(given)
        watch(number, x)
        own = moments(x)
        return normalized(x, *(own if found is None else found if bound is None else clamp_moments(found, own, bound)))

    return replaced(modulation, "instance_norm", norm)


def clamp_moments(given: Moments, own: Moments, bound: float) -> Moments:
    """Clamps `given` to a range around a tile's `own` moments.

    Variances differ by a factor of `bound` at most, means by its root times the tile's standard deviation.
    """
    (mean, variance), (own_mean, own_variance) = given, own
    reach = (bound * own_variance).sqrt()
    return mean.clamp(own_mean - reach, own_mean + reach), variance.clamp(own_variance / bound, own_variance * bound)


class MomentSums:
    """Weighted sums of x and x² over all tiles of a level at one norm; each pixel counts once."""

    def __init__(self) -> None:
        self.side = 0
        self.weight, self.first, self.second = 0.0, torch.zeros(()), torch.zeros(())

    def add(self, x: Tensor, weights: Tensor) -> None:
        self.side = x.shape[-1]
        share = torch.nn.functional.adaptive_avg_pool2d(weights, x.shape[-2:]).double()
        self.weight += float(share.sum())
        self.first = self.first + (share * x).sum(dim=(0, 2, 3), keepdim=True)
        self.second = self.second + (share * x * x).sum(dim=(0, 2, 3), keepdim=True)

    @property
    def moments(self) -> Moments:
        mean = self.first / self.weight
        return mean.float(), (self.second / self.weight - mean**2).clamp_min(0).float()


def sweep_tiles(
    sums: dict[int, MomentSums], level: PyramidLevel, batch_size: int
) -> Iterator[AbstractContextManager[None]]:
    """Contexts for the batches of a level that add the input of every norm to its sums."""
    for weights in weights_of(level).split(batch_size):
        yield replay_norms([], lambda number, x, part=weights: sums.setdefault(number, MomentSums()).add(x, part))


def collect_moments(sums: dict[int, MomentSums], min_side: int) -> list[Moments | None]:
    return [found.moments if found.side >= min_side else None for _, found in sorted(sums.items())]

"""The two graphs in eager PyTorch, with a choice of what the instance norms of the last stage go by, and its light."""

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
from tiling_scenes import read_generator
from torch import Tensor

from spmdeploy.model import deploy as deploy_graph
from spmdeploy.model import modulation
from spmdeploy.model.deploy import COLOR_BLOCK, EditGraph, RefineGraph
from spmdeploy.tiling.pyramid import PyramidLevel

Canvas = NDArray[np.float32]
Moments = tuple[Tensor, Tensor]
"""Mean and variance of each channel."""

# Side of the maps from which on given statistics are used. The variance of a few places is no estimate: with those of
# all maps given, pictures overflow.
SMALLEST = 16

# A tile's own variance is at most so many times what given statistics are bounded to.
BOUND = 4.0


class ExperimentSession:
    """A session. norms: one for each call of the last stage, as long as there are any; else:

    statistics "tile": the norms go by the tile, as in the shipped graphs; "coarse": by what the last stage's norms saw
    in the coarse edit before, in the upper left `content` of its rows and columns (the rest is padding); "bounded": by
    these, as far as `clamp_moments` lets them.
    light: side of the blocks whose mean colors are those of the level before; 0: the last stage's own.
    """

    backend, device, precision, provider, notes = "torch", "cpu", "fp32", "eager", ()
    size, refines, refine_unsupported = 256, True, None

    def __init__(self, path: Path) -> None:
        """path: bundle or checkpoint."""
        generator = read_generator(path)
        self._edit, self._last_stage = EditGraph(generator).eval(), RefineGraph(generator).eval()
        self._norms_of_last = len(generator.stages[-1].encoder) + len(generator.stages[-1].decoder)
        self.statistics: Literal["tile", "coarse", "bounded"] = "tile"
        self.light = COLOR_BLOCK
        self.content = (self.size, self.size)
        self.norms: Iterator[AbstractContextManager[None]] = iter(())
        self.coarse: list[Moments | None] = []
        self.runs = 0

    def run(self, *inputs: NDArray[Any]) -> NDArray[np.uint8]:
        return np.rint(self.edit(*inputs)).astype(np.uint8)

    def run_unrounded(self, *inputs: NDArray[Any]) -> Canvas:
        sums: dict[int, MomentSums] = {}
        content = torch.zeros(1, 1, self.size, self.size)
        content[..., : self.content[0], : self.content[1]] = 1
        with replay_norms([], lambda number, x: sums.setdefault(number, MomentSums()).add(x, content)):
            picture = self.edit(*inputs)
        self.coarse = collect_moments(sums, SMALLEST)[-self._norms_of_last :]
        return picture

    def edit(self, *inputs: NDArray[Any]) -> Canvas:
        return self._outputs(self._edit, *inputs)

    def refine(self, *inputs: NDArray[Any]) -> Canvas:
        by_default = {
            "tile": nullcontext(),
            "coarse": replay_norms(self.coarse),
            "bounded": replay_norms(self.coarse, bound=BOUND),
        }[self.statistics]
        with next(self.norms, by_default), replaced(deploy_graph, *self._lighting()):
            return self._outputs(self._last_stage, *inputs)

    def _lighting(self) -> tuple[str, Any]:
        return ("LIGHT_BLOCK", self.light) if self.light else ("_in_light_of", lambda coarse, refined, mask: refined)

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
    """Mean and exact total variance over all tiles of a level, which must run as one batch, layer by layer, so that
    nothing is estimated."""
    weights = weights_of(level)

    def norm(x: Tensor) -> Tensor:
        share = torch.nn.functional.adaptive_avg_pool2d(weights, x.shape[-2:])
        share = share / share.sum()
        mean = (share * x).sum(dim=(0, 2, 3), keepdim=True)
        return normalized(x, mean, (share * (x - mean) ** 2).sum(dim=(0, 2, 3), keepdim=True))

    return replaced(modulation, "instance_norm", norm)


def weights_of(level: PyramidLevel) -> Tensor:
    """float (tiles, 1, size, size), so that each pixel of the level counts once."""
    return torch.from_numpy(np.stack([level.weights(tile) for tile in level.tiles]))[:, None]


def replay_norms(
    moments: Sequence[Moments | None],
    watch: Callable[[int, Tensor], None] = lambda *_: None,
    bound: float | None = None,
) -> AbstractContextManager[None]:
    """What the norms are given, in their order; None and beyond the end: a tile's own statistics. watch(number, x) is
    shown what each sees. bound: see `clamp_moments`."""
    given = enumerate(itertools.chain(moments, itertools.repeat(None)))

    def norm(x: Tensor) -> Tensor:
        number, found = next(given)
        watch(number, x)
        own = moments(x)
        return normalized(x, *(own if found is None else found if bound is None else clamp_moments(found, own, bound)))

    return replaced(modulation, "instance_norm", norm)


def clamp_moments(given: Moments, own: Moments, bound: float) -> Moments:
    """`given`, brought so near to a tile's `own` that no norm makes much more of the tile than its own would: variances
    differ by a factor of `bound` at most, means by the root of that times the tile's deviation."""
    (mean, variance), (own_mean, own_variance) = given, own
    reach = (bound * own_variance).sqrt()
    return mean.clamp(own_mean - reach, own_mean + reach), variance.clamp(own_variance / bound, own_variance * bound)


class MomentSums:
    """Of what one norm sees in all tiles of a level: weight, x and x squared, each pixel of the level counted once."""

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


def sweep(sums: dict[int, MomentSums], level: PyramidLevel, batch_size: int) -> Iterator[AbstractContextManager[None]]:
    """For the batches of a level, each tile by its own statistics: adds what every norm sees to its sums."""
    for weights in weights_of(level).split(batch_size):
        yield replay_norms([], lambda number, x, part=weights: sums.setdefault(number, MomentSums()).add(x, part))


def collect_moments(sums: dict[int, MomentSums], smallest: int) -> list[Moments | None]:
    return [found.moments if found.side >= smallest else None for _, found in sorted(sums.items())]

"""Metrics of edits against the photos, and the registry `METRICS`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from spmdeploy.evaluation.fid import FidInception
from spmdeploy.training.perceptual import Lpips
from spmdeploy.types import Image, Mask

BATCH = 4
MAX_PSNR = 99.0
"""PSNR of an exact copy, in dB."""

Images = NDArray[np.uint8]
"""uint8 (N, S, S, 3), RGB."""
Scores = NDArray[np.float64]


class Networks:
    """The networks that metrics need.

    Args:
        inception: FID's network; None: the Fréchet distance is that of AlexNet's features, and is not called FID.
    """

    def __init__(self, inception: FidInception | None = None) -> None:
        self.lpips = Lpips()
        self.inception = inception

    def features(self, images: Images) -> Scores:
        """Features of whole images for the Fréchet distance: float64 (N, 2048) of FID's network, else (N, 256)."""
        network = self.inception or self.lpips
        return np.concatenate([network.pooled(part).double().numpy() for (part,) in _batches(images)])


@dataclass(frozen=True)
class Comparison:
    """Edits by one model, and what they are compared with."""

    edits: Images
    """uint8 (N, S, S, 3), RGB."""
    photos: Images
    """uint8 (N, S, S, 3), RGB."""
    masks: NDArray[np.bool_]
    """bool (N, S, S), True = edited."""
    networks: Networks
    photo_features: Scores
    """`Networks.features` of the photos."""

    @cached_property
    def lpips(self) -> Scores:
        """LPIPS under the mask: float64 (N,)."""
        masks = torch.from_numpy(self.masks)[:, None].float()
        scores = [
            self.networks.lpips(edit, photo, masks[index * BATCH : (index + 1) * BATCH])
            for index, (edit, photo) in enumerate(_batches(self.edits, self.photos))
        ]
        return torch.cat(scores).double().numpy()

    def per_image(self, measure: Callable[[Mask, Image, Image], float]) -> Scores:
        """`measure(mask, edit, photo)` of every image: float64 (N,)."""
        return np.array([measure(*parts) for parts in zip(self.masks, self.edits, self.photos, strict=True)])


@dataclass(frozen=True)
class Metric:
    """One metric of an evaluation."""

    heading: str
    """Of its column in the table."""
    measure: Callable[[Comparison], Scores | float]
    """A value per image, of which the mean and its confidence interval are reported, or one of the whole set."""
    digits: int = 2
    """After the decimal point, in the table."""
    with_interval: bool = False
    """Whether the table shows the confidence interval; the JSON report always has it."""


def l1_under(mask: Mask, edit: Image, photo: Image) -> float:
    """Mean absolute error under the mask in gray levels, 0..255."""
    return float(np.abs(edit[mask].astype(np.float64) - photo[mask]).mean())


def psnr_under(mask: Mask, edit: Image, photo: Image) -> float:
    """Peak signal-to-noise ratio under the mask in dB, at most `MAX_PSNR`."""
    error = float(np.square(edit[mask].astype(np.float64) - photo[mask]).mean())
    return min(MAX_PSNR, 10 * float(np.log10(255**2 / max(error, 1e-12))))


def boundary_score(mask: Mask, edit: Image, photo: Image) -> float:
    """Mean step between neighbors across the mask's edge in the edit over that in the photo.

    1: the seam is as smooth as the photo there; more: the edge is visible; less: it is blurred.
    """
    edited, original = _steps_across(mask, edit), _steps_across(mask, photo)
    return float((edited.mean() + 1) / (original.mean() + 1))  # plus a gray level: a flat sky has no steps at all


def frechet_distance(first: Scores, second: Scores) -> float:
    """Distance of the normal distributions fitted to two sets of features, (N, D) each (Dowson and Landau 1982)."""
    mean = first.mean(axis=0) - second.mean(axis=0)
    a, b = _root_of_covariance(first), _root_of_covariance(second)
    # With A = aᵀa and B = bᵀb, the eigenvalues of AB are the squared singular values of abᵀ: tr sqrt(AB) is their sum.
    shared = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    return float(mean @ mean + np.square(a).sum() + np.square(b).sum() - 2 * shared)


METRICS: dict[str, Metric] = {
    "lpips": Metric("LPIPS", lambda comparison: comparison.lpips, digits=3, with_interval=True),
    "l1": Metric("L1", lambda comparison: comparison.per_image(l1_under)),
    "psnr": Metric("PSNR", lambda comparison: comparison.per_image(psnr_under)),
    "boundary": Metric("edge", lambda comparison: comparison.per_image(boundary_score)),
    "frechet": Metric(
        "Fréchet",
        lambda comparison: frechet_distance(comparison.networks.features(comparison.edits), comparison.photo_features),
        digits=3,
    ),
}
"""The metrics by their names in the JSON report. An entry here appears in reports and tables of `evaluate`."""


def metric_values(comparison: Comparison) -> Mapping[str, Scores | float]:
    """Measures all metrics of `METRICS`."""
    return {name: metric.measure(comparison) for name, metric in METRICS.items()}


def _steps_across(mask: Mask, image: Image) -> Scores:
    values = image.astype(np.float64)
    down, right = mask[1:] != mask[:-1], mask[:, 1:] != mask[:, :-1]
    vertical = np.abs(values[1:] - values[:-1]).mean(axis=2)[down]
    horizontal = np.abs(values[:, 1:] - values[:, :-1]).mean(axis=2)[right]
    return np.concatenate((vertical, horizontal))


def _root_of_covariance(features: Scores) -> Scores:
    """An r with rᵀr = the covariance of the features (N, D), with at most D rows."""
    root: Scores = (features - features.mean(axis=0)) / np.sqrt(max(1, len(features) - 1))
    if len(root) <= root.shape[1]:
        return root
    triangle: Scores = np.asarray(np.linalg.qr(root, mode="r"))
    return triangle


def _batches(*stacks: Images) -> Iterator[tuple[torch.Tensor, ...]]:
    """Tuples of float tensors (B, 3, S, S) in [-1, 1], one per stack."""
    for start in range(0, len(stacks[0]), BATCH):
        yield tuple(_as_tensor(stack[start : start + BATCH]) for stack in stacks)


def _as_tensor(images: Images) -> torch.Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1

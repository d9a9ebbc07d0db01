"""Models side by side on the same holes: figures under the mask for every kind of hole, with intervals."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from spmdeploy.images import write_picture
from spmdeploy.labels import class_table
from spmdeploy.sheets import sheet
from spmdeploy.training.config import HOLE_KINDS, HoleKind
from spmdeploy.training.dataset import PictureFolder, Sample, collate, random_crop, read_instance_rules
from spmdeploy.training.holes import random_hole
from spmdeploy.training.perceptual import Lpips
from spmdeploy.training.samples import layout, with_hole

BATCH = 4
RESAMPLES = 1000
"""Of the bootstrap; the interval's ends are then good to a few percent of its width."""
FEATURES = "AlexNet relu5, mean over the picture (256)"
"""What the Fréchet distance is measured in. It is not FID, whose features are another network's."""

Pixels = npt.NDArray[np.uint8]


class Edits(Protocol):
    """What is judged: any session, or a baseline."""

    def run(self, image: Pixels, labels: Pixels, instances: npt.NDArray[np.int32], mask: Pixels) -> Pixels:
        """uint8 (B, S, S, 3) RGB, uint8 and int32 (B, S, S), uint8 (B, S, S) with 0 = keep, to uint8 (B, S, S, 3)."""


@dataclass(frozen=True)
class Figure:
    """A mean over samples and its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Row:
    """One model on one kind of hole."""

    model: str
    hole: HoleKind
    samples: int
    lpips: Figure
    """LPIPS (AlexNet) under the mask; lower is better."""
    l1: Figure
    """Mean absolute error under the mask in grey levels; lower is better."""
    psnr: Figure
    """Under the mask, dB; higher is better."""
    boundary: Figure
    """Step across the mask's edge over the photo's own step there; 1 is seamless."""
    frechet: float
    """Fréchet distance between edits and photos in `FEATURES`; lower is better."""


@dataclass(frozen=True)
class Evaluation:
    """All rows, and what they were measured on."""

    data: str
    split: str
    seed: int
    rows: tuple[Row, ...]

    def to_json(self) -> dict[str, Any]:
        rows = [
            {name: vars(value) if isinstance(value, Figure) else value for name, value in vars(row).items()}
            for row in self.rows
        ]
        return {
            "schema": "spmdeploy.evaluation/1",
            "data": self.data,
            "split": self.split,
            "seed": self.seed,
            "frechet_features": FEATURES,
            "rows": rows,
        }

    def table(self) -> str:
        """One line per model and kind of hole, for a terminal."""
        lines = [f"{'hole':<12} {'model':<18} {'n':>4} {'LPIPS':>22} {'L1':>7} {'PSNR':>6} {'edge':>6} {'Fréchet':>8}"]
        for row in sorted(self.rows, key=lambda row: HOLE_KINDS.index(row.hole)):
            lpips = f"{row.lpips.mean:.3f} [{row.lpips.low:.3f}, {row.lpips.high:.3f}]"
            lines.append(
                f"{row.hole:<12} {row.model:<18} {row.samples:>4} {lpips:>22} {row.l1.mean:>7.2f} "
                f"{row.psnr.mean:>6.2f} {row.boundary.mean:>6.2f} {row.frechet:>8.3f}"
            )
        return "\n".join(lines)


def evaluation_samples(
    root: Path, seed: int, kind: HoleKind, split: str = "test", crop: int = 256, limit: int | None = None
) -> list[Sample]:
    """A square of every picture of the split with a hole of `kind`: a pure function of the arguments and the files.

    The square does not depend on the kind. limit: only so many pictures, evenly spread.
    """
    folder = PictureFolder(root, split, read_instance_rules(root))
    names = folder.names
    if limit is not None and limit < len(names):
        names = tuple(names[index * len(names) // limit] for index in range(limit))
    samples = []
    for name in names:
        own = zlib.crc32(name.encode())  # of the name, not its place: other pictures may come and go
        cut = random_crop(folder[name], crop, 1.0, False, np.random.default_rng((seed, own)))
        rng = np.random.default_rng((seed, own, HOLE_KINDS.index(kind)))
        samples.append(Sample(cut.image, cut.labels, cut.instances, random_hole(kind, cut.labels, cut.instances, rng)))
    return samples


def evaluate(
    models: Mapping[str, Edits],
    root: Path,
    seed: int = 0,
    split: str = "test",
    kinds: Sequence[HoleKind] = HOLE_KINDS,
    crop: int = 256,
    limit: int | None = None,
) -> tuple[Evaluation, dict[HoleKind, Pixels]]:
    """All models on the same holes. Also returns a contact sheet per kind, sorted by the first model's LPIPS."""
    lpips = Lpips()
    rows, sheets = [], {}
    for kind in kinds:
        samples = evaluation_samples(root, seed, kind, split, crop, limit)
        edits = {name: run_all(model, samples) for name, model in models.items()}
        scores = {name: _lpips(lpips, samples, found) for name, found in edits.items()}
        photos = _features(lpips, np.stack([sample.image for sample in samples]))
        for name, found in edits.items():
            distance = frechet_distance(_features(lpips, found), photos)
            rows.append(_row(name, kind, samples, found, scores[name], distance, seed))
        order = np.argsort(scores[next(iter(models))])
        sheets[kind] = _contact_sheet(root, samples, edits, order)
    return Evaluation(str(root), split, seed, tuple(rows)), sheets


def write_evaluation(evaluation: Evaluation, sheets: Mapping[HoleKind, Pixels], folder: Path) -> None:
    """FOLDER/evaluation.json, evaluation.txt (the table) and a sheet KIND.png for every kind of hole."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "evaluation.json").write_text(json.dumps(evaluation.to_json(), indent=1) + "\n", encoding="utf-8")
    (folder / "evaluation.txt").write_text(evaluation.table() + "\n", encoding="utf-8")
    for kind, page in sheets.items():
        write_picture(folder / f"{kind}.png", page, overwrite=True)


def run_all(model: Edits, samples: Sequence[Sample]) -> Pixels:
    """The model's edits of all samples: uint8 (N, S, S, 3)."""
    results = []
    for start in range(0, len(samples), BATCH):
        part = samples[start : start + BATCH]
        results.append(
            model.run(
                np.stack([sample.image for sample in part]),
                np.stack([sample.labels for sample in part]),
                np.stack([sample.instances for sample in part]),
                np.stack([sample.mask for sample in part]).astype(np.uint8),
            )
        )
    return np.concatenate(results)


def l1_under(mask: npt.NDArray[np.bool_], found: Pixels, photo: Pixels) -> float:
    """Mean absolute error under the mask, grey levels. found, photo: uint8 (H, W, 3)."""
    return float(np.abs(found[mask].astype(np.float64) - photo[mask]).mean())


def psnr_under(mask: npt.NDArray[np.bool_], found: Pixels, photo: Pixels) -> float:
    """Under the mask, dB; at most 99 (an exact copy)."""
    error = float(np.square(found[mask].astype(np.float64) - photo[mask]).mean())
    return min(99.0, 10 * float(np.log10(255**2 / max(error, 1e-12))))


def boundary_score(mask: npt.NDArray[np.bool_], found: Pixels, photo: Pixels) -> float:
    """Mean step between neighbours across the mask's edge in the edit over that in the photo.

    1: the seam is as smooth as the photo there; more: the edge shows; less: smeared across.
    """
    ours, theirs = _steps_across(mask, found), _steps_across(mask, photo)
    return float((ours.mean() + 1) / (theirs.mean() + 1))  # a grey level each: a flat sky has no steps at all


def _steps_across(mask: npt.NDArray[np.bool_], picture: Pixels) -> npt.NDArray[np.float64]:
    values = picture.astype(np.float64)
    down, right = mask[1:] != mask[:-1], mask[:, 1:] != mask[:, :-1]
    vertical = np.abs(values[1:] - values[:-1]).mean(axis=2)[down]
    horizontal = np.abs(values[:, 1:] - values[:, :-1]).mean(axis=2)[right]
    return np.concatenate((vertical, horizontal))


def frechet_distance(first: npt.NDArray[np.float64], second: npt.NDArray[np.float64]) -> float:
    """Between the normal distributions fitted to two sets of features, (N, D) each (Dowson and Landau 1982)."""
    mean = first.mean(axis=0) - second.mean(axis=0)
    a, b = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
    # tr sqrt(AB) = sum of the roots of the eigenvalues of sqrt(A) B sqrt(A), which is symmetric.
    values, vectors = np.linalg.eigh(a)
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    shared = np.sqrt(np.clip(np.linalg.eigvalsh(root @ b @ root), 0, None)).sum()
    return float(mean @ mean + np.trace(a) + np.trace(b) - 2 * shared)


def bootstrap(values: npt.NDArray[np.float64], seed: int) -> Figure:
    """The mean and the interval that 95 % of means of resampled values fall into. values: (N,)."""
    picks = np.random.default_rng(seed).integers(0, len(values), (RESAMPLES, len(values)))
    low, high = np.quantile(values[picks].mean(axis=1), (0.025, 0.975))
    return Figure(float(values.mean()), float(low), float(high))


def _row(
    name: str,
    kind: HoleKind,
    samples: Sequence[Sample],
    edits: Pixels,
    lpips: npt.NDArray[np.float64],
    frechet: float,
    seed: int,
) -> Row:
    def figure(measure: Any) -> Figure:
        values = [measure(sample.mask, found, sample.image) for sample, found in zip(samples, edits, strict=True)]
        return bootstrap(np.array(values, np.float64), seed)

    return Row(
        model=name,
        hole=kind,
        samples=len(samples),
        lpips=bootstrap(lpips, seed),
        l1=figure(l1_under),
        psnr=figure(psnr_under),
        boundary=figure(boundary_score),
        frechet=frechet,
    )


def _lpips(lpips: Lpips, samples: Sequence[Sample], edits: Pixels) -> npt.NDArray[np.float64]:
    scores = []
    for start in range(0, len(samples), BATCH):
        batch = collate(samples[start : start + BATCH])
        scores.append(lpips(_as_input(edits[start : start + BATCH]), batch.image, batch.mask))
    return torch.cat(scores).double().numpy()


def _features(lpips: Lpips, pictures: Pixels) -> npt.NDArray[np.float64]:
    parts = [lpips.pooled(_as_input(pictures[start : start + BATCH])) for start in range(0, len(pictures), BATCH)]
    return torch.cat(parts).double().numpy()


def _as_input(pictures: Pixels) -> torch.Tensor:
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1


def _contact_sheet(
    root: Path, samples: Sequence[Sample], edits: Mapping[str, Pixels], order: npt.NDArray[np.intp]
) -> Pixels:
    classes = class_table(root / "labels.json")
    return sheet(
        [
            {
                "before": with_hole(samples[index]),
                "labels": layout(samples[index], classes),
                **{name: found[index] for name, found in edits.items()},
                "photo": samples[index].image,
            }
            for index in order
        ]
    )

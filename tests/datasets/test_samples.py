from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from spmdeploy.datasets import samples as dataset
from spmdeploy.datasets.folder import AnnotatedImage
from spmdeploy.datasets.samples import (
    DataConfig,
    ExtraData,
    TrainingSamples,
    collate,
    jitter_color,
    random_crop,
    split_validation,
)
from spmdeploy.errors import InputError
from tests.toy_dataset import COLORS, same, samples, write_data_folder


def test_training_samples_depend_on_seed_and_position_only(data_folder: Path) -> None:
    first, second = samples(data_folder), samples(data_folder)
    backwards = [second.at(position) for position in reversed(range(14))]
    for position, sample in zip(range(14), reversed(backwards), strict=True):
        assert same(first.at(position), sample)
    assert not same(first.at(0), samples(data_folder, seed=1).at(0))
    assert not same(first.at(0), first.at(first.epoch_length))


def test_training_samples_epoch_has_every_image_once(data_folder: Path) -> None:
    drawn = samples(data_folder)
    names = [name for _, name in drawn._epoch(3)]
    assert sorted(names) == [f"{index:03d}" for index in range(6)]
    assert names != [name for _, name in drawn._epoch(4)]


@pytest.mark.parametrize("smallest_scale", [1.0, 0.8])
def test_training_samples_image_and_labels_stay_aligned(data_folder: Path, smallest_scale: float) -> None:
    drawn = samples(data_folder, min_scale=smallest_scale)
    for position in range(12):
        sample = drawn.at(position)
        assert sample.image.shape == (128, 128, 3)
        agree = (np.abs(sample.image.astype(int) - np.array(COLORS)[sample.labels]).max(axis=2) < 3).mean()
        assert agree == 1 if smallest_scale == 1 else agree > 0.9  # shrinking blends along the borders of classes
        assert set(np.unique(sample.instances)) <= {0, 1, 2000}


def test_training_samples_scales_are_within_their_range(data_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Below 1 a crop covers more of the image than it has pixels, above 1 less: the image is enlarged."""
    sides: list[float] = []

    def recorded(annotated: AnnotatedImage, side: int, scale: float, *rest: Any) -> AnnotatedImage:
        sides.append(side / scale)
        return random_crop(annotated, side, scale, *rest)

    monkeypatch.setattr(dataset, "random_crop", recorded)
    drawn = samples(data_folder, min_scale=0.95, max_scale=4.0)
    images = [drawn.at(position).image for position in range(30)]
    assert 128 / 4 <= min(sides) < 50 and 120 < max(sides) <= 128 / 0.95
    assert all(image.shape == (128, 128, 3) for image in images)


def test_training_samples_flips_and_crops_vary(data_folder: Path) -> None:
    drawn = samples(data_folder)
    assert len({drawn.at(position).labels.tobytes() for position in range(30)}) > 20


def test_random_crop_small_image_is_enlarged() -> None:
    annotated = AnnotatedImage(
        np.zeros((50, 90, 3), np.uint8), np.zeros((50, 90), np.uint8), np.zeros((50, 90), np.int32)
    )
    cut = random_crop(annotated, 128, 1.0, False, np.random.default_rng(0))
    assert cut.image.shape == (128, 128, 3)
    assert cut.labels.shape == cut.instances.shape == (128, 128)


def test_color_jitter_changes_training_photos_only(data_folder: Path) -> None:
    plain, jittered = (samples(data_folder, color_jitter=strength) for strength in (0.0, 0.3))
    for position in range(6):
        before, after = plain.at(position), jittered.at(position)
        assert np.array_equal(before.labels, after.labels)
        assert not np.array_equal(before.image, after.image)
    held_out = [
        TrainingSamples(DataConfig(str(data_folder), crop=128, validation=2, color_jitter=s), 0) for s in (0, 0.3)
    ]
    assert all(map(same, *(drawn.validation_samples() for drawn in held_out)))


@given(st.floats(0.01, 1), st.integers(0, 2**32))
def test_jitter_color_is_monotonic_and_bounded(strength: float, seed: int) -> None:
    ramp = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, axis=2)
    changed = jitter_color(ramp, strength, np.random.default_rng(seed))
    assert changed.dtype == np.uint8 and changed.shape == ramp.shape
    assert (np.diff(changed.astype(int), axis=1) >= 0).all()
    brightest = 255 * np.exp(-strength * 4 / 3)  # the weakest gain and the strongest tint against it
    assert (changed[0, 0] == 0).all() and (changed[0, -1] >= np.floor(brightest)).all()


def test_split_validation_neighbors_are_in_neither_part() -> None:
    names = tuple(f"{index:03d}" for index in range(100))
    training, held = split_validation(names, 8, 4)
    assert len(held) == 8
    taken = {int(name) for name in held}
    assert all(abs(int(name) - other) > 1 for name in training for other in taken)
    assert len(training) == 100 - 4 * 4
    assert sum(index + 1 in taken for index in taken) == 4  # four runs of two


def test_split_validation_without_training_images_is_refused() -> None:
    with pytest.raises(InputError, match="2 images are too few"):
        split_validation(("a", "b"), 2, 1)


def test_validation_samples_are_the_same_each_time(data_folder: Path) -> None:
    config = DataConfig(str(data_folder), crop=128, validation=2, validation_blocks=1)
    first, second = TrainingSamples(config, 0), TrainingSamples(config, 0)
    assert first.validation_names == ["002", "003"]
    assert first.epoch_length == 2
    pairs = zip(first.validation_samples(), second.validation_samples(), strict=True)
    assert all(same(one, other) for one, other in pairs)


def test_extra_folder_classes_are_mapped_by_name(data_folder: Path, tmp_path: Path) -> None:
    extra = write_data_folder(tmp_path / "extra", 4, classes=("road", "sky", "lorry"))
    config = DataConfig(
        str(data_folder), crop=128, validation=0, extra=(ExtraData(str(extra), 0.25, {"lorry": "car"}),)
    )
    drawn = TrainingSamples(config, 0)
    assert drawn.epoch_length == 6 + 2
    folder, name = drawn._extra[0][0]
    labels = folder[name].labels
    assert labels[0, 0] == 1  # its class 0 is called road
    assert labels[-1, -1] == 0
    assert 2 in labels
    assert folder[name].instances.max() == 2000


def test_extra_folder_unmapped_class_is_named(data_folder: Path, tmp_path: Path) -> None:
    extra = write_data_folder(tmp_path / "extra", 1, classes=("road", "sky", "lorry"))
    with pytest.raises(InputError, match="class 'lorry' has no counterpart named 'lorry'"):
        TrainingSamples(DataConfig(str(data_folder), validation=0, extra=(ExtraData(str(extra), 0.2),)), 0)


def test_training_samples_class_masks_exclude_void(data_folder: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(data_folder, tmp_path / "copy"))
    table = json.loads((root / "labels.json").read_text())
    (root / "labels.json").write_text(json.dumps(table | {"void_id": 255}))
    for path in (root / "train" / "labels").iterdir():
        labels = np.array(Image.open(path))
        labels[:60] = 255  # most of the sky
        Image.fromarray(labels).save(path)
    drawn = samples(root, mask_kinds=("class",))
    drawn_samples = [drawn.at(position) for position in range(12)]
    assert all(255 not in sample.labels[sample.mask] for sample in drawn_samples)
    assert any(255 in sample.labels for sample in drawn_samples)


def test_collate_images_are_from_minus_one_to_one(data_folder: Path) -> None:
    sample = samples(data_folder).at(0)
    batch = collate([sample, sample])
    assert batch.image.shape == (2, 3, 128, 128)
    assert batch.image[0, :, 5, 7].tolist() == pytest.approx((sample.image[5, 7] / 127.5 - 1).tolist())
    assert set(batch.mask.unique().tolist()) == {0, 1}

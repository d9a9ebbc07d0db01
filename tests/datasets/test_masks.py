from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from spmdeploy.datasets.masks import MASK_KINDS, brush_strokes, connected_components, random_mask
from spmdeploy.datasets.samples import DataConfig, TrainingSamples
from spmdeploy.errors import InputError
from spmdeploy.evaluation.evaluate import evaluation_samples


def street() -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int32]]:
    labels = np.zeros((256, 256), np.uint8)
    labels[128:] = 1
    labels[120:160, 30:90] = 2
    return labels, connected_components(labels, (2,))


def mask_of(kind: str, seed: int) -> npt.NDArray[np.bool_]:
    return random_mask(kind, *street(), 3, np.random.default_rng(seed))


@pytest.mark.parametrize("kind", MASK_KINDS)
def test_random_mask_same_seed_gives_same_mask(kind: str) -> None:
    masks = [mask_of(kind, seed) for seed in range(8)]
    assert all(np.array_equal(mask, mask_of(kind, seed)) for seed, mask in enumerate(masks))
    if kind not in ("extension", "instance"):  # these two have only one answer here
        assert any(not np.array_equal(masks[0], mask) for mask in masks[1:])


@pytest.mark.parametrize("kind", MASK_KINDS)
@given(seed=st.integers(0, 2**32), side=st.sampled_from([16, 64, 128, 256]))
@settings(max_examples=15, deadline=None)
def test_random_mask_is_never_empty_or_full(kind: str, seed: int, side: int) -> None:
    labels, instances = street()
    mask = random_mask(kind, labels[:side, :side], instances[:side, :side], 3, np.random.default_rng(seed))
    assert mask.shape == (side, side)
    assert mask.dtype == np.bool_
    assert mask.any()
    assert not mask.all()


def test_mask_kinds_registered_kind_is_trained_and_evaluated_with(
    data_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """docs/architecture.md: a new kind is a function and an entry of MASK_KINDS."""

    def left_half(labels: Any, instances: Any, classes: int, rng: np.random.Generator) -> npt.NDArray[np.bool_]:
        mask = np.zeros(labels.shape, bool)
        mask[:, : labels.shape[1] // 2] = True
        return mask

    with pytest.raises(InputError, match=r"data\.mask_kinds is 'left'"):
        DataConfig(str(data_folder), mask_kinds=("left",))
    monkeypatch.setitem(MASK_KINDS, "left", left_half)  # type: ignore[arg-type]
    config = DataConfig(str(data_folder), crop=128, validation=0, mask_kinds=("left",))
    trained = TrainingSamples(config, 0).at(0)
    evaluated = evaluation_samples(data_folder, 0, "left", crop=128)[0]
    for sample in (trained, evaluated):
        assert sample.mask[:, :64].all() and not sample.mask[:, 64:].any()


def test_random_mask_extension_is_the_right_half() -> None:
    mask = mask_of("extension", 0)
    assert mask[:, 128:].all()
    assert not mask[:, :128].any()


def test_random_mask_outpainting_keeps_a_box_of_half_the_side() -> None:
    rows, columns = np.nonzero(~mask_of("outpainting", 3))
    assert rows.size == 128 * 128
    assert np.ptp(rows) == np.ptp(columns) == 127


def test_random_mask_class_is_all_of_one_class() -> None:
    labels, _ = street()
    for seed in range(5):
        mask = mask_of("class", seed)
        (only,) = np.unique(labels[mask])
        assert np.array_equal(mask, labels == only)


def test_random_mask_class_is_never_void() -> None:
    """An id outside the class table has no channel: the model would be given no label for such a mask."""
    labels, instances = street()
    labels[:100] = 255
    kinds = {int(np.unique(labels[mask])[0]) for mask in (class_mask(labels, instances, seed) for seed in range(30))}
    assert kinds == {0, 1, 2}
    everywhere = np.full_like(labels, 255)
    everywhere[:5, :5] = 1  # too little to be edited
    strokes_instead = class_mask(everywhere, instances, 0)
    assert not np.array_equal(strokes_instead, everywhere == 255)
    assert 0.02 < strokes_instead.mean() < 1


def class_mask(labels: npt.NDArray[np.uint8], instances: npt.NDArray[np.int32], seed: int) -> npt.NDArray[np.bool_]:
    return random_mask("class", labels, instances, 3, np.random.default_rng(seed))


def test_random_mask_instance_is_the_bounding_box_of_a_thing() -> None:
    rows, columns = np.nonzero(mask_of("instance", 0))
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (120, 159, 30, 89)
    assert rows.size == 40 * 60


def test_random_mask_without_instance_is_strokes() -> None:
    labels = np.zeros((256, 256), np.uint8)
    mask = random_mask("instance", labels, labels.astype(np.int32), 3, np.random.default_rng(1))
    assert 0.02 < mask.mean() < 1


def test_brush_strokes_scale_with_the_image() -> None:
    shares = {
        side: np.mean([brush_strokes(side, side, np.random.default_rng(s)).mean() for s in range(40)])
        for side in (64, 256)
    }
    assert shares[64] == pytest.approx(shares[256], rel=0.15)


@given(arrays.arrays(np.uint8, st.tuples(st.integers(1, 9), st.integers(1, 9)), elements=st.integers(0, 2)))
@settings(max_examples=60, deadline=None)
def test_connected_components_equal_a_flood_fill(labels: npt.NDArray[np.uint8]) -> None:
    found = connected_components(labels, (2,))
    assert np.array_equal(found[labels != 2], labels[labels != 2])
    wanted = flood_fill(labels == 2)
    assert np.array_equal(found[labels == 2], 2000 + wanted[labels == 2])


def flood_fill(region: npt.NDArray[np.bool_]) -> npt.NDArray[np.int32]:
    """8-connected components numbered from 0 in reading order of their first pixel; -1 outside."""
    number = np.full(region.shape, -1, np.int32)
    count = 0
    for start in zip(*np.nonzero(region), strict=True):
        if number[start] >= 0:
            continue
        queue = deque([start])
        number[start] = count
        while queue:
            y, x = queue.popleft()
            for dy in (-1, 0, 1):
                for dx in (-1, 0, 1):
                    near = (y + dy, x + dx)
                    inside = 0 <= near[0] < region.shape[0] and 0 <= near[1] < region.shape[1]
                    if inside and region[near] and number[near] < 0:
                        number[near] = count
                        queue.append(near)
        count += 1
    return number

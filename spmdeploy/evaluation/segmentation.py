"""Label consistency: compares the classes that a segmentation network finds in an edit with the edit's labels.

The user gives the network. The requirements are few, so that almost any exported network meets them:

- an ONNX file with one input, float32 [1 or N, 3, H, W], RGB, in ImageNet's normalization unless the table says
  otherwise; H and W free, or fixed, then images are resized to them;
- its first output are class scores, float [1 or N, C, h, w], at any resolution; the highest score counts;
- a JSON table {"classes": {"7": "road", "8": "sidewalk", ...}} from the network's class number to the name (or id) in
  the data folder's labels.json; several may go to one. Optional: "mean" and "std", three numbers each, for 0..1.

Numbers that are not in the table are never right. Labels without a number (such as void) are not scored.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional as F

from spmdeploy.backends.onnxruntime_graph import import_onnxruntime
from spmdeploy.errors import InputError
from spmdeploy.inputs import regular_file
from spmdeploy.labels import ClassTable
from spmdeploy.serialization import parse_json
from spmdeploy.training.perceptual import IMAGENET_MEAN, IMAGENET_STD

Pixels = npt.NDArray[np.uint8]
Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class SegmenterTable:
    """The JSON table of the network's classes."""

    classes: dict[int, int]
    """The network's class number -> the data folder's id."""
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD


class Segmenter:
    """The user's network, which maps images to ids of the data folder's class table."""

    def __init__(self, network: Path, table: Path, classes: ClassTable) -> None:
        """Raises InputError naming the file, UnavailableError without ONNX Runtime."""
        self.name = network.name
        self._table = read_segmenter_table(table, classes)
        self._classes = len(classes)
        library = import_onnxruntime()
        try:
            content = regular_file(network).read_bytes()
            self._session: Any = library.InferenceSession(content, providers=["CPUExecutionProvider"])
        except Exception as exc:  # onnxruntime raises errors of its own for what is not a graph
            raise InputError(f"{network}: not a network that ONNX Runtime reads: {str(exc)[:200]}") from exc
        self.sha256 = hashlib.sha256(content).hexdigest()
        inputs = self._session.get_inputs()
        if [(given.type, len(given.shape)) for given in inputs] != [("tensor(float)", 4)] or inputs[0].shape[1] != 3:
            found = ", ".join(f"{given.name} {given.type} {given.shape}" for given in inputs)
            raise InputError(
                f"{network}: its inputs are {found}; one of float32 [N, 3, H, W] is needed",
                "export the network with one image as its input and the class scores as its first output",
            )
        self._input = inputs[0].name
        height, width = inputs[0].shape[2:]  # a name or None where it is free
        self._size = (height, width) if isinstance(height, int) and isinstance(width, int) else None

    @property
    def scored_classes(self) -> npt.NDArray[np.bool_]:
        """bool (K,): which ids of the class table the network can predict."""
        scored = np.zeros(self._classes, bool)
        scored[list(self._table.classes.values())] = True
        return scored

    def predict(self, image: Pixels) -> Pixels:
        """Predicts ids: uint8 (H, W, 3), RGB to uint8 (H, W); 255 where the predicted class is not in the table."""
        x = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (self._table.mean, self._table.std))
        if self._size is not None:
            x = F.interpolate(x, size=self._size, mode="bilinear", align_corners=False)
        scores = self._session.run(None, {self._input: ((x - mean) / std).numpy()})[0]
        if scores.ndim != 4 or scores.shape[1] <= max(self._table.classes):
            raise InputError(
                f"{self.name}: its first output has the shape {list(scores.shape)}; "
                f"[N, C, h, w] with C above {max(self._table.classes)} is needed",
                "the table's numbers count the network's score channels from 0",
            )
        full = F.interpolate(
            torch.from_numpy(scores).float(), size=image.shape[:2], mode="bilinear", align_corners=False
        )
        numbers = full[0].argmax(dim=0).numpy()
        lookup = np.full(scores.shape[1], 255, np.uint8)
        for number, label in self._table.classes.items():
            lookup[number] = label
        predicted: Pixels = lookup[numbers]
        return predicted


def read_segmenter_table(path: Path, classes: ClassTable) -> SegmenterTable:
    """Reads which class of a segmentation network stands for which of the model's.

    Raises:
        InputError: Names the file and the entry that is wrong.
    """
    hint = 'write {"classes": {"0": "road", ...}}: the network\'s class number to a name in labels.json'
    try:
        fields = parse_json(regular_file(path).read_bytes())
        names = fields["classes"]
        numbers = {int(number): str(name) for number, name in names.items()}
        if not numbers or min(numbers) < 0:
            raise ValueError(f"classes is {names!r}")
        given = {name: tuple(float(value) for value in fields[name]) for name in ("mean", "std") if name in fields}
        if any(len(values) != 3 for values in given.values()) or 0 in given.get("std", ()):
            raise ValueError(f"mean and std are {given}, expected three numbers each, std not 0")
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as exc:
        raise InputError(f"{path}: not a table of a segmentation network's classes: {exc!r}", hint) from exc
    return SegmenterTable({number: classes.find(name).id for number, name in numbers.items()}, **given)


def confusion_matrix(
    labels: Pixels, predicted: Pixels, mask: npt.NDArray[np.bool_], scored: npt.NDArray[np.bool_]
) -> Counts:
    """Counts the labels under the mask by what was predicted.

    Args:
        labels: uint8 (H, W).
        predicted: uint8 (H, W).
        mask: bool (H, W).
        scored: bool (K,); other labels are left out.

    Returns:
        int64 (K, K + 1), labels by predictions; the last column is for none of them.
    """
    classes = len(scored)
    counted = mask & (labels < classes)
    counted[counted] = scored[labels[counted]]
    rows, columns = labels[counted].astype(np.int64), np.minimum(predicted[counted], classes)
    counts = np.bincount(rows * (classes + 1) + columns, minlength=classes * (classes + 1))
    return counts.reshape(classes, classes + 1)


def accuracy(counts: npt.NDArray[np.float64] | Counts) -> float:
    """Share of the scored pixels that show their label; counts as of `confusion_matrix`. NaN without pixels."""
    total = counts.sum()
    return float(np.trace(counts[:, :-1]) / total) if total else float("nan")


def mean_iou(counts: npt.NDArray[np.float64] | Counts) -> float:
    """Intersection over union, mean over the labels that occur; NaN when none does."""
    square = counts[:, :-1]
    right, wanted = np.diagonal(square), counts.sum(axis=1)
    union = wanted + square.sum(axis=0) - right
    there = wanted > 0
    return float((right[there] / union[there]).mean()) if there.any() else float("nan")

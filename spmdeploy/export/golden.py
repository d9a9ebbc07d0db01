"""Makes the golden edits of a bundle: sample photos at the graph's size with the results of PyTorch in FP32."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from spmdeploy.assets.samples import SAMPLE_EDITS
from spmdeploy.backends.pytorch import TorchSession
from spmdeploy.backends.verify import GoldenSample
from spmdeploy.labels import ClassTable
from spmdeploy.types import NATIVE_SIZE, ModelInput


def golden_edits(reference: TorchSession, table: ClassTable) -> dict[str, GoldenSample]:
    """Return the sample edits by name, cropped to the graph's size around their masks.

    Args:
        reference: The generator in PyTorch, in FP32.
        table: The classes of the generator; labels are translated to it.
    """
    golden = {}
    for sample in SAMPLE_EDITS:
        photo, labels, mask = sample.read(table)
        window = _window_around(mask)
        image, labels, mask = photo[window][None], labels[window][None], mask[window][None]
        inputs = ModelInput(image, labels, labels.astype(np.int32), mask.astype(np.uint8))
        edit = GoldenSample(inputs, reference.run(inputs))
        if reference.refines:
            refined = reference.refine(inputs, edit.coarse)
            edit = replace(edit, refined=np.rint(refined).astype(np.uint8))
        golden[sample.name] = edit
    return golden


def _window_around(mask: NDArray[np.bool_]) -> tuple[slice, slice]:
    """The square of the graph's size whose center is nearest to the mask's."""

    def span(occupied: NDArray[np.bool_]) -> slice:
        places = np.flatnonzero(occupied)
        start = int(np.clip((places[0] + places[-1] + 1 - NATIVE_SIZE) // 2, 0, len(occupied) - NATIVE_SIZE))
        return slice(start, start + NATIVE_SIZE)

    return span(np.any(mask, axis=1)), span(np.any(mask, axis=0))

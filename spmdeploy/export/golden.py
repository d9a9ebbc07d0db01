"""The golden edits of a new bundle: real photos at the graph's size, and what torch in FP32 makes of them."""

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
    """The sample edits, cut to the graph's size around their masks, in the classes of `table`, by name."""
    golden = {}
    for sample in SAMPLE_EDITS:
        photo, labels, mask = sample.read(table)
        window = _window_around(mask)
        image, labels, holes = photo[window][None], labels[window][None], mask[window].astype(np.uint8)[None]
        inputs = ModelInput(image, labels, labels.astype(np.int32), holes)
        pictures = GoldenSample(inputs, reference.run(inputs))
        if reference.refines:
            refined = reference.refine(inputs, pictures.coarse)
            pictures = replace(pictures, refined=np.rint(refined).astype(np.uint8))
        golden[sample.name] = pictures
    return golden


def _window_around(mask: NDArray[np.bool_]) -> tuple[slice, slice]:
    """The square of the graph's size whose center is nearest to the mask's."""

    def span(occupied: NDArray[np.bool_]) -> slice:
        places = np.flatnonzero(occupied)
        start = int(np.clip((places[0] + places[-1] + 1 - NATIVE_SIZE) // 2, 0, len(occupied) - NATIVE_SIZE))
        return slice(start, start + NATIVE_SIZE)

    return span(np.any(mask, axis=1)), span(np.any(mask, axis=0))

"""Random masks and settings for tests by properties."""

from __future__ import annotations

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st

quick = settings(max_examples=60, deadline=None)


@st.composite
def small_masks(draw: st.DrawFn) -> np.ndarray:
    """Noise of any density, from empty to full."""
    shape = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    density = draw(st.sampled_from([0.0, 0.003, 0.03, 0.1, 0.3, 0.6, 0.95, 1.0]))
    return np.random.default_rng(draw(st.integers(0, 2**32 - 1))).random(shape) < density

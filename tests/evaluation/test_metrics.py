from __future__ import annotations

import numpy as np
import pytest

from spmdeploy.evaluation.metrics import boundary_score, frechet_distance, l1_under, psnr_under


def test_l1_and_psnr_count_only_under_the_mask() -> None:
    photo = np.full((8, 8, 3), 100, np.uint8)
    found, mask = photo.copy(), np.zeros((8, 8), bool)
    mask[:4] = True
    found[:2] = 110
    found[4:] = 0
    assert l1_under(mask, found, photo) == 5
    assert psnr_under(mask, found, photo) == pytest.approx(10 * np.log10(255**2 / 50))


def test_boundary_score_depends_on_the_edge_only() -> None:
    photo = np.full((16, 16, 3), 100, np.uint8)
    mask = np.zeros((16, 16), bool)
    mask[4:12, 4:12] = True
    shifted, textured = photo.copy(), photo.copy()
    shifted[mask] = 120
    textured[6:10, 6:10] = 200
    assert boundary_score(mask, shifted, photo) == pytest.approx(21)
    assert boundary_score(mask, textured, photo) == 1


def test_frechet_distance_of_normals_is_the_closed_form() -> None:
    rng = np.random.default_rng(0)
    first = rng.normal(0, 1, (40000, 2))
    second = rng.normal((3, 0), (2, 1), (40000, 2))
    # |difference of means|² + (1 - 2)² + (1 - 1)²
    assert frechet_distance(first, second) == pytest.approx(9 + 1, rel=0.03)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("count", [5, 200])
def test_frechet_distance_equals_the_definition(count: int) -> None:
    """Also with fewer samples than features, where the covariances are singular."""
    rng = np.random.default_rng(count)
    first, second = rng.normal(0, 1, (count, 12)), rng.normal(0.5, 2, (count + 3, 12))
    a, b = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
    roots = np.sqrt(np.linalg.eigvals(a @ b).astype(complex)).real.sum()
    wanted = np.square(first.mean(0) - second.mean(0)).sum() + np.trace(a) + np.trace(b) - 2 * roots
    assert frechet_distance(first, second) == pytest.approx(wanted, rel=1e-4)

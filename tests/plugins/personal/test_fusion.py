"""FDLoRA's search for two weights, without a model."""

from __future__ import annotations

import numpy as np
import pytest
from edged_plugins.personal_lora._fusion import CORNERS, fuse, joined


@pytest.mark.parametrize("best", [(1.0, 0.0), (0.0, 1.0), (0.6, 0.7), (1.3, -0.2), (0.1, 0.1)])
def test_the_search_comes_near_the_best_pair_and_never_below_a_corner(best: tuple[float, float]) -> None:
    seen = []

    def loss(weights: tuple[float, float]) -> float:
        seen.append(weights)
        return (weights[0] - best[0]) ** 2 + (weights[1] - best[1]) ** 2

    weights, found = fuse(loss, 40)
    assert len(seen) == len(set(seen)) <= 40
    assert found == pytest.approx(loss(weights))
    assert found <= min(map(loss, CORNERS[:2]))
    assert np.allclose(weights, best, atol=0.15)


@pytest.mark.parametrize("tries", [3, 4, 5, 7])
def test_no_more_pairs_are_tried_than_asked(tries: int) -> None:
    seen = []
    fuse(lambda weights: seen.append(weights) or sum(weights), tries)
    assert len(seen) == tries


def test_joined_factors_have_no_cross_terms() -> None:
    drawn = np.random.default_rng(0)
    common, personal = ((drawn.standard_normal((2, 5)), drawn.standard_normal((4, 2))) for _ in range(2))
    a, b = joined(common, personal, (0.7, -0.3))
    expected = 0.7 * common[1] @ common[0] - 0.3 * personal[1] @ personal[0]
    np.testing.assert_allclose(b @ a, expected, atol=1e-6)

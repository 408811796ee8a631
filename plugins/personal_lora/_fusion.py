"""FDLoRA's AdaFusion (arXiv:2406.07925): how much of the common adapter and how much of the personal one.

A gradient-free search of (w1, w2) for the least loss on a few rows of the member's own, plus an L1 term. The
paper leaves the search open; this one looks at both corners and a few points between, then steps around the
best along both weights, halving the step where nothing is better. Both adapters alone are candidates, so the
result is no worse than either on these rows. Pure.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Weights = tuple[float, float]
CORNERS: tuple[Weights, ...] = ((1.0, 0.0), (0.0, 1.0), (0.5, 0.5), (1.0, 1.0))
L1 = 0.01
STEP = 0.4


def fuse(loss: Callable[[Weights], float], tries: int) -> tuple[Weights, float]:
    """The best pair of weights of at most `tries` and its loss, the L1 term not in it."""
    seen: dict[Weights, float] = {}

    def price(weights: Weights) -> float:
        if weights not in seen:
            seen[weights] = loss(weights)
        return seen[weights] + L1 * (abs(weights[0]) + abs(weights[1]))

    best = min(CORNERS[:tries], key=price)
    step = STEP
    while len(seen) < tries and step > STEP / 16:
        around = [(best[0] + a, best[1] + b) for a, b in ((step, 0), (-step, 0), (0, step), (0, -step))]
        fresh = [(round(a, 6), round(b, 6)) for a, b in around if (round(a, 6), round(b, 6)) not in seen]
        better = min(fresh[: tries - len(seen)], key=price, default=best)
        if price(better) < price(best):
            best = better
        else:
            step /= 2
    floor = min(seen[corner] for corner in CORNERS[:2])
    if seen[best] > floor:  # the L1 term alone must not make it worse than a corner
        best = min(CORNERS[:2], key=lambda corner: seen[corner])
    return best, seen[best]


def joined(
    common: tuple[np.ndarray, np.ndarray], personal: tuple[np.ndarray, np.ndarray], weights: Weights
) -> tuple[np.ndarray, np.ndarray]:
    """A (2 r, in) and B (out, 2 r) of w1 B_g A_g + w2 B_p A_p: stacked, so without the cross terms that
    weighing the factors would make."""
    a = np.concatenate([common[0], personal[0]])
    b = np.concatenate([weights[0] * common[1], weights[1] * personal[1]], 1)
    return a.astype(np.float32), b.astype(np.float32)

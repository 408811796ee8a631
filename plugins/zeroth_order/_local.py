"""A member's local steps without gradients: MeZO's (arXiv:2305.17333), along FedKSeed's seeds or its own.

A step draws a direction z, measures the slope g of the step's loss along it by central difference, and moves
by -learning_rate g z, in place. Nothing is kept but g: memory is that of inference.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from edged import Download, Factors

from ._aggregators import parameters_of, replayed
from ._seeds import descend, direction, draw, estimate, perturb
from ._stream import Array, key

Loss = Callable[[int], float]
MEZO_SEEDS = 1 << 40  # directions of a member before those of the next


class KSeed:
    """fedkseed: directions of K seeds that everybody has; a round's seeds and slopes are what is sent."""

    def __init__(self, settings: Mapping[str, Any], start: Factors, rank: int) -> None:
        self._start, self._rank = start, rank
        self._seed, self._seeds = int(settings["seed"]), int(settings["seeds"])
        self._rate, self._epsilon = float(settings["learning_rate"]), float(settings["epsilon"])
        self._chances = np.full(self._seeds, 1.0 / self._seeds)

    def begin(self, download: Download) -> Factors:
        extras = download.extras
        if "probabilities" in extras:
            self._chances = np.asarray(extras["probabilities"], np.float64)
        return replayed(self._start, np.asarray(extras["table"]), self._seed, self._rate)

    def train(
        self, steps: range, parameters: Mapping[str, tuple[Array, Array]], loss: Loss
    ) -> dict[str, Array]:
        stream = key(self._seed, f"steps of rank {self._rank} from {steps.start}")
        indices = draw(stream, len(steps), self._chances)
        slopes = np.zeros(len(steps), np.float32)
        for number, (step, index) in enumerate(zip(steps, indices.tolist(), strict=True)):
            slopes[number] = _step(
                parameters, direction(self._seed, index), self._epsilon, self._rate, lambda s=step: loss(s)
            )
        return {"scalars": slopes, "seeds": indices.astype(np.int32)}


class Mezo:
    """mezo: each step along a direction of its own; the factors are what is sent."""

    def __init__(self, settings: Mapping[str, Any], start: Factors, rank: int) -> None:
        self._seed, self._rank = int(settings["seed"]), rank
        self._rate, self._epsilon = float(settings["learning_rate"]), float(settings["epsilon"])

    def begin(self, download: Download) -> Factors:
        return download.factors

    def train(
        self, steps: range, parameters: Mapping[str, tuple[Array, Array]], loss: Loss
    ) -> dict[str, Array]:
        for step in steps:
            along = direction(self._seed, MEZO_SEEDS * (self._rank + 1) + step)
            _step(parameters, along, self._epsilon, self._rate, lambda s=step: loss(s))
        return {}


def _step(
    parameters: Mapping[str, tuple[Array, Array]],
    along: Any,
    epsilon: float,
    learning_rate: float,
    loss: Callable[[], float],
) -> np.float32:
    """One step in place; its slope, in F32: what is sent is what was done."""
    named = parameters_of(parameters)
    slope = np.float32(estimate(loss, lambda scale: perturb(named, along, scale), epsilon))
    descend(named, [(along, float(slope))], learning_rate)
    return slope

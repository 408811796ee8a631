"""A member's local steps without gradients: MeZO's (arXiv:2305.17333), along FedKSeed's seeds or its own.

A step draws a direction z, measures the slope g of the step's loss along it by central difference, and moves
by -learning_rate g z, in place. Nothing is kept but g: memory is that of inference.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from edged import ConfigError, Download, Factors

from ._aggregators import factors_of, parameters_of
from ._seeds import direction, replay, step
from ._stream import Array, key
from ._table import Rebuilt, SeedTable, draw

Loss = Callable[[int], float]


class KSeed:
    """fedkseed: directions of K seeds that everybody has; a round's seeds and slopes are what is sent, or
    where members mask what they send, the sum of slopes for each of K."""

    def __init__(self, settings: Mapping[str, Any], start: Factors, rank: int) -> None:
        self._rank, self._seed = rank, int(settings["seed"])
        self._rate, self._apart = float(settings["learning_rate"]), float(settings["perturbation"])
        named = {name: np.array(array, np.float32) for name, array in parameters_of(start).items()}
        self._rebuilt = Rebuilt(named, self._seed, self._rate)
        self._chances = np.ones(int(settings["seeds"]))
        self._is_masked = bool(settings.get("masked", False))

    def begin(self, download: Download) -> Factors:
        """The start, moved by the table that came."""
        self.take_chances(download.extras)
        return factors_of(self._rebuilt.load(np.asarray(download.extras["table"], np.float32)))

    def train(
        self, steps: range, parameters: Mapping[str, tuple[Array, Array]], loss: Loss
    ) -> dict[str, Array]:
        return self.walk(steps, parameters_of(parameters), loss)

    def take_chances(self, extras: Mapping[str, Any]) -> None:
        """Of a download, where seeds are drawn by amplitude."""
        self._chances = np.asarray(extras.get("probabilities", self._chances), np.float64)

    def walk(self, steps: range, named: Mapping[str, Array], loss: Loss) -> dict[str, Array]:
        """The steps on arrays by name, in place."""
        stream = key(self._seed, f"steps of rank {self._rank} from {steps.start}")
        indices = draw(stream, len(steps), self._chances)
        slopes = [
            _step(named, loss, number, direction(self._seed, index), self._rate, self._apart)
            for number, index in zip(steps, indices.tolist(), strict=True)
        ]
        if self._is_masked:
            sums = np.bincount(indices, slopes, len(self._chances))
            return {"sums": sums.astype(np.float32)}
        return {"scalars": np.array(slopes, np.float32), "seeds": indices.astype(np.uint16)}


class Joined(KSeed):
    """fedkseed in a job of another method: it starts from factors, and sends seeds and slopes."""

    def begin(self, download: Download) -> Factors:
        return download.factors


def replays(settings: Mapping[str, Any], factors: Factors, extras: Mapping[str, Any]) -> Factors:
    """What factors became by a `Joined` member's steps, to F32 rounding; ConfigError where it has none."""
    if extras.keys() != {"scalars", "seeds"}:
        raise ConfigError(f"expected seeds and scalars in an update, got {sorted(extras)}")
    if len(extras["seeds"]) > int(settings["local_steps"]):
        raise ConfigError(f"expected {settings['local_steps']} steps at most, got {len(extras['seeds'])}")
    table = SeedTable(int(settings["seeds"]))
    table.add(extras["seeds"], extras["scalars"])
    made = {name: np.array(array, np.float32) for name, array in parameters_of(factors).items()}
    replay(made, table.sums, int(settings["seed"]), float(settings["learning_rate"]))
    return factors_of(made)


class Mezo:
    """mezo: each step along a direction of its own; the factors are what is sent."""

    def __init__(self, settings: Mapping[str, Any], start: Factors, rank: int) -> None:
        self._rank, self._seed = rank, int(settings["seed"])
        self._rate, self._apart = float(settings["learning_rate"]), float(settings["perturbation"])

    def begin(self, download: Download) -> Factors:
        return download.factors

    def train(
        self, steps: range, parameters: Mapping[str, tuple[Array, Array]], loss: Loss
    ) -> dict[str, Array]:
        named = parameters_of(parameters)
        for number in steps:
            stream = key(self._seed, f"mezo, rank {self._rank}, step {number}")
            _step(named, loss, number, stream, self._rate, self._apart)
        return {}


def _step(
    named: Mapping[str, Array], loss: Loss, number: int, stream: Any, learning_rate: float, apart: float
) -> float:
    return step(lambda: loss(number), named, stream, learning_rate, apart)

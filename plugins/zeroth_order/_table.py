"""The sums of slopes per seed, the weights that they make, and which seed is drawn next."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from edged import ConfigError

from ._seeds import Parameters, replay
from ._stream import Array, Key, words

SLOPE_MAX = 1000.0  # |g| counts at most so much for what a seed is worth


class SeedTable:
    """The sum of slopes for each of K seeds, `sums` (K,) F64: with the start, the whole state of a job."""

    def __init__(self, seeds: int) -> None:
        self.sums = np.zeros(seeds)

    def add(self, indices: Array, scalars: Array, weight: float = 1.0) -> None:
        """Steps, in their order. ConfigError where an index or a scalar cannot be one."""
        indices, scalars = checked_steps(indices, scalars, len(self.sums))
        np.add.at(self.sums, indices, weight * scalars)

    def sent(self) -> Array:
        """What everybody builds weights from, (K,) F32: the sums as multiples of one power of two, the
        spacing of F32 numbers at the largest |sum|.

        Then sum_s G[s] z(s) is exact in F64, in any order: G is at most 2^24 spacings and z 2^5 quarters, so
        for K up to 2^16 all of it is at most 2^45 quarters of a spacing, and F64 has 2^53. All devices have
        the same weights, to the bit, and what a round changed can be added to what was.
        """
        grid = spacing(self.sums)
        return (np.rint(self.sums / grid) * grid).astype(np.float32)

    def state_dict(self) -> dict[str, Array]:
        return {"sums": self.sums.copy()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.sums = _like(self.sums, state["sums"])


class Rebuilt:
    """The weights of a start and the tables that come, at the price of the seeds that changed.

    Keeps F64 totals of all values beside the start. What it makes is what `replay` makes of the last table
    alone, to the bit, for tables of `SeedTable.sent`.
    """

    def __init__(self, start: Parameters, seed: int, learning_rate: float) -> None:
        self._start, self._seed, self._rate = start, seed, learning_rate
        self._restart(0)

    def _restart(self, seeds: int) -> None:
        self._totals = {name: np.zeros(array.shape) for name, array in self._start.items()}
        self._table = np.zeros(seeds, np.float32)

    def load(self, table: Array) -> dict[str, Array]:
        """Fresh F32 arrays, by name, for a table (K,) F32."""
        ratio = spacing(table) / spacing(self._table) if self._table.any() else 1.0
        if len(table) != len(self._table) or not 2.0**-8 <= ratio <= 2.0**8:
            self._restart(len(table))  # F64 has no room for the multiples of both
        replay(self._totals, table.astype(np.float64) - self._table, self._seed, -1.0)
        self._table = table.copy()
        return {
            name: (array - self._rate * self._totals[name]).astype(np.float32)
            for name, array in self._start.items()
        }


def spacing(values: Array) -> float:
    """Of F32 numbers as large as the largest of |values|, a power of two."""
    largest = max(values.max(initial=0.0), -values.min(initial=0.0))
    return 2.0 ** max(math.frexp(largest)[1] - 24, -149)


class Amplitudes:
    """What each seed was worth so far: FedKSeed-Pro's chances of being drawn.

    Source: the paper's section on Pro: p = softmax(minmax(mean |g|)), |g| cut at 1000. A seed not yet drawn
    counts 0, as in the authors' code.
    """

    def __init__(self, seeds: int) -> None:
        self.sums, self.counts = np.zeros(seeds), np.zeros(seeds)

    def add(self, indices: Array, scalars: Array) -> None:
        indices, scalars = checked_steps(indices, scalars, len(self.sums))
        np.add.at(self.sums, indices, np.minimum(np.abs(scalars), SLOPE_MAX))
        np.add.at(self.counts, indices, 1.0)

    def merge(self, others: Amplitudes) -> None:
        self.sums += others.sums
        self.counts += others.counts

    def probabilities(self) -> Array:
        """(K,) F64, sum 1. Its last bits, of exp, are a device's own: send it, or the indices drawn."""
        means = self.sums / np.maximum(self.counts, 1.0)
        low, span = means.min(), np.ptp(means)
        weights = np.exp((means - low) / span if span else np.zeros_like(means))
        return weights / weights.sum()

    def state_dict(self) -> dict[str, Array]:
        return {"sums": self.sums.copy(), "counts": self.counts.copy()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.sums = _like(self.sums, state["sums"])
        self.counts = _like(self.counts, state["counts"])


def draw(stream: Key, count: int, probabilities: Array) -> Array:
    """Indices of `count` steps' seeds, (count,) int64, each with its probability."""
    u = (words(stream, 0, count) >> np.uint64(11)) * 2.0**-53  # [0, 1)
    bounds = np.cumsum(probabilities)
    return np.minimum(np.searchsorted(bounds, u * bounds[-1], side="right"), len(bounds) - 1)


def checked_steps(indices: Any, scalars: Any, seeds: int) -> tuple[Array, Array]:
    """Indices as int64 and scalars as F64, alike in length. ConfigError where they cannot be steps."""
    indices, scalars = np.asarray(indices), np.asarray(scalars)
    if indices.ndim != 1 or indices.shape != scalars.shape:
        raise ConfigError(f"expected a scalar for each seed, got {indices.shape} and {scalars.shape}")
    if indices.size and not (indices.dtype.kind in "iu" and indices.min() >= 0 and indices.max() < seeds):
        raise ConfigError(f"expected seeds from 0 to {seeds - 1}, got {indices.min()} to {indices.max()}")
    scalars = scalars.astype(np.float64)
    if not np.isfinite(scalars).all():
        raise ConfigError("expected finite scalars, got NaN or infinity")
    return indices.astype(np.int64), scalars


def _like(old: Array, new: Any) -> Array:
    new = np.array(new, np.float64)
    if new.shape != old.shape:
        raise ConfigError(f"expected {old.shape} values of a job's state, got {new.shape}")
    return new

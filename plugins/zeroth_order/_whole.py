"""fedkseed on all weights of a model: they are their start and one sum of slopes for each of K directions.

Nothing of the model is kept twice. Whoever runs the model reads a tensor's start again at the beginning of
every round, and `rebuild` moves it by the table, so that what rounding left of a round's steps (each moves
the weights by +1, -2 and +1 epsilon) is forgotten with them. The table's sums are exact in F64 in any order
(`SeedTable.sent`), so that members, and whoever writes the model in the end, have the same bits.

A value's number in a direction is its position in the flat order of the tensors' sorted names: of all of
them, also where one alone is rebuilt.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from edged import ConfigError

from ._local import KSeed, Loss
from ._seeds import positions, replay
from ._stream import Array


class Whole:
    """`WholePart` of fedkseed. `sizes`: values of every tensor of the model, by name."""

    def __init__(self, settings: Mapping[str, Any], sizes: Mapping[str, int], rank: int) -> None:
        self._local = KSeed(settings, {}, rank)
        self._seed, self._rate = int(settings["seed"]), float(settings["learning_rate"])
        self._seeds, self._sizes, self._at = int(settings["seeds"]), dict(sizes), positions(sizes)

    def rebuild(self, name: str, weight: Array, extras: Mapping[str, Any]) -> None:
        """w0 - learning_rate sum_s table[s] z(s), rounded once; `weight` (size,) F32 is w0. It takes as long
        as its values times the seeds whose sum is not 0. ConfigError where the table is not one of K."""
        table = np.asarray(extras.get("table", ()), np.float32)
        if table.shape != (self._seeds,) or not np.isfinite(table).all():
            raise ConfigError(f"expected a finite sum for each of {self._seeds} seeds, got {table.shape}")
        assert weight.shape == (self._sizes[name],), f"{name}: {weight.shape}"
        replay({name: weight}, table, self._seed, self._rate, at=self._at)
        self._local.take_chances(extras)

    def train(self, steps: range, weights: Mapping[str, Array], loss: Loss) -> dict[str, Array]:
        """`KSeed`'s own, over these arrays."""
        assert weights.keys() == self._sizes.keys(), "a direction is of all tensors"
        return self._local.walk(steps, weights, loss)

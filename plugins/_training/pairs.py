"""Batches of rows that are pairs of answers, for a training of preferences."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .._tensors.rows import Batches, Encoded


class Pairs(Batches):
    """As `Batches`, of pairs: a batch has twice as many rows, the chosen ones before the rejected ones."""

    def __init__(self, encoded: Sequence[Encoded], batch_size: int, seed: int, max_length: int = 0) -> None:
        super().__init__(encoded, batch_size, seed, max_length)
        rejected = [row.rejected for row in encoded if row.rejected is not None]
        self._both = Batches([*encoded, *rejected], 1, 0, max_length)

    def of(self, indices: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        return self._both.of([*indices, *(len(self._encoded) + index for index in indices)])

    def positions(self, steps: int) -> list[int]:
        return [self.batch(step)[0].size for step in range(steps)]


def batches_of(rows: Sequence[Encoded], batch_size: int, seed: int, max_length: int) -> Batches:
    """Of rows that are pairs, or of such that are none."""
    is_pairs = bool(rows) and rows[0].rejected is not None
    return (Pairs if is_pairs else Batches)(rows, batch_size, seed, max_length)

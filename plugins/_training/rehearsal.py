"""Rehearsal against forgetting: every batch has a fixed part of rows that are marked to be rehearsed.

Random rehearsal of Popov et al. (arXiv:1712.07473): what a model learnt before is mixed with what it learns
now, in the same proportion in each step. Which rows a step has is a function of (seed, step) alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edged import ConfigError

from .._tensors.rows import Batches, Encoded

APART = 1 << 40  # between the seeds of both orders


def divided(batch_size: int, part: float) -> tuple[int, int]:
    """Rows of a batch that are new, and that are rehearsed: a job's rules say that both are whole."""
    old = round(part * batch_size)
    return batch_size - old, old


def split(rows: Sequence[Encoded]) -> tuple[list[Encoded], list[Encoded]]:
    """New rows, and those to rehearse. ConfigError where one of both is missing."""
    new = [row for row in rows if not row.is_rehearsal]
    old = [row for row in rows if row.is_rehearsal]
    if not new or not old:
        raise ConfigError(
            f'expected rows with "rehearsal": true and others without it; {len(old)} and {len(new)} came',
            remedy="mark some rows of the data set, or leave rehearsal out of the job's file",
        )
    return new, old


class Mixed:
    """Batches of `new` rows of the first `count` of `batches`' rows, then `old` of the rest, in each step.

    Either goes through its rows again and again, in Philox's order of each time; no step has fewer.
    """

    def __init__(self, batches: Batches, sizes: tuple[int, int], each: tuple[int, int], seed: int) -> None:
        self._batches, self._first = batches, sizes[0]
        self._new = _Endless(sizes[0], each[0], seed)
        self._old = _Endless(sizes[1], each[1], seed + APART)

    def indices(self, step: int) -> list[int]:
        """Which rows are in the batch of `step`: new ones first."""
        return [*self._new.indices(step), *(self._first + index for index in self._old.indices(step))]

    def batch(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """As `Batches.batch`."""
        return self._batches.of(self.indices(step))

    def positions(self, steps: int) -> list[int]:
        """As `Batches.positions`."""
        return [self.batch(step)[0].size for step in range(steps)]


class _Endless:
    """`each` of `count` rows in every step, epochs joined to each other."""

    def __init__(self, count: int, each: int, seed: int) -> None:
        one = Encoded(0, np.zeros(1, np.int32), np.zeros(1, np.int32))
        self._whole = Batches([one] * count, count, seed)  # a batch is an epoch
        self._count, self._each = count, each

    def indices(self, step: int) -> list[int]:
        places = range(step * self._each, (step + 1) * self._each)
        return [self._whole.indices(place // self._count)[place % self._count] for place in places]

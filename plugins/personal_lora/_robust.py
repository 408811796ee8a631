"""Aggregates that a few liars cannot move far: `median`, `trimmed-mean` (Yin et al. 2018, 1803.01498) and
`krum` (Blanchard et al. 2017, 1703.02757), on the values of A and B.

They read no weight: a member could lie about it. Every update of a round is kept until its end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from edged import Factors, Member, Update

from ._factors import Array, blocks
from ._mean import Rows
from ._settings import LIARS, TRIM, number


class Robust(Rows):
    """`choose`: n rows (size,), in order of ranks -> (size,) F64."""

    def __init__(
        self,
        method: str,
        least: int,
        choose: Callable[[Sequence[Array]], Array],
        start: Factors,
        members: Sequence[Member],
    ) -> None:
        super().__init__(method, start, members)
        self.least, self._choose = least, choose

    def open(self) -> None:
        self._rows: list[Array] = []

    def take(self, row: Array, weight: float, update: Update) -> None:
        self._rows.append(row.astype(self.layout.dtype))

    def next(self) -> Array:
        return self._choose(self._rows)


def median(rows: Sequence[Array]) -> Array:
    """The middle of each value; of an even number the mean of the two in the middle."""
    return by_columns(rows, lambda part: np.median(part, axis=0))


def trimmed(rows: Sequence[Array], trim: float) -> Array:
    """The mean of each value without its floor(trim n) largest and as many smallest."""
    cut = int(trim * len(rows))
    return by_columns(rows, lambda part: np.sort(part, axis=0)[cut : len(rows) - cut].mean(axis=0))


def krum(rows: Sequence[Array], liars: int) -> Array:
    """The row whose n - liars - 2 nearest others are nearest, by the sum of squared distances; of equals the
    first. Of n >= 2 liars + 3 it is near an honest one."""
    n = len(rows)
    squares = np.zeros((n, n))
    for i in range(n):
        for j in range(i + 1, n):
            apart = rows[i].astype(np.float64) - rows[j]
            squares[i, j] = squares[j, i] = np.einsum("i,i", apart, apart)
    nearest = np.sort(squares, axis=1)[:, 1 : n - liars - 1]  # without itself, at distance 0
    return rows[int(nearest.sum(axis=1).argmin())].astype(np.float64)


def by_columns(rows: Sequence[Array], reduce: Callable[[Array], Array]) -> Array:
    """reduce((n, columns) F64) -> (columns,), a block of columns at a time."""
    made = np.empty(len(rows[0]))
    for part in blocks(len(rows), len(made)):
        made[part] = reduce(np.stack([row[part] for row in rows]).astype(np.float64))
    return made


def load_median(settings: Mapping[str, Any], start: Factors, members: Sequence[Member]) -> Robust:
    return Robust("median", 1, median, start, members)


def load_trimmed(settings: Mapping[str, Any], start: Factors, members: Sequence[Member]) -> Robust:
    trim = number(settings, TRIM)
    return Robust("trimmed-mean", 1, lambda rows: trimmed(rows, trim), start, members)


def load_krum(settings: Mapping[str, Any], start: Factors, members: Sequence[Member]) -> Robust:
    liars = int(number(settings, LIARS))
    return Robust("krum", 2 * liars + 3, lambda rows: krum(rows, liars), start, members)

"""How far what members load is from what they sent: measured by the round loop, of every aggregator alike.

T = sum p s B A over a round's updates is what the round learned of a matrix. What a member makes of its
download is `merged`, its scale in it, and its own scale times B A. The residual is ||made - T|| / ||T||,
Frobenius, in F64; of all matrices and members the largest. Nothing here is known of how a method works.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from edged import Download, Member, Update

from ._factors import Array, Stack, weight_of


class Residual:
    """Fed update by update, then asked. Memory: the updates' factors while the rank of all together is at
    most twice min(in, out) of their matrix, and that matrix from then on, whatever the cohort."""

    def __init__(self) -> None:
        self._sums: dict[str, Stack] = {}
        self._weight = 0.0

    def add(self, update: Update) -> None:
        """With both factors, the frozen one as its member has it. ConfigError for a weight not above 0."""
        weight = weight_of(update)
        self._weight += weight
        for name, (A, B) in update.factors.items():
            total = self._sums.setdefault(name, Stack(A.shape[1], B.shape[0]))
            total.add(weight * update.member.scale, A, B)

    def of(self, downloads: Iterable[tuple[Member, Download]]) -> float:
        """The residual; 0 where T is zero and so is what is made of it, infinite where only T is. NaN before
        any update, and for values that are NaN."""
        if not self._sums:
            return math.nan
        loads = list(downloads)  # held, so that a place in memory means one array
        worst = 0.0
        for name, stack in self._sums.items():
            target = _Target(*stack.pair(1.0 / self._weight))
            seen: set[tuple[Any, ...]] = set()
            for member, download in loads:
                A, B = download.factors[name]
                more = download.merged.get(name)
                place = (member.scale, *map(_place, (A, B, *(more or ()))))
                if place in seen:  # members that load the same memory count once
                    continue
                seen.add(place)
                made = [(member.scale, A, B)] + ([(1.0, *more)] if more else [])
                distance = target.distance(made)
                if math.isnan(distance):
                    return math.nan
                worst = max(worst, distance)
        return worst


def residual(updates: Iterable[Update], downloads: Iterable[tuple[Member, Download]]) -> float:
    """The residual of one round, at once: as `Residual`."""
    meter = Residual()
    for update in updates:
        meter.add(update)
    return meter.of(downloads)


def _place(array: Array) -> tuple[Any, ...]:
    """What two views share when they are of the same values in memory."""
    return (array.__array_interface__["data"][0], array.shape, array.strides, array.dtype.str)


class _Target:
    """T = B A in bases of its own: T = Q core P', so that a distance costs (in + out) R r and no matrix."""

    def __init__(self, A: Array, B: Array) -> None:
        self._Q, Rb = np.linalg.qr(B)
        self._P, Ra = np.linalg.qr(A.T)
        self._core = Rb @ Ra.T
        self._norm = float(np.linalg.norm(self._core))

    def distance(self, made: list[tuple[float, Array, Array]]) -> float:
        """||T - sum s B A|| / ||T||.

        With B = Q C + Qx Rx and A' = P D + Px Sx the difference is, in the bases (Q, Qx) and (P, Px),
        [[core - C D', -C Sx'], [-Rx D', -Rx Sx']]: small things are subtracted before they are squared.
        """
        B = np.concatenate([scale * B.astype(np.float64) for scale, _, B in made], axis=1)
        A = np.concatenate([A.astype(np.float64) for _, A, _ in made]).T
        C, D = self._Q.T @ B, self._P.T @ A
        Rx = np.linalg.qr(B - self._Q @ C, mode="r")
        Sx = np.linalg.qr(A - self._P @ D, mode="r")
        parts = (self._core - C @ D.T, C @ Sx.T, Rx @ D.T, Rx @ Sx.T)
        difference = math.sqrt(sum(float(np.linalg.norm(part)) ** 2 for part in parts))
        if self._norm:
            return difference / self._norm
        return difference if math.isnan(difference) or not difference else math.inf

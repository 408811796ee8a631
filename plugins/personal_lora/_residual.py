"""How far what members load is from what they sent: measured by the round loop, of every aggregator alike.

T = sum p s B A over a round's updates is what the round learned of a matrix. What a member makes of its
download is `merged`, its scale in it, and its own scale times B A. The residual is ||made - T|| / ||T||,
Frobenius, in F64; of all matrices and members the largest. Nothing here is known of how a method works.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from edged import Download, Member, Update

from ._factors import Array, Scratch, Stack, weight_of

BEHIND_MOST = 8  # updates that wait for their sums
Made = Sequence[tuple[float, Array, Array]]  # s, A and B of what a member makes of its download


class Residual:
    """Fed update by update, then asked. Memory: the updates' factors while the rank of all together is not
    far above min(in, out) of their matrix, and that matrix from then on, whatever the cohort.

    Sums are made in a thread of its own, in the order of the updates, while the next one comes; it ends with
    the `with` block. `compute_s`: what that thread took of a processor.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Stack] = {}
        self._scratch = Scratch()
        self._weight = 0.0
        self._thread = ThreadPoolExecutor(1, "residual")
        self._added: deque[Future[float]] = deque()
        self.compute_s = 0.0

    def __enter__(self) -> Residual:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(cancel_futures=True)

    def add(self, update: Update) -> None:
        """With both factors, the frozen one as its member has it. ConfigError for a weight not above 0."""
        weight = weight_of(update)
        self._weight += weight
        self._added.append(self._thread.submit(self._sum, update, weight))
        if len(self._added) > BEHIND_MOST:
            self.compute_s += self._added.popleft().result()

    def _sum(self, update: Update, weight: float) -> float:
        began = time.thread_time()
        for name, (A, B) in update.factors.items():
            total = self._sums.setdefault(name, Stack(A.shape[1], B.shape[0], self._scratch))
            total.add(weight * update.member.scale, A, B)
        return time.thread_time() - began

    def of(self, downloads: Iterable[tuple[Member, Download]]) -> float:
        """The residual; 0 where T is zero and so is what is made of it, infinite where only T is. NaN before
        any update, and for values that are NaN."""
        self.compute_s += sum(each.result() for each in self._added)
        self._added.clear()
        if not self._sums:
            return math.nan
        loads = list(downloads)  # held, so that a place in memory means one array
        worst = 0.0
        for name, stack in self._sums.items():
            target = _target(stack, 1.0 / self._weight)
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
    with Residual() as meter:
        for update in updates:
            meter.add(update)
        return meter.of(downloads)


def _place(array: Array) -> tuple[Any, ...]:
    """What two views share when they are of the same values in memory."""
    return (array.__array_interface__["data"][0], array.shape, array.strides, array.dtype.str)


def _target(stack: Stack, factor: float) -> _Factored | _Written:
    """T, of which bases take 4 (in + out) R^2 operations and the matrix itself 2 in out R."""
    outputs, inputs = stack.shape
    if 2 * (inputs + outputs) * stack.rank > inputs * outputs:
        return _Written(factor * stack.dense())
    return _Factored(*stack.pair(factor))


class _Written:
    """T as the matrix that it is: a distance costs in out r."""

    def __init__(self, T: Array) -> None:
        self._T, self._norm = T, float(np.linalg.norm(T))

    def distance(self, made: Made) -> float:
        """||T - sum s B A|| / ||T||."""
        return _relative(float(np.linalg.norm(self._T - np.matmul(*_joined(made)))), self._norm)


class _Factored:
    """T = B A in bases of its own: T = Q core P', so that a distance costs (in + out) R r and no matrix."""

    def __init__(self, A: Array, B: Array) -> None:
        self._Q, Rb = np.linalg.qr(B)
        self._P, Ra = np.linalg.qr(A.T)
        self._core = Rb @ Ra.T
        self._norm = float(np.linalg.norm(self._core))

    def distance(self, made: Made) -> float:
        """||T - sum s B A|| / ||T||.

        With B = Q C + Qx Rx and A' = P D + Px Sx the difference is, in the bases (Q, Qx) and (P, Px),
        [[core - C D', -C Sx'], [-Rx D', -Rx Sx']]: small things are subtracted before they are squared.
        """
        B, A = _joined(made)
        A = A.T
        C, D = self._Q.T @ B, self._P.T @ A
        Rx = np.linalg.qr(B - self._Q @ C, mode="r")
        Sx = np.linalg.qr(A - self._P @ D, mode="r")
        parts = (self._core - C @ D.T, C @ Sx.T, Rx @ D.T, Rx @ Sx.T)
        difference = math.sqrt(sum(float(np.linalg.norm(part)) ** 2 for part in parts))
        return _relative(difference, self._norm)


def _joined(made: Made) -> tuple[Array, Array]:
    """B (out, R) and A (R, in) in F64, whose product is the sum of all."""
    B = np.concatenate([scale * B.astype(np.float64) for scale, _, B in made], axis=1)
    return B, np.concatenate([A.astype(np.float64) for _, A, _ in made])


def _relative(difference: float, norm: float) -> float:
    if norm:
        return difference / norm
    return difference if math.isnan(difference) or not difference else math.inf

"""Means of products: `flora` stacks them, `flexlora` takes their best rank r. r and alpha may be unlike.

FLoRA (Wang et al. 2024, 2409.05976): the sum of p s B A is a stack, A = [p_k s_k A_k; ...], B = [B_1, ...];
members merge it into their frozen weights, and their adapters begin again with the start's A and B = 0.
FlexLoRA (Bai et al. 2024, 2402.11505): an SVD of the sum; a member of rank r gets B = U_r S_r / s and
A = V_r', and no matrix of rank r is closer to the sum (Eckart and Young 1936).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from edged import ConfigError, Download, Factors, Member, PolicyViolation, Update

from ._factors import (
    Array,
    Stack,
    check_start,
    check_update,
    first_ranks,
    packed,
    read_only,
    svd_of_product,
    unpacked,
    weight_of,
)

Pairs = dict[str, tuple[Array, Array]]


class Products:
    """A round over sums of products; what is made of them is the method's."""

    def __init__(self, method: str, start: Factors, members: Sequence[Member]) -> None:
        check_start(start)
        self.method = method
        self.start: Pairs = {n: (read_only(start[n][0]), read_only(start[n][1])) for n in sorted(start)}
        self.r = len(self.start[min(self.start)][0])
        self.scale = max(members, key=lambda m: (m.r, -m.rank)).scale if members else 1.0
        self.dtype = np.result_type(*(one for pair in start.values() for one in pair))
        self._check(members)
        self._open(0)

    def frozen(self, round: int) -> str:
        return ""

    def begin(self, round: int, members: Sequence[Member]) -> None:
        self._check(members)
        self._open(round)

    def add(self, update: Update) -> None:
        weight = weight_of(update)
        self._check([update.member])
        check_update(update, self.start)
        for name, stack in self._sums.items():
            A, B = update.factors[name]
            stack.add(weight * update.member.scale, A, B)
        self._weight += weight

    def finish(self) -> None:
        if not self._weight:
            raise PolicyViolation(
                f"{self.method}: expected 1 updates or more in round {self._round}, got 0",
                remedy="wait for more members",
            )
        made = {}
        for name in self.start:  # one after another: in F64 all would take twice what came
            A, B = self._sums.pop(name).pair(1.0 / self._weight)
            made[name] = _rounded(self.cut(name, A, B), self.dtype)
        self._open(self._round)
        if not all(np.isfinite(one).all() for pair in made.values() for one in pair):
            raise PolicyViolation(
                f"{self.method}: expected a finite sum in round {self._round}",
                remedy="bound what members count for: weight_most",
            )
        self.use(made)

    def cut(self, name: str, A: Array, B: Array) -> tuple[Array, Array]:
        """What is kept of a module's sum p s B A, which came as a pair in F64."""
        raise NotImplementedError

    def use(self, made: Pairs) -> None:
        """The next state."""
        raise NotImplementedError

    def _open(self, round: int) -> None:
        self._round, self._weight = round, 0.0
        self._sums = {n: Stack(A.shape[1], B.shape[0]) for n, (A, B) in self.start.items()}

    def _check(self, members: Sequence[Member]) -> None:
        for member in members:
            if not 1 <= member.r <= self.r:
                raise ConfigError(
                    f"{self.method}: expected r of 1 to {self.r} of rank {member.rank}, got {member.r}",
                    remedy="start the job from factors of the largest r of any member",
                )


class Stacking(Products):
    """flora. `merged` of a download is the last round's alone; who missed one needs all: `adapter`."""

    def __init__(self, start: Factors, members: Sequence[Member]) -> None:
        super().__init__("flora", start, members)
        self._last: Pairs = {}
        self._all: Pairs = {}
        self._again: Pairs = {n: (A, read_only(np.zeros_like(B))) for n, (A, B) in self.start.items()}

    def cut(self, name: str, A: Array, B: Array) -> tuple[Array, Array]:
        return A, B

    def use(self, made: Pairs) -> None:
        self._last = made
        for name, (A, B) in self._last.items():
            stack = Stack(A.shape[1], B.shape[0])
            if name in self._all:
                stack.add(1.0, *self._all[name])
            stack.add(1.0, A, B)
            self._all[name] = _rounded(stack.pair(), self.dtype)

    def download(self, member: Member) -> Download:
        return Download(first_ranks(self._again if self._last else self.start, member.r), self._last)

    def adapter(self) -> dict[str, tuple[Array, Array, float]]:
        if not self._all:
            return {n: (A, B, self.scale) for n, (A, B) in self.start.items()}
        return {n: (A, B, 1.0) for n, (A, B) in self._all.items()}

    def state_dict(self) -> dict[str, Array]:
        return {**packed("last", self._last), **packed("all", self._all)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        names = list(self.start) if state else []
        self._last, self._all = unpacked("last", state, names), unpacked("all", state, names)


class Singular(Products):
    """flexlora. Its state: A = V' and B = U S of the sum's largest r values, scale 1."""

    def __init__(self, start: Factors, members: Sequence[Member]) -> None:
        super().__init__("flexlora", start, members)
        self._hold({})

    def use(self, made: Pairs) -> None:
        self._hold(made)

    def download(self, member: Member) -> Download:
        if not self._best:
            return Download(first_ranks(self.start, member.r))
        if member.scale not in self._scaled:  # one copy for all members of a scale
            self._scaled[member.scale] = {
                n: (A, self._for(B, member.scale)) for n, (A, B) in self._best.items()
            }
        return Download(first_ranks(self._scaled[member.scale], member.r))

    def adapter(self) -> dict[str, tuple[Array, Array, float]]:
        if not self._best:
            return {n: (A, B, self.scale) for n, (A, B) in self.start.items()}
        return {n: (A, read_only(self._for(B, self.scale)), self.scale) for n, (A, B) in self._best.items()}

    def state_dict(self) -> dict[str, Array]:
        return packed("best", self._best)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._hold(unpacked("best", state, list(self.start) if state else []))

    def _hold(self, best: Pairs) -> None:
        self._best = best
        self._scaled: dict[float, Pairs] = {}

    def _for(self, B: Array, scale: float) -> Array:
        return (B.astype(np.float64) / scale).astype(self.dtype)

    def cut(self, name: str, A: Array, B: Array) -> tuple[Array, Array]:
        """Rank r. Where the sum has fewer, the start's rows of A fill up, with B = 0: they can learn."""
        U, S, Vt = svd_of_product(A, B)
        U, S, Vt = U[:, : self.r], S[: self.r], Vt[: self.r]
        rest = self.start[name][0][len(S) :]
        return np.concatenate([Vt, rest]), np.pad(U * S, ((0, 0), (0, len(rest))))


def _rounded(pair: tuple[Array, Array], dtype: Any) -> tuple[Array, Array]:
    A, B = pair
    return read_only(A.astype(dtype)), read_only(B.astype(dtype))


def load_flora(settings: Mapping[str, Any], start: Factors, members: Sequence[Member]) -> Stacking:
    return Stacking(start, members)


def load_flexlora(settings: Mapping[str, Any], start: Factors, members: Sequence[Member]) -> Singular:
    return Singular(start, members)

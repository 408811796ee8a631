"""Means of factors: `fedavg`, `fedprox`, `ffa`; and the round that every method on rows of values shares.

Plain averaging (FedIT, Zhang et al. 2023, 2305.05644) takes the mean of A and of B apart. The product
of two means is not the mean of products, which the round loop's residual shows. FFA-LoRA (Sun et al. 2024,
2403.12313) keeps the start's A for all rounds; a mean of B alone is exact. FedProx (Li et al. 2020,
1812.06127) is plain averaging whose members add mu (P - P_loaded) to their gradient.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from edged import Download, Factors, Member, PolicyViolation, Update

from . import _settings
from ._factors import Array, Layout, blocks, check_alike, check_update, packed, unpacked, weight_of


class Rows:
    """A round over factors as one row of values each; all members of one r and scale.

    What a method changes: `take` (what it does with a row) and `next` (what the next row is). The state
    changes in `finish` alone, so a round that is given up leaves no trace.
    """

    least = 1  # updates without which there is no round
    _spare: Array | None = None  # a row that `take` has done with: fresh memory costs as much as a sum

    def __init__(self, method: str, start: Factors, members: Sequence[Member]) -> None:
        self.layout = Layout(start)
        self.method, self.scale = method, members[0].scale if members else 1.0
        self.r = self.layout.shapes[self.layout.names[0]][0][0]
        check_alike(method, members, self.r)
        self._use(self.layout.flat(start, self.layout.dtype))
        self.round, self.count, self.weight = 0, 0, 0.0
        self.open()

    def frozen(self, round: int) -> str:
        return ""

    def begin(self, round: int, members: Sequence[Member]) -> None:
        check_alike(self.method, members, self.r)
        self.round, self.count, self.weight = round, 0, 0.0
        self.open()

    def add(self, update: Update) -> None:
        frozen, weight = self.frozen(self.round), weight_of(update)
        check_alike(self.method, [Member(-1, self.r, self.scale), update.member], self.r)
        check_update(update, self.factors, frozen)
        factors = {
            name: (own[0] if frozen == "A" else sent[0], own[1] if frozen == "B" else sent[1])
            for name, own, sent in ((n, self.factors[n], update.factors[n]) for n in self.layout.names)
        }
        row, self._spare = self.layout.flat(factors, out=self._spare), None
        self.take(row, weight, update)
        self.count, self.weight = self.count + 1, self.weight + weight

    def finish(self) -> None:
        if self.count < self.least:
            raise PolicyViolation(
                f"{self.method}: expected {self.least} updates or more in round {self.round}, "
                f"got {self.count}",
                remedy="wait for more members",
            )
        row, frozen = self.next(), self.frozen(self.round)
        if frozen:
            row = np.where(self.layout.is_of(frozen), self.row, row)  # not a bit of it moves
        self.open()
        self._use(row)

    def download(self, member: Member) -> Download:
        return Download(self.factors)

    def adapter(self) -> dict[str, tuple[Array, Array, float]]:
        return {name: (A, B, self.scale) for name, (A, B) in self.factors.items()}

    def state_dict(self) -> dict[str, Array]:
        return packed("factors", self.factors)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._use(self.layout.flat(unpacked("factors", state, self.layout.names), self.layout.dtype))

    def open(self) -> None:
        """Forget the updates of a round."""
        raise NotImplementedError

    def take(self, row: Array, weight: float, update: Update) -> None:
        raise NotImplementedError

    def next(self) -> Array:
        raise NotImplementedError

    def _use(self, row: Array) -> None:
        self.factors = self.layout.factors(row)

    @property
    def row(self) -> Array:
        """What members have, (size,) F64."""
        return self.layout.flat(self.factors)


class Mean(Rows):
    """sum p_k P_k over rows, in F64; one row is kept whatever the cohort."""

    def open(self) -> None:
        self._sum: Array | None = None

    def take(self, row: Array, weight: float, update: Update) -> None:
        if self._sum is None:
            row *= weight
            self._sum = row
            return
        for part in blocks(2, row.size):  # both stay near the processor
            row[part] *= weight
            self._sum[part] += row[part]
        self._spare = row

    def next(self) -> Array:
        assert self._sum is not None
        return self._sum / self.weight


class Prox(Mean):
    """fedprox. In a download's extras: "mu", a number."""

    def __init__(self, mu: float, start: Factors, members: Sequence[Member]) -> None:
        super().__init__("fedprox", start, members)
        self._mu = np.array(mu)

    def download(self, member: Member) -> Download:
        return Download(self.factors, extras={"mu": self._mu})


class FrozenA(Mean):
    """ffa. A is the start's for good: an update's is not even read."""

    def frozen(self, round: int) -> str:
        return "A"


def load_fedavg(settings: Mapping[str, Any], start: Factors, members: Sequence[Member]) -> Mean:
    return Mean("fedavg", start, members)


def load_fedprox(settings: Mapping[str, Any], start: Factors, members: Sequence[Member]) -> Prox:
    return Prox(_settings.number(settings, _settings.MU), start, members)


def load_ffa(settings: Mapping[str, Any], start: Factors, members: Sequence[Member]) -> FrozenA:
    return FrozenA("ffa", start, members)

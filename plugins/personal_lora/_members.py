"""Methods that know their members: `scaffold`, and `mira`, whose members each have an adapter of their own.

SCAFFOLD (Karimireddy et al. 2020, 1910.06378, option II): members' local steps are corrected by c - c_k, the
mean of all members' gradients less their own; x += eta mean(D), c += sum of the changes of c_k / N. MIRA
(2410.15524): P_k -= eta lambda sum_l a_kl (P_k - P_l) over the round's members, so that neighbours in a graph
stay near one another and nobody's adapter is everybody's. Neither reads weights: both are of equal members.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from edged import ConfigError, Download, Factors, Member, Update

from ._factors import Array, blocks, kept
from ._mean import Mean, Rows
from ._settings import PLAIN_RATE, PULL, graph_of, number, server_learning_rate


class Scaffold(Mean):
    """In a download's extras "control", c (size,), modules by name, A before B; in an update's "control" the
    change of the member's own c_k, which it keeps."""

    def __init__(self, eta: float, start: Factors, members: Sequence[Member]) -> None:
        super().__init__("scaffold", start, members)
        self._eta, self._members = eta, max(1, len(members))
        self._control = np.zeros(self.layout.size)
        self._publish()

    def open(self) -> None:
        super().open()
        self._change = 0.0

    def take(self, row: Array, weight: float, update: Update) -> None:
        change = update.extras.get("control")
        if np.shape(change) != (self.layout.size,):
            raise ConfigError(
                f"scaffold: expected the change of {self.layout.size} controls of rank {update.member.rank}, "
                f"got {np.shape(change)}",
                remedy="send extras.control as the member's part of the method makes it",
            )
        self._change = self._change + np.asarray(change, np.float64)
        super().take(row, 1.0, update)

    def next(self) -> Array:
        row = self.row
        self._control = self._control + self._change / self._members
        self._publish()
        return row + self._eta * (self._sum / self.count - row)

    def download(self, member: Member) -> Download:
        return Download(self.factors, extras={"control": self._sent})

    def state_dict(self) -> dict[str, Array]:
        return {**super().state_dict(), "control": self._control.copy()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._control = kept(state, "control")
        self._publish()

    def _publish(self) -> None:
        self._sent = self._control.astype(self.layout.dtype)
        self._sent.flags.writeable = False


class Graph(Rows):
    """mira. A pull is in parts of the largest that is stable, halved: 1 on a complete graph is the mean.
    A member outside a round keeps what it has; one that was never in any has the start. `adapter`, for
    everybody: the mean of all."""

    def __init__(self, pull: float, graph: str, start: Factors, members: Sequence[Member]) -> None:
        super().__init__("mira", start, members)
        self._pull, self._graph = pull, graph
        self._own: dict[int, dict[str, tuple[Array, Array]]] = {}

    def open(self) -> None:
        self._came: dict[int, Array] = {}

    def take(self, row: Array, weight: float, update: Update) -> None:
        self._came[update.member.rank] = row.astype(self.layout.dtype)

    def next(self) -> Array:
        ranks = sorted(self._came)
        step = step_of(laplacian(self._graph, len(ranks)), self._pull)
        rows = [self._came[rank] for rank in ranks]
        for part in blocks(len(rows), self.layout.size):
            pulled = step @ np.stack([row[part] for row in rows]).astype(np.float64)
            for row, values in zip(rows, pulled, strict=True):
                row[part] = values
        for rank, row in zip(ranks, rows, strict=True):
            self._own[rank] = self.layout.factors(row)
        return self.row

    def download(self, member: Member) -> Download:
        return Download(self._own.get(member.rank, self.factors))

    def adapter(self) -> dict[str, tuple[Array, Array, float]]:
        if not self._own:
            return super().adapter()
        total = np.zeros(self.layout.size)
        for rank in sorted(self._own):
            total += self.layout.flat(self._own[rank])
        mean = self.layout.factors(total / len(self._own))
        return {name: (A, B, self.scale) for name, (A, B) in mean.items()}

    def state_dict(self) -> dict[str, Array]:
        rows = {f"member.{k}": self.layout.flat(f, self.layout.dtype) for k, f in self._own.items()}
        return {"ranks": np.array(list(self._own), np.int64), **rows}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        ranks = [int(number) for number in kept(state, "ranks")]
        self._own = {rank: self.layout.factors(kept(state, f"member.{rank}")) for rank in ranks}


def laplacian(graph: str, count: int) -> Array:
    """(count, count): degrees less weights, of a complete graph or a ring, all weights 1."""
    weights = np.ones((count, count)) - np.eye(count)
    if graph == "ring":
        places = np.arange(count)
        apart = np.abs(places[:, None] - places)
        weights = ((apart == 1) | (apart == count - 1)) * 1.0
    return np.diag(weights.sum(axis=1)) - weights


def step_of(L: Array, pull: float) -> Array:
    """I - pull / lambda_max L: what one pull makes of all members' rows."""
    most = np.linalg.eigvalsh(L)[-1] if len(L) > 1 else 1.0
    return np.eye(len(L)) - pull / most * L


def load_scaffold(settings: Mapping[str, Any], start: Factors, members: Sequence[Member]) -> Scaffold:
    return Scaffold(number(settings, server_learning_rate(PLAIN_RATE)), start, members)


def load_mira(settings: Mapping[str, Any], start: Factors, members: Sequence[Member]) -> Graph:
    return Graph(number(settings, PULL), graph_of(settings), start, members)

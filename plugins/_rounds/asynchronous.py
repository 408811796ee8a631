"""Servers that wait for nobody: a buffer of pushes with staleness weights, and delayed Nesterov. Pure.

A push is what a member's local steps added, theta_local - theta_base, as a flat array, with the revision of
the theta it began at and its turn: how many of the member's pushes counted before it. A fence decides whether
it counts. All is F64, and a function of the order of pushes: the state of a server goes on bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from edged import ConfigError, ProtocolError

NEARLY = 1e-9  # a rounded product is not one step less than it is
FUTURE, STALE, REPLAY = "update-future", "update-stale", "update-replay"
SHAPE, NAN, WEIGHT = "update-shape", "update-nan", "update-weight"
CODES = (FUTURE, STALE, REPLAY, SHAPE, NAN, WEIGHT)


class Fence:
    """Which pushes count: of a revision that the server made, not too old, and each turn of a member once.

    A member that is fast pushes again from the same revision, by other rows: its turn tells that from a
    replay. `revision`: the server's; `refused`: how many by code. What is kept is a number for each member.
    """

    def __init__(self, staleness_most: int) -> None:
        if staleness_most < 0:
            raise ConfigError(f"expected a staleness of at least 0 revisions, got {staleness_most}")
        self.staleness_most = staleness_most
        self.revision = 0
        self.refused = dict.fromkeys(CODES, 0)
        self._turns: dict[int, int] = {}

    def turn(self, member: int) -> int:
        """Of the member's next push: how many counted."""
        return self._turns.get(member, 0)

    def staleness(self, member: int, turn: int, baseline: int) -> int:
        """Revisions since `baseline`. ProtocolError, by name and counted, for a push that must not count."""
        staleness, expected = self.revision - baseline, self.turn(member)
        if turn < expected:
            raise self.refusal(REPLAY, member, f"of turn {turn} counted before; the next is {expected}")
        if turn > expected:
            raise self.refusal(FUTURE, member, f"is of turn {turn}; the next is {expected}")
        if staleness < 0:
            raise self.refusal(FUTURE, member, f"began at revision {baseline}; the newest is {self.revision}")
        if baseline < 0 or staleness > self.staleness_most:
            raise self.refusal(
                STALE, member, f"began {staleness} revisions ago; at most {self.staleness_most} are allowed"
            )
        return staleness

    def passed(self, member: int) -> None:
        self._turns[member] = self.turn(member) + 1

    def advance(self) -> None:
        self.revision += 1

    def refusal(self, code: str, member: int, why: str) -> ProtocolError:
        self.refused[code] += 1
        return ProtocolError(f"the push of member {member} {why}", code=code)

    def checked(self, member: int, delta: Any, size: int) -> np.ndarray:
        """delta (size,) as F64. ProtocolError, counted, for another shape or what is not finite."""
        values: np.ndarray = np.asarray(delta, np.float64)
        if values.shape != (size,):
            raise self.refusal(SHAPE, member, f"has the shape {values.shape}; expected ({size},)")
        if not np.isfinite(values).all():
            raise self.refusal(NAN, member, "has values that are not finite")
        return values

    def state_dict(self) -> dict[str, np.ndarray]:
        return {
            "revision": np.array(self.revision, np.int64),
            "turns": np.array(sorted(self._turns.items()), np.int64).reshape(-1, 2),
            "refused": np.array([self.refused[code] for code in CODES], np.int64),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.revision = int(state["revision"])
        self._turns = {int(member): int(turn) for member, turn in state["turns"]}
        self.refused = dict(zip(CODES, map(int, state["refused"]), strict=True))


class Buffered:
    """FedBuff (Nguyen et al. 2022, "Federated learning with buffered asynchronous aggregation", AISTATS):
    after every `size` pushes

        theta += lr sum(w_i delta_i) / sum(w_i),    w_i = weight_i / sqrt(1 + staleness_i)

    Divided by the number of pushes instead, as some do, the step would shrink with staleness, and so would
    the learning rate that was asked for. `theta`, `revision`: what a member begins at.
    """

    def __init__(self, theta: np.ndarray, size: int, lr: float = 1.0, staleness_most: int = 10) -> None:
        if size < 1:
            raise ConfigError(f"expected a buffer of at least 1 push, got {size}")
        self.theta = np.array(theta, np.float64).reshape(-1)
        self.size = size
        self.lr = lr
        self.fence = Fence(staleness_most)
        self._sum = np.zeros_like(self.theta)
        self._weight = 0.0
        self._count = 0

    @property
    def revision(self) -> int:
        return self.fence.revision

    def push(self, member: int, turn: int, baseline: int, delta: Any, weight: float = 1.0) -> bool:
        """delta (n,): is there a new revision? ProtocolError (update-...), counted, for a push that must not
        count; nothing has changed then."""
        staleness = self.fence.staleness(member, turn, baseline)
        delta = self.fence.checked(member, delta, self.theta.size)
        if not 0 < weight < math.inf:
            raise self.fence.refusal(WEIGHT, member, f"has the weight {weight}; expected one above 0")
        w = weight / math.sqrt(1 + staleness)
        self.fence.passed(member)
        self._sum += w * delta
        self._weight += w
        self._count += 1
        if self._count < self.size:
            return False
        self.theta += self.lr / self._weight * self._sum
        self._sum[:] = 0
        self._weight, self._count = 0.0, 0
        self.fence.advance()
        return True

    def state_dict(self) -> dict[str, np.ndarray]:
        """Arrays, from which `load_state_dict` of one with the same settings goes on bit for bit."""
        return {
            "theta": self.theta.copy(),
            "sum": self._sum.copy(),
            "weight": np.array(self._weight),
            "count": np.array(self._count, np.int64),
            **self.fence.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.theta = _like(self.theta, state["theta"])
        self._sum = _like(self.theta, state["sum"])
        self._weight, self._count = float(state["weight"]), int(state["count"])
        self.fence.load_state_dict(state)


class DelayedNesterov:
    """Liu et al. 2024, "Asynchronous Local-SGD Training for Language Modeling" (2401.09135), algorithm 3.
    Every push makes a revision. With g = -delta, for pushes 1, 2, ... and every Nth of them:

        theta -= lr (g / N + c beta m)
        Nth:  m = beta m + (sum of the last N g) / N;  theta -= lr (g / N + (1 - c N + c) beta m)

    With c = 0 the moves of N pushes add up to one step of Nesterov's momentum on the mean of their g. c in
    [0, 1 / N] spreads the momentum: the window then has (N - 1) c of the old one's and the rest of the new
    one's. N should not be below the number of members.
    """

    def __init__(
        self,
        theta: np.ndarray,
        N: int,
        *,
        lr: float = 0.7,
        beta: float = 0.9,
        c: float = 0.0,
        staleness_most: int = 10,
    ) -> None:
        if N < 1 or not 0 <= beta < 1 or not 0 <= c <= 1 / N:
            raise ConfigError(f"expected N >= 1, 0 <= beta < 1 and 0 <= c <= 1 / N, got {N}, {beta} and {c}")
        self.theta = np.array(theta, np.float64).reshape(-1)
        self.N, self.lr, self.beta, self.c = N, lr, beta, c
        self.fence = Fence(staleness_most)
        self._m = np.zeros_like(self.theta)
        self._sum = np.zeros_like(self.theta)
        self._count = 0

    @property
    def revision(self) -> int:
        return self.fence.revision

    def push(self, member: int, turn: int, baseline: int, delta: Any, weight: float = 1.0) -> bool:
        """delta (n,): True, as there is a new revision. Its weight is not looked at. ProtocolError as
        `Buffered.push`."""
        self.fence.staleness(member, turn, baseline)
        g = -self.fence.checked(member, delta, self.theta.size)
        self.fence.passed(member)
        self._sum += g
        self._count += 1
        share = self.c
        if self._count == self.N:
            self._m = self.beta * self._m + self._sum / self.N
            self._sum[:] = 0
            self._count = 0
            share = 1 - self.c * self.N + self.c
        self.theta -= self.lr * (g / self.N + share * self.beta * self._m)
        self.fence.advance()
        return True

    def state_dict(self) -> dict[str, np.ndarray]:
        """As `Buffered.state_dict`."""
        return {
            "theta": self.theta.copy(),
            "m": self._m.copy(),
            "sum": self._sum.copy(),
            "count": np.array(self._count, np.int64),
            **self.fence.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.theta = _like(self.theta, state["theta"])
        self._m = _like(self.theta, state["m"])
        self._sum = _like(self.theta, state["sum"])
        self._count = int(state["count"])
        self.fence.load_state_dict(state)


def local_steps(H: int, speeds: Mapping[int, float], percentile: float = 90.0) -> dict[int, int]:
    """Dynamic local updates (DyLU) of the same paper: floor(H v / v_p), at least 1, of each rank with v steps
    a second; v_p: that percentile of all, interpolated.

    Then all take the time H / v_p, within one step of their own, but those that are too slow for one.
    ConfigError for a speed that is no number above 0.
    """
    if H < 1 or not 0 <= percentile <= 100:
        raise ConfigError(f"expected steps and a percentile, got {H} and {percentile}")
    if not all(0 < speed < math.inf for speed in speeds.values()):
        raise ConfigError("expected speeds above 0, in steps a second")
    if not speeds:
        return {}
    fast = float(np.percentile(list(speeds.values()), percentile))
    return {rank: max(1, math.floor(H * (speed / fast) + NEARLY)) for rank, speed in speeds.items()}


def _like(theta: np.ndarray, stored: Any) -> np.ndarray:
    array = np.array(stored, np.float64)
    if array.shape != theta.shape:
        raise ConfigError(f"expected a state of {theta.size} values, got {array.shape}")
    return array

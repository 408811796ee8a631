"""Server optimisers on the mean change of factors: `fedavgm`, `fedadagrad`, `fedadam`, `fedyogi`, `fdlora`.

D = sum p_k (P_k - P), P being what members loaded, is a step against a gradient. FedAvgM (Hsu et al. 2019,
1909.06335): v = beta v + D; P += eta v. FedAdagrad, FedAdam, FedYogi (Reddi et al. 2021, 2003.00295,
algorithm 2): m = beta1 m + (1 - beta1) D; v by the square of D, not of m; P += eta m / (sqrt(v) + tau),
with v = tau^2 before the first round and no correction of bias. The server's part of FDLoRA (2406.07925),
as DiLoCo's (2311.08105), is Nesterov: v = beta v + D; P += eta (D + beta v).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from edged import Factors, Member

from ._factors import Array, kept
from ._mean import Mean
from ._settings import (
    ADAPTIVE_RATE,
    BETA1,
    BETA2,
    MOMENTUM,
    OUTER_RATE,
    PLAIN_RATE,
    TAU,
    number,
    server_learning_rate,
)


class Momentum:
    """v = beta v + D. The step is eta v, or, looking ahead as Nesterov, eta (D + beta v)."""

    def __init__(self, eta: float, beta: float, is_nesterov: bool = False) -> None:
        self._eta, self._beta, self._is_nesterov = eta, beta, is_nesterov

    def start(self, size: int) -> dict[str, Array]:
        return {"v": np.zeros(size)}

    def step(self, kept: Mapping[str, Array], change: Array) -> tuple[Array, dict[str, Array]]:
        v = self._beta * kept["v"] + change
        return self._eta * (change + self._beta * v if self._is_nesterov else v), {"v": v}


class Adaptive:
    """A step of its own length for each value. `rule`: "adagrad", "adam" or "yogi"."""

    def __init__(self, rule: str, eta: float, beta1: float, beta2: float, tau: float) -> None:
        self._rule, self._eta, self._beta1, self._beta2, self._tau = rule, eta, beta1, beta2, tau

    def start(self, size: int) -> dict[str, Array]:
        return {"m": np.zeros(size), "v": np.full(size, self._tau**2)}

    def step(self, kept: Mapping[str, Array], change: Array) -> tuple[Array, dict[str, Array]]:
        m = self._beta1 * kept["m"] + (1 - self._beta1) * change
        v, square = kept["v"], change * change
        if self._rule == "adagrad":
            v = v + square
        elif self._rule == "adam":
            v = self._beta2 * v + (1 - self._beta2) * square
        else:
            v = v - (1 - self._beta2) * square * np.sign(v - square)
        return self._eta * m / (np.sqrt(v) + self._tau), {"m": m, "v": v}


class Optimised(Mean):
    """The mean of a round's factors is where the optimiser is pointed, not where it goes."""

    def __init__(
        self, method: str, optimiser: Momentum | Adaptive, start: Factors, members: Sequence[Member]
    ) -> None:
        super().__init__(method, start, members)
        self._optimiser = optimiser
        self._kept = optimiser.start(self.layout.size)

    @property
    def origin(self) -> Array:
        """What members' changes are counted from, (size,) F64: what they loaded."""
        return self.row

    def next(self) -> Array:
        step, self._kept = self._optimiser.step(self._kept, super().next() - self.origin)
        return self.row + step

    def state_dict(self) -> dict[str, Array]:
        return {
            **super().state_dict(),
            **{f"optimiser.{name}": one.copy() for name, one in self._kept.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._kept = {name: kept(state, f"optimiser.{name}") for name in self._kept}


def adaptive(rule: str, settings: Mapping[str, Any]) -> Adaptive:
    eta, tau = number(settings, server_learning_rate(ADAPTIVE_RATE)), number(settings, TAU)
    return Adaptive(rule, eta, number(settings, BETA1), number(settings, BETA2), tau)


def load_fedavgm(settings: Mapping[str, Any], start: Factors, members: Sequence[Member]) -> Optimised:
    eta = number(settings, server_learning_rate(PLAIN_RATE))
    return Optimised("fedavgm", Momentum(eta, number(settings, MOMENTUM)), start, members)


def load_fedadagrad(settings: Mapping[str, Any], start: Factors, members: Sequence[Member]) -> Optimised:
    return Optimised("fedadagrad", adaptive("adagrad", settings), start, members)


def load_fedadam(settings: Mapping[str, Any], start: Factors, members: Sequence[Member]) -> Optimised:
    return Optimised("fedadam", adaptive("adam", settings), start, members)


def load_fedyogi(settings: Mapping[str, Any], start: Factors, members: Sequence[Member]) -> Optimised:
    return Optimised("fedyogi", adaptive("yogi", settings), start, members)


def load_fdlora(settings: Mapping[str, Any], start: Factors, members: Sequence[Member]) -> Optimised:
    eta = number(settings, server_learning_rate(OUTER_RATE))
    return Optimised("fdlora", Momentum(eta, number(settings, MOMENTUM), is_nesterov=True), start, members)

"""Secret Gaussian noise, and an accountant of what it leaves to be learnt of smashed data (`smashed`).

A client sends s' = s min(1, C / |s|) + N(0, (sigma C)^2) for each sample, |s| over everything it sends of
it. This is the Gaussian mechanism on one sample's smashed data (DisLLM, CNS 2024; Dwork and Roth 2014,
appendix A), composed over the steps by opacus' accountant (Renyi differential privacy).

What an epsilon here says: from all noisy smashed data sent of a row, a server can hardly tell that row from
an empty one (zeros in its place); e^epsilon bounds the ratio of probabilities, up to delta. To tell any two
rows apart is up to 2 C of distance: that has the epsilon of half the sigma.

What it does not say anything about:
- labels, which label-sharing sends in clear; gradients that a U-shaped client sends up; an adapter that is
  sent to be averaged;
- what the adapter remembers of the rows, and so whoever receives it may learn. Through the client's own
  adapter, later smashed data of other rows depends on a row as well; only a client that trains nothing
  before the cut is covered whole;
- rows that are evaluated: each evaluation sends them once more and counts as another release.

Epsilons that protect well cost much accuracy: the noise has sigma C in each of S x d numbers, so that its
norm is sigma sqrt(S d) times the clipped signal's.
"""

from __future__ import annotations

import functools
import hashlib
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from edged import ConfigError, PluginError

# A clipped row in F32 has a norm of at most C for sure: two roundings of 2^-24 are less than this.
SHRINK = 1 - 2.0**-22
STEPS_MOST = 2**31 - 1
# Orders of Renyi divergence: opacus' own, with more at both ends for very small and very large epsilons.
ORDERS = (
    1.001,
    1.01,
    1.05,
    *(1 + x / 10 for x in range(1, 100)),
    *range(12, 64),
    80,
    128,
    256,
    512,
    1024,
    4096,
)


def normal(secret: bytes, said: bytes, count: int) -> np.ndarray:
    """(count,) float64 of N(0, 1), a function of a secret and of what it is drawn for, by SHAKE-256."""
    half = -(-count // 2)
    made = hashlib.shake_256(len(secret).to_bytes(8, "little") + secret + said)
    bits = np.frombuffer(made.digest(16 * half), "<u8") >> np.uint64(11)
    uniform = (bits + 1.0) * 2.0**-53  # in (0, 1]
    radius, angle = np.sqrt(-2 * np.log(uniform[:half])), 2 * np.pi * uniform[half:]
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]


def sigma_of_one_release(epsilon: float, delta: float) -> float:
    """sqrt(2 ln(1.25 / delta)) / epsilon: noise for a single release (Dwork and Roth 2014, theorem A.1).

    It is proven for an epsilon below 1; ConfigError for others.
    """
    _check_delta(delta)
    if not 0 < epsilon < 1:
        raise ConfigError(f"epsilon: this formula holds between 0 and 1, got {epsilon}")
    return math.sqrt(2 * math.log(1.25 / delta)) / epsilon


@dataclass(frozen=True)
class Budget:
    """The epsilon that a run may spend at `delta`, with noise `sigma` on batches of `batch` out of `rows`.

    `sampling`: "epochs" is what `rows.Batches` does. Each row is sent once an epoch, and a server that
    sees every row's data on its own learns when; so each release counts in full. "poisson" is for a client
    that draws every row with probability batch / rows in every step and does not show which it drew: then
    being drawn rarely protects too (Mironov, Talwar and Zhang 2019, "the sampled Gaussian mechanism").
    """

    epsilon: float
    delta: float
    sigma: float
    batch: int
    rows: int
    sampling: Literal["epochs", "poisson"] = "epochs"

    def __post_init__(self) -> None:
        _check_delta(self.delta)
        if not 0 < self.epsilon < math.inf:
            raise ConfigError(f"epsilon: expected a number above 0, got {self.epsilon}")
        if not 0 <= self.sigma < math.inf:
            raise ConfigError(f"sigma: expected a number of at least 0, got {self.sigma}")
        if self.batch < 1 or self.rows < 1:
            raise ConfigError(f"expected batches of rows, got {self.batch} of {self.rows}")
        if self.sampling not in ("epochs", "poisson"):
            raise ConfigError(f'sampling: expected "epochs" or "poisson", got {self.sampling!r}')

    def spent(self, steps: int) -> float:
        """Epsilon after that many steps, for the row sent most often; infinite without noise."""
        if steps <= 0:
            return 0.0
        if not self.sigma:
            return math.inf
        if self.sampling == "epochs":
            return _composed(self.sigma, 1.0, -(-steps // self._epoch_steps), self.delta)
        return _composed(self.sigma, min(1.0, self.batch / self.rows), steps, self.delta)

    def steps_allowed(self) -> int:
        """How many steps the budget is enough for."""
        return _steps_allowed(self)

    @property
    def _epoch_steps(self) -> int:
        return -(-self.rows // self.batch)


@functools.lru_cache(maxsize=64)  # a run asks before every evaluation; a worker has a few budgets
def _steps_allowed(budget: Budget) -> int:
    """By bisection: what is spent grows with the steps."""
    least, most = 0, 1
    while most < STEPS_MOST and budget.spent(most) <= budget.epsilon:
        least, most = most, 2 * most
    while most - least > 1:
        middle = (least + most) // 2
        if budget.spent(middle) <= budget.epsilon:
            least = middle
        else:
            most = middle
    return least


def _composed(sigma: float, rate: float, times: int, delta: float) -> float:
    accountant = _accountant()()
    accountant.history = [(sigma, rate, times)]
    with warnings.catch_warnings():
        # opacus warns at the first and last order that another might be better; the bound holds all the same
        warnings.filterwarnings("ignore", "Optimal order is the", UserWarning)
        return float(accountant.get_epsilon(delta, alphas=list(ORDERS)))


def _accountant() -> Callable[[], Any]:
    """Loaded where it is needed: it takes a second, and most runs have no budget."""
    try:
        from opacus.accountants import RDPAccountant
    except ImportError as error:
        raise PluginError(
            f"a privacy budget needs opacus: {error}", remedy="pip install 'edged[train]'"
        ) from error
    return RDPAccountant


def _check_delta(delta: float) -> None:
    if not 0 < delta < 1:
        raise ConfigError(f"delta: expected a probability between 0 and 1, got {delta}")

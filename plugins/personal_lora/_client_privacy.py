"""What a federated job's noise costs each client, and the rules of its keys. Pure; the daemon reads it, too.

DP-FedAvg (McMahan et al. 2018, 1710.06963): each client's change is cut to a norm of C = `client_clip` over
all values that it trains, and the server adds N(0, (sigma C)^2), sigma = `client_noise`, to each value of the
sum of the changes. The sum is divided by the number of clients that were drawn, whoever of them answered.

Neighbours are two jobs that differ in one client: in one of them its changes are all zero, as if it had no
rows. Then the sum moves by C at most. To replace a client's rows by any others moves it by up to 2 C: that
has the epsilon of half the sigma.

The accountant is exact: rounds of Gaussian noise, each chosen after the one before, are together as hard to
see through as one with mu = sqrt(rounds) / sigma (Dong, Roth and Su 2019, 1905.02383, corollary 3.3), and
    delta(epsilon) = Phi(mu/2 - epsilon/mu) - e^epsilon Phi(-mu/2 - epsilon/mu)
(Balle and Wang 2018, 1805.06530, theorem 8). Who is drawn is a function of the job's seed, which everybody
knows, so being drawn rarely protects only by being counted rarely: a round counts for those drawn in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from edged import AggregatorEntry

from .._training import file

ROUNDS_MOST = 1 << 31
FAR = 25.0  # from here on the normal tail is bounded, since erfc leaves the normal numbers


def delta_of(mu: float, epsilon: float) -> float:
    """The smallest delta of mu > 0 at epsilon >= 0; never too small but for rounding."""
    x, y = mu / 2 + epsilon / mu, epsilon / mu - mu / 2  # phi(y) = e^epsilon phi(x)
    density = math.exp(-y * y / 2) / math.sqrt(2 * math.pi)
    return math.erfc(y / math.sqrt(2)) / 2 - density * _mills(x)


def epsilon_of(sigma: float, rounds: float, delta: float) -> float:
    """Epsilon at delta in (0, 1) after so many rounds with noise sigma; infinite without noise."""
    if rounds <= 0:
        return 0.0
    if sigma <= 0:
        return math.inf
    mu = math.sqrt(rounds) / sigma
    most = mu * mu / 2 + mu * math.sqrt(2 * math.log(1 / delta))  # by Renyi divergence: enough for sure
    return _least(lambda epsilon: delta_of(mu, epsilon) <= delta, most)


def sigma_for(epsilon: float, delta: float, rounds: float) -> float:
    """The least noise with which so many rounds spend no more than epsilon."""
    most = 1.0
    while epsilon_of(most, rounds, delta) > epsilon:
        most *= 2
    return _least(lambda sigma: sigma > 0 and epsilon_of(sigma, rounds, delta) <= epsilon, most)


def rounds_allowed(sigma: float, epsilon: float, delta: float) -> int:
    """How many rounds of one client the budget is enough for."""
    if epsilon_of(sigma, 1, delta) > epsilon:
        return 0
    least, most = 1, 2
    while most < ROUNDS_MOST and epsilon_of(sigma, most, delta) <= epsilon:
        least, most = most, 2 * most
    while most - least > 1:
        middle = (least + most) // 2
        least, most = (middle, most) if epsilon_of(sigma, middle, delta) <= epsilon else (least, middle)
    return least


def over_budget(job: Any, rounds: int) -> str:
    """Why a client may not be drawn so many times; "" where it may, or there is no budget."""
    epsilon, delta, sigma = job.client_epsilon, job.client_delta, job.client_noise
    if not epsilon or epsilon_of(sigma, rounds, delta) <= epsilon:
        return ""
    return (
        f"client_epsilon {epsilon:g} at client_delta {delta:g} allows "
        f"{rounds_allowed(sigma, epsilon, delta)} rounds of one client with client_noise {sigma:g}; "
        f"{rounds} would spend {epsilon_of(sigma, rounds, delta):.4g}, and need client_noise "
        f"{sigma_for(epsilon, delta, rounds):.4g}"
    )


def rules(aggregators: Mapping[str, AggregatorEntry], job: Any) -> list[file.Rule]:
    """Of the keys client_*; the first that does not hold is named."""
    asked = job.client_clip > 0
    bounds: list[file.Rule] = [
        (0 <= job.client_clip <= 1e6, f"client_clip from 0 to 1e6; {job.client_clip!r} came"),
        (0 <= job.client_noise <= 1e6, f"client_noise from 0 to 1e6; {job.client_noise!r} came"),
        (0 <= job.client_epsilon <= 1e6, f"client_epsilon from 0 to 1e6; {job.client_epsilon!r} came"),
        (
            1e-15 <= job.client_delta < 1,
            f"client_delta from 1e-15 to below 1; {job.client_delta!r} came",
        ),
        (asked or not (job.client_noise or job.client_epsilon), "client_clip above 0 with client_noise"),
        (
            job.client_noise > 0 or not job.client_epsilon,
            "client_noise above 0 with client_epsilon: without it nothing is private",
        ),
    ]
    if not asked:
        return bounds
    sums = sorted(name for name, entry in aggregators.items() if entry.is_sum and not entry.local)
    clients = range(len(job.clients))
    drawn = math.ceil(job.fraction * len(job.clients))
    least = -(-job.rounds * drawn // max(1, len(job.clients)))  # one client is drawn so often for sure
    why = over_budget(job, least) if all(rule[0] for rule in bounds) else ""
    return [
        *bounds,
        (
            job.method in sums,
            f"with client_clip a method that needs no more than the sum of factors: {', '.join(sums)}; "
            f"{job.method} does",
        ),
        (
            not any(job.joins(rank) for rank in clients),
            "the job's method of every client with client_clip: a change of another kind has no norm here",
        ),
        (
            not any(client.weight for client in job.clients),
            "no weight of a client with client_clip: all count alike, or the noise would hide some less",
        ),
        (
            not job.masked,
            "masked = false with client_clip: the server could not cut the change of a member that lies",
        ),
        (not why, f"a job within its budget: {why}"),
    ]


def _least(holds: Callable[[float], bool], most: float) -> float:
    """The end of a bisection of [0, most] at which `holds` is true."""
    least = 0.0
    if holds(least):
        return least
    for _ in range(200):
        middle = (least + most) / 2
        if middle in (least, most):
            break
        least, most = (least, middle) if holds(middle) else (middle, most)
    return most


def _mills(x: float) -> float:
    """Phi(-x) / phi(x), x > 0; far out a lower bound of it."""
    if x > FAR:
        return x / (1 + x * x)
    return math.erfc(x / math.sqrt(2)) / 2 * math.sqrt(2 * math.pi) * math.exp(x * x / 2)

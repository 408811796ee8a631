"""The battery of a device that harvests energy, as a semi-Markov chain, and the load that it bears.

Source: Khoshsirat, Perin, Rossi, "Decentralized LLM inference over edge networks with energy harvesting"
(arXiv:2408.15907), equations 1 to 6. Time goes in slots, energy in whole units. A device takes one job at
a time; below `low` it saves (takes no work, a pending job waits) until it has more than `high`. The state is
(busy, energy, active) at the end of a stage; a stage lasts one slot, or a job's slots while one runs.
Numerical: for a process of its own, never the daemon.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

RISK = 0.01  # of the time at the reserve or below: what the source aims at
UNITS = 100  # of a battery
SUN = 0.318  # mean of half a sine over half the day: 1 / pi
ROOT_STEPS = 24  # of bisection: the arrival rate to 1e-7


@dataclass(frozen=True, slots=True)
class Mode:
    """A power mode: what one job takes, in slots and in units of energy; a part of a unit is taken as often
    as it is large."""

    slots: int
    energy: float


@dataclass(frozen=True, slots=True)
class Harvester:
    """`harvest`: probability of 0, 1, 2, ... units a slot. `modes`: (fraction of the battery from which it
    applies, mode), ascending, the first from 0."""

    capacity: int
    low: int
    high: int
    harvest: tuple[float, ...]
    modes: tuple[tuple[float, Mode], ...]

    def mode(self, energy: int) -> Mode:
        return [mode for above, mode in self.modes if energy >= above * self.capacity][-1]


@dataclass(frozen=True, slots=True)
class LongRun:
    """Long-run figures at one arrival rate. `risk`: of the time, at `limit` units or less; `saving`: of the
    time, saving power; `jobs_per_slot`; `energy`: time average in units; `slots_per_job`."""

    risk: float
    saving: float
    jobs_per_slot: float
    energy: float
    slots_per_job: float


def long_run(device: Harvester, arrival: float, limit: int | None = None) -> LongRun:
    """The stationary figures where a job arrives in a slot with probability `arrival`.

    `limit`: energy that counts as risk (default: `device.low`). ValueError outside [0, 1].
    """
    if not 0 <= arrival <= 1:
        raise ValueError(f"expected an arrival probability from 0 to 1; {arrival} came")
    limit = device.low if limit is None else limit
    size = device.capacity + 1
    law = _stationary(_transitions(device, arrival)).reshape(2, 2, size)  # (busy, active, energy)
    slots = np.ones((2, 2, size))
    slots[1, 1] = [device.mode(energy).slots for energy in range(size)]
    time = law * slots
    time /= time.sum()
    running = law[1, 1]
    jobs = running.sum() / (law * slots).sum()
    per_job = (running * slots[1, 1]).sum() / running.sum() if running.sum() else 0.0
    energies = np.arange(size)
    return LongRun(
        risk=float(time[:, :, : limit + 1].sum()),
        saving=float(time[:, 0].sum()),
        jobs_per_slot=float(jobs),
        energy=float((time * energies).sum()),
        slots_per_job=float(per_job),
    )


def bearable(device: Harvester, risk: float, limit: int | None = None) -> float:
    """The arrival rate at which the long-run risk is `risk`, or the device always busy (equation 5)."""
    at = 1.0
    if long_run(device, 1.0, limit).risk > risk:
        below, above = 0.0, 1.0
        for _ in range(ROOT_STEPS):
            at = (below + above) / 2
            if long_run(device, at, limit).risk > risk:
                above = at
            else:
                below = at
        at = below
    slots = long_run(device, at, limit).slots_per_job
    return min(at, 1 / slots) if slots else at


def fit(devices: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The arrival rate that each device bears, by name, at RISK; devices as `edged.scenario.Simulated`."""
    kinds = {device["name"]: harvester(device) for device in devices}
    rates = {kind: _rate(kind) for kind in set(kinds.values())}
    return {name: rates[kind] for name, kind in kinds.items()}


def _rate(device: Harvester) -> float:
    """What it bears; a battery that nothing fills bears no job in the long run."""
    is_filled = len(device.harvest) > 1 or all(mode.energy == 0 for _, mode in device.modes)
    return bearable(device, RISK) if is_filled else 0.0


def harvester(device: Mapping[str, Any], units: int = UNITS) -> Harvester:
    """A described battery in whole units; one on mains bears whatever time allows."""
    capacity = device["capacity_joules"]
    modes = device["modes"]
    if not capacity:
        return Harvester(1, 0, 0, (1.0,), tuple((0.0, Mode(mode["slots"], 0)) for mode in modes[-1:]))
    unit = capacity / units
    low, high = (max(0.0, each - device["idle_joules"]) / unit for each in device["harvest_joules"])
    scale = SUN if device["is_solar"] else 1.0
    return Harvester(
        units,
        round(device["reserve"] * units),
        round(device["resume"] * units),
        even_law(low * scale, high * scale),
        tuple((mode["above"], Mode(mode["slots"], mode["joules"] / unit)) for mode in modes),
    )


def even_law(low: float, high: float) -> tuple[float, ...]:
    """Probabilities of 0, 1, 2, ... units with the mean of an even law between two bounds: what lies between
    two units counts for both, by how near it is."""
    if high < 1e-6:
        return (1.0,)
    if high - low < 1e-6:
        low, high = max(0.0, low - 1e-6), low + 1e-6
    units = np.arange(math.ceil(high) + 1)

    def below(bound: float) -> np.ndarray:
        """The integral, up to `bound`, of what a point gives to each unit."""
        x = np.clip(bound - units, -1, 1)
        return np.where(x < 0, (x + 1) ** 2 / 2, 1 - (1 - x) ** 2 / 2)

    law = (below(high) - below(low)) / (high - low)
    return tuple((law / law.sum()).tolist())


def _transitions(device: Harvester, arrival: float) -> np.ndarray:
    """Stage to stage, (4 * size, 4 * size); a state's index is (busy, active, energy)."""
    size = device.capacity + 1
    matrix = np.zeros((2, 2, size, 2, 2, size))
    for energy in range(size):
        gained = _after(device, energy, 1, 0)
        mode = device.mode(energy)
        spent = _after(device, energy, mode.slots, mode.energy)
        again = 1 - (1 - arrival) ** mode.slots
        for busy, probability in ((0, 1 - arrival), (1, arrival)):
            matrix[0, 1, energy, busy, 1] = gained * probability
        awake = np.arange(size) > device.high
        for busy in (0, 1):  # it saves: nothing arrives, and what waits goes on waiting
            matrix[busy, 0, energy, busy, 0] = gained * ~awake
            matrix[busy, 0, energy, busy, 1] = gained * awake
        active = np.arange(size) >= device.low
        for busy, probability in ((0, 1 - again), (1, again)):
            matrix[1, 1, energy, busy, 0] = spent * ~active * probability
            matrix[1, 1, energy, busy, 1] = spent * active * probability
    return matrix.reshape(4 * size, 4 * size)


def _after(device: Harvester, energy: int, slots: int, spent: float) -> np.ndarray:
    """The law of the energy after so many slots of harvest and a job's cost (equation 1), clipped."""
    gained = _harvested(device.harvest, slots)
    whole = math.floor(spent)
    law = np.zeros(device.capacity + 1)
    for units, chance in ((whole, 1 - (spent - whole)), (whole + 1, spent - whole)):
        if chance:
            reached = np.clip(energy + np.arange(len(gained)) - units, 0, device.capacity)
            law += chance * np.bincount(reached, weights=gained, minlength=device.capacity + 1)
    return law


@functools.lru_cache(maxsize=64)  # few laws and modes, asked for every energy
def _harvested(harvest: Sequence[float], slots: int) -> np.ndarray:
    law = np.ones(1)
    for _ in range(slots):
        law = np.convolve(law, harvest)
    return law


def _stationary(matrix: np.ndarray) -> np.ndarray:
    """The law that the chain keeps, begun idle and full: over the states that it can reach."""
    size = len(matrix)
    start = size // 4 * 2 - 1  # (0, active, full)
    reached = np.zeros(size, bool)
    reached[start] = True
    while True:
        further = reached | (matrix[reached].sum(axis=0) > 0)
        if (further == reached).all():
            break
        reached = further
    system = matrix[np.ix_(reached, reached)].T - np.eye(reached.sum())
    system[-1] = 1  # one of the balances follows from the others; this says that it is a law
    target = np.zeros(len(system))
    target[-1] = 1
    law = np.zeros(size)
    law[reached] = np.linalg.solve(system, target).clip(0)
    return law / law.sum()

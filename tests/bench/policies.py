"""Scheduling policies in simulation: 20 seeds of 300 runs each, means with 95 % intervals. Needs no network.

- The setting of arXiv:2408.15907 (`harvest`): part of the time that devices save power, under uniform,
  long-term and adaptive, at arrival rates of 0.7, 0.5 and 0.3. In that order at 0.7, all apart; uniform above
  both at the others, where long-term and adaptive are at least not reversed beyond their intervals.
- Uneven batteries: time to the first empty one, `battery-balance` over `latency`; at least 1.3.
- The bandit: regret after 10^3, 10^4 and 10^5 jobs over the root of their number, which must fall, and how
  well a logarithm and a root fit the regret (sums of squares; the logarithm's must be less).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from _record import Record, quick
from edged_plugins import energy
from edged_plugins.energy._semi_markov import fit

from edged import config, simulation
from edged.planning import CORE_POLICIES
from edged.scenario import PowerMode, Scenario, Simulated
from edged.types import Policy

PROFILES = Path(__file__).parents[2] / "profiles" / "scenarios"
SEEDS, RUNS = quick(2, 20), quick(3, 300)
ARRIVALS = (0.7, 0.5, 0.3)
NAMES = ("uniform", "long-term", "adaptive")
JOBS = quick((10, 100), (1000, 10_000, 100_000))
STUDENT = 2.093  # of 19 degrees of freedom, 95 %


def main(out: Path | None = None) -> dict[str, Any]:
    record = Record("policies", out)
    for arrival in ARRIVALS:
        for name in NAMES:
            row = f"harvest, {name} at {arrival:g}"
            if not record.has(row):
                record.put(row, **_interval(_downtimes(name, arrival)))
    _lives(record)
    _regret(record)
    return record.done()


def _policy(name: str) -> Policy:
    """A fresh one: the bandit of another run has learnt."""
    found = {policy.name: policy for policy in (*CORE_POLICIES, *energy.edged_policies({}))}
    return found[name]


def _downtimes(name: str, arrival: float) -> list[float]:
    scenario = config.read_table(PROFILES / "harvest.toml", Scenario)
    scenario = dataclasses.replace(scenario, arrival=arrival, runs=RUNS)
    policy = _policy(name)
    rates = fit([dataclasses.asdict(device) for device in scenario.devices]) if policy.fit else {}
    return [simulation.run(scenario, policy, seed, rates).downtime for seed in range(SEEDS)]


def _interval(values: Sequence[float]) -> dict[str, Any]:
    mean = statistics.mean(values)
    half = STUDENT * statistics.stdev(values) / math.sqrt(len(values))
    return {"seeds": len(values), "runs": RUNS, "mean": mean, "low": mean - half, "high": mean + half}


def _lives(record: Record) -> None:
    """Three phones that share every job, at 90, 60 and 30 %."""
    phones = tuple(
        Simulated(
            f"phone at {percent} %", (PowerMode(1, 2e3),), 1, "all", 50e3, percent / 100, reserve=0, resume=0
        )
        for percent in (90, 60, 30)
    )
    scenario = Scenario("phones", phones, 1.0, slots=400, sharing="all", runs=SEEDS)
    balance = next(p for p in energy.edged_policies({"reserve": 0.0}) if p.name == "battery-balance")
    lives = [simulation.run(scenario, policy, 0).first_dead_slots for policy in (_policy("latency"), balance)]
    ratios = [after / before for before, after in zip(*lives, strict=True) if before and after]
    record.put("uneven batteries, battery-balance over latency", life=min(ratios), target=1.3)


def _regret(record: Record) -> None:
    places = tuple(
        Simulated(name, (PowerMode(1, joules),), joules_noise=0.3)
        for name, joules in (("edge", 80.0), ("desk", 100.0), ("cloud", 120.0))
    )
    scenario = Scenario("places", places, 1.0, slots=JOBS[-1])
    curves = [simulation.run(scenario, _policy("bandit"), seed).regret for seed in range(min(SEEDS, 5))]
    jobs = [point[0] for point in curves[0]]
    regret = [statistics.mean(curve[i][1] for curve in curves) for i in range(len(jobs))]
    at = [float(np.interp(count, jobs, regret)) / math.sqrt(count) for count in JOBS]
    fits = {}
    for name, shape in (("log", np.log(jobs)), ("sqrt", np.sqrt(jobs))):
        columns = np.stack([shape, np.ones(len(jobs))], axis=1)
        scale, *_ = np.linalg.lstsq(columns, np.array(regret), rcond=None)
        fits[name] = float(np.sum((columns @ scale - regret) ** 2))
    record.put(
        "bandit's regret",
        jobs=list(JOBS),
        over_root=at,
        falls=all(b < a for a, b in itertools.pairwise(at)),
        squares_log=fits["log"],
        squares_sqrt=fits["sqrt"],
    )

"""Policies that live within batteries, heat and carbon: which priced plan to take, and when.

Provides `uniform`, `long-term`, `adaptive` (who gets the next job, by what the batteries bear),
`battery-balance` (shares that drain batteries together), `bandit` (learns which place costs least) and
`round-robin` (each node in turn, the quick ones more often).

It does not know prices: it chooses among plans that the core has priced and allowed. It does not read
sensors (`monitor` does), and changes no power mode.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edged import Candidate, ConfigError, NodeView, Outcome, Policy, Situation, hookimpl

from . import _bandit, _round_robin, _weights

FIT = "edged_plugins.energy._semi_markov:fit"
HORIZON = 1.10  # plans within a tenth of the least time are equals, of which the batteries may choose


@dataclass(frozen=True, slots=True)
class Settings:
    """`[plugin.energy]` of a profile."""

    explore: float = 0.5  # bandit: weight of trying places that were tried little; 0: never
    reserve: float = 0.2  # battery-balance: a battery at this part of its capacity gives nothing

    def __post_init__(self) -> None:
        if self.explore < 0 or not math.isfinite(self.explore):
            raise ConfigError(f"energy: expected explore of 0 or more; {self.explore} came")
        if not 0 <= self.reserve < 1:
            raise ConfigError(f"energy: expected reserve from 0 to below 1; {self.reserve} came")

    @classmethod
    def read(cls, settings: Mapping[str, Any]) -> Settings:
        known = [item.name for item in dataclasses.fields(cls)]
        for name, value in settings.items():
            if name not in known:
                raise ConfigError(f"energy: no setting {name!r}; known: {', '.join(known)}")
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ConfigError(f"energy: expected a number for {name}; {value!r} came")
        return cls(**settings)


@hookimpl
def edged_policies(settings: Mapping[str, Any]) -> Sequence[Policy]:
    chosen = Settings.read(settings)
    bandit = Places(_bandit.Bandit(explore=chosen.explore))
    return [
        Policy("uniform", by_weights(_weights.uniform), is_steady=False),
        Policy("long-term", by_weights(_weights.long_term), fit=FIT, is_steady=False),
        Policy("adaptive", by_weights(_weights.adaptive), fit=FIT, is_steady=False),
        Policy("battery-balance", longest_lived(chosen.reserve), weigh=battery_weights(chosen.reserve)),
        Policy("bandit", bandit.choose, learn=bandit.learn, is_steady=False),
        Policy("round-robin", in_turn(), is_steady=False),
    ]


def allowed(situation: Situation) -> list[int]:
    """The candidates that nothing refuses."""
    return [i for i, candidate in enumerate(situation.candidates) if candidate.refused_because is None]


def by_weights(weigh: Callable[[Sequence[NodeView]], list[float]]) -> Callable[[Situation], int | None]:
    """A node is drawn by weight among those that could do the job alone; else the fastest plan is taken."""

    def choose(situation: Situation) -> int | None:
        able = allowed(situation)
        alone = [i for i in able if len(situation.candidates[i].roles) == 1]
        if not alone:
            return min(able, key=lambda i: _time(situation.candidates[i]), default=None)
        nodes = [situation.nodes[situation.candidates[i].roles[0].node_id] for i in alone]
        return alone[_weights.drawn(weigh(nodes), situation.draw)]

    return choose


def in_turn() -> Callable[[Situation], int | None]:
    """Each node that could do the job alone has its turns, the quick more; else the fastest plan is taken.

    Every choice counts as a job, one for `edged plan` too. A node whose time is unknown is as slow as the
    slowest of the others.
    """
    turns = _round_robin.Turns()

    def choose(situation: Situation) -> int | None:
        able = allowed(situation)
        times = {i: _time(situation.candidates[i]) for i in able}
        alone: dict[str, int] = {}  # the quickest plan of each node
        for i in able:
            roles = situation.candidates[i].roles
            if len(roles) == 1:
                node_id = roles[0].node_id
                alone[node_id] = min(alone.get(node_id, i), i, key=times.__getitem__)
        if not alone:
            return min(able, key=times.__getitem__, default=None)
        slowest = max((times[i] for i in alone.values() if math.isfinite(times[i])), default=1.0)
        return alone[turns.choose({node: min(times[i], slowest) for node, i in alone.items()})]

    return choose


def battery_weights(reserve: float) -> Callable[[Sequence[NodeView]], dict[str, float]]:
    """What part of its speed each node gives, by its battery: what shares are divided by."""

    def weigh(nodes: Sequence[NodeView]) -> dict[str, float]:
        return {node.node_id: _weights.battery_factor(node.device.battery, reserve) for node in nodes}

    return weigh


def longest_lived(reserve: float) -> Callable[[Situation], int | None]:
    """Of plans that are as fast as the fastest, within a tenth, the one whose emptiest node is fullest."""

    def life(candidate: Candidate, nodes: Mapping[str, NodeView]) -> float:
        factors = [
            _weights.battery_factor(nodes[role.node_id].device.battery, reserve) / max(role.share, 1e-9)
            for role in candidate.roles
        ]
        return min(factors)

    def choose(situation: Situation) -> int | None:
        able = allowed(situation)
        fastest = min((_time(situation.candidates[i]) for i in able), default=math.inf)
        near = [i for i in able if _time(situation.candidates[i]) <= fastest * HORIZON] or able
        return max(near, key=lambda i: life(situation.candidates[i], situation.nodes), default=None)

    return choose


class Places:
    """The bandit over the sets of nodes that plans run on."""

    def __init__(self, bandit: _bandit.Bandit) -> None:
        self._bandit = bandit
        self._worst = 0.0  # joules of a token so far

    def choose(self, situation: Situation) -> int | None:
        arms = {_arm(situation.candidates[i]): i for i in allowed(situation)}
        arm = self._bandit.choose(list(arms))
        return None if arm is None else arms[arm]

    def learn(self, outcome: Outcome) -> None:
        """A failed job is the worst that can be; one without known joules teaches nothing."""
        arm, joules = _arm(outcome.candidate), outcome.joules_per_token
        if not outcome.is_done:
            self._bandit.learn(arm, -1.0)
        elif joules is not None:
            self._worst = max(self._worst, joules)
            self._bandit.learn(arm, -joules / self._worst if self._worst else 0.0)


def _arm(candidate: Candidate) -> tuple[str, ...]:
    return (candidate.strategy, *(role.node_id for role in candidate.roles))


def _time(candidate: Candidate) -> float:
    predicted = candidate.predicted.tpot_ms
    return math.inf if predicted is None else predicted

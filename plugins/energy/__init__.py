"""Policies that live within batteries, heat and carbon: which priced plan to take, and when.

Provides `uniform`, `long-term`, `adaptive` (who gets the next job, by what the batteries bear),
`battery-balance` (shares that drain batteries together), `bandit` (learns which place costs least),
`round-robin` (each node in turn, the quick ones more often) and `carbon` (the fewest grams of CO2, and jobs
that wait for a clean hour; see `_carbon` for the file).

It does not know prices: it chooses among plans that the core has priced and allowed. It does not read
sensors (`monitor` does), and changes no power mode.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edged import Candidate, ConfigError, Deferral, NodeView, Outcome, Policy, Situation, hookimpl

from . import _bandit, _carbon, _round_robin, _weights

Weigh = Callable[[Sequence[NodeView]], list[float]]
FILE_BYTES_MAX = 1 << 20  # of intensities; two years have 600 kB
FIT = "edged_plugins.energy._semi_markov:fit"
HORIZON = 1.10  # plans within a tenth of the least time are equals, of which the batteries may choose


@dataclass(frozen=True, slots=True)
class Settings:
    """`[plugin.energy]` of a profile."""

    explore: float = 0.5  # bandit: weight of trying places that were tried little; 0: never
    reserve: float = 0.2  # battery-balance: a battery at this part of its capacity gives nothing
    carbon_file: str = ""  # carbon: CSV of what the grid emits hour by hour, an absolute path; "": no carbon

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
            if name == "carbon_file" and not isinstance(value, str):
                raise ConfigError(f"energy: expected the path of a file for {name}; {value!r} came")
            if name != "carbon_file" and (isinstance(value, bool) or not isinstance(value, int | float)):
                raise ConfigError(f"energy: expected a number for {name}; {value!r} came")
        return cls(**settings)


@hookimpl
def edged_policies(settings: Mapping[str, Any]) -> Sequence[Policy]:
    chosen = Settings.read(settings)
    bandit = Places(_bandit.Bandit(explore=chosen.explore))
    return [
        Policy("uniform", by_weights(_weights.uniform), is_steady=False),
        _drawing("long-term", _weights.long_term),
        _drawing("adaptive", _weights.adaptive),
        Policy("battery-balance", longest_lived(chosen.reserve), weigh=battery_weights(chosen.reserve)),
        Policy("bandit", bandit.choose, learn=bandit.learn, is_steady=False),
        Policy("round-robin", in_turn(), is_steady=False),
        _clean(chosen.carbon_file),
    ]


def allowed(situation: Situation) -> list[int]:
    """The candidates that nothing refuses."""
    return [i for i, candidate in enumerate(situation.candidates) if candidate.refused_because is None]


def within(situation: Situation) -> list[int]:
    """Of these, the ones that the group computes itself; where there are none, all."""
    able = allowed(situation)
    return [i for i in able if situation.candidates[i].stated is None] or able


def by_weights(weigh: Weigh) -> Callable[[Situation], int | None]:
    """A node is drawn by weight among those that could do the job alone; else the fastest plan is taken."""

    def choose(situation: Situation) -> int | None:
        alone = _alone(situation)
        if not alone:
            able = allowed(situation)
            return min(able, key=lambda i: _time(situation.candidates[i]), default=None)
        return list(alone)[_weights.drawn(weigh(list(alone.values())), situation.draw)]

    return choose


def weights_note(weigh: Weigh) -> Callable[[Situation], str]:
    """How likely each node is to be drawn, and who does not say what its battery bears."""

    def note(situation: Situation) -> str:
        nodes = list(_alone(situation).values())
        if not nodes:
            return "No node could do the job alone, so the fastest plan is taken."
        parts = zip(nodes, weigh(nodes), strict=True)
        said = f"Drawn by what batteries bear: {', '.join(f'{n.name} {part:.1%}' for n, part in parts)}."
        silent = [node.name for node in nodes if node.bearable is None]
        if not silent:
            return said
        return f"{said} No harvest is known of {', '.join(silent)}: each counts as the others' mean."

    return note


def _drawing(name: str, weigh: Weigh) -> Policy:
    return Policy(name, by_weights(weigh), fit=FIT, is_steady=False, note=weights_note(weigh))


def _alone(situation: Situation) -> dict[int, NodeView]:
    """The nodes that could do the job alone, by the index of that plan; who only asks somebody outside
    counts where no node can."""
    able = allowed(situation)
    alone = [i for i in able if len(situation.candidates[i].roles) == 1]
    here = [i for i in alone if situation.candidates[i].stated is None]
    return {i: situation.nodes[situation.candidates[i].roles[0].node_id] for i in here or alone}


def in_turn() -> Callable[[Situation], int | None]:
    """Each node that could do the job alone has its turns, the quick more; else the fastest plan is taken.

    Every choice counts as a job, one for `edged plan` too. A node whose time is unknown is as slow as the
    slowest of the others.
    """
    turns = _round_robin.Turns()

    def choose(situation: Situation) -> int | None:
        able = within(situation)
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
        arms = {_arm(situation.candidates[i]): i for i in within(situation)}
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


class Grid:
    """The file of intensities, read again when it changes: a forecast grows while a node runs."""

    def __init__(self, path: Path) -> None:
        """ConfigError where it cannot be read."""
        self._path = path
        self._stamp: tuple[int, int] | None = self._stat()
        self._last = self._parsed()
        self.trouble = ""  # with the file as it is now, while an earlier reading is used

    def read(self) -> _carbon.Intensities:
        try:
            stamp: tuple[int, int] | None = self._stat()
            if stamp != self._stamp:  # whatever it holds now, it is read once
                self._stamp, self.trouble = stamp, ""
                self._last = self._parsed()
        except ConfigError as error:
            self.trouble = f"An earlier reading of the intensities is used: {error}."
            if not self._path.exists():
                self._stamp = None
        return self._last

    def _parsed(self) -> _carbon.Intensities:
        try:
            with self._path.open("rb") as file:
                text = file.read(FILE_BYTES_MAX + 1).decode()
        except (OSError, UnicodeDecodeError) as error:
            raise self._unreadable(error) from error
        if len(text) > FILE_BYTES_MAX or not text.endswith("\n"):
            raise ConfigError(
                f"energy: expected whole lines, at most {FILE_BYTES_MAX} bytes, in {self._path}; others came",
                remedy="write it elsewhere and rename it, so that nobody reads half of it",
            )
        return _carbon.parse(text, str(self._path))

    def _stat(self) -> tuple[int, int]:
        try:
            found = self._path.stat()
        except OSError as error:
            raise self._unreadable(error) from error
        return found.st_mtime_ns, found.st_size

    def _unreadable(self, error: Exception) -> ConfigError:
        return ConfigError(
            f"energy: expected hourly intensities at {self._path}; {error}", remedy="see carbon_file"
        )


class Clean:
    """The plan of the fewest grams; every node counts as on the same grid."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid

    def choose(self, situation: Situation) -> int | None:
        """None while a job that may wait has a cleaner start."""
        return None if self.defer(situation) else self._cleanest(situation)

    def defer(self, situation: Situation) -> Deferral | None:
        """To where the mean intensity over the job's run is least; None where the file does not cover now."""
        index = self._cleanest(situation)
        if situation.start_by is None or index is None:
            return None
        known, now = self._grid.read(), situation.now
        took = _run_s(situation.candidates[index], situation.tokens)
        start = known.cleanest(now, took, situation.start_by + took)
        if start <= now:
            return None
        then, at_once = known.mean(start, took), known.mean(now, took)
        return Deferral(start, f"{then:.0f} g CO2 a kWh instead of {at_once:.0f}")

    def note(self, situation: Situation) -> str:
        known, index = self._grid.read(), self._cleanest(situation)
        said = [self._grid.trouble] if self._grid.trouble else []
        if not known.covers(situation.now):
            said.append("The file of intensities does not cover this hour: no job waits.")
        joules = None if index is None else situation.candidates[index].predicted.joules_per_token
        if index is not None and joules is None:
            said.append("No plan's joules are known (device.idle_watts, load_watts): the fastest is taken.")
        elif joules is not None and known.covers(situation.now):
            intensity = known.mean(situation.now, 0.0)
            mass = _carbon.grams(1000 * joules, intensity)
            said.append(f"{mass:.3g} g CO2 for 1000 tokens, at {intensity:.0f} g a kWh.")
        return " ".join(said)

    def _cleanest(self, situation: Situation) -> int | None:
        """Fewest grams, then least time; without any plan's joules the fastest."""
        known, candidates = self._grid.read(), situation.candidates
        able = allowed(situation)
        joules = {i: candidates[i].predicted.joules_per_token for i in able}
        weighed = {i: of_token for i, of_token in joules.items() if of_token is not None}
        if not weighed:
            return min(able, key=lambda i: _time(candidates[i]), default=None)
        took = {i: _run_s(candidates[i], situation.tokens) for i in weighed}
        if all(known.covers(situation.now, run_s) for run_s in took.values()):
            weighed = {i: weighed[i] * known.mean(situation.now, took[i]) for i in weighed}
        return min(weighed, key=lambda i: (weighed[i], _time(candidates[i])))


def _clean(path: str) -> Policy:
    if not path:
        reason = "no plugin.energy.carbon_file names hourly intensities of the grid"
        return Policy("carbon", lambda situation: None, refused_because=reason)
    if not Path(path).is_absolute():
        raise ConfigError(f"energy: expected an absolute path for carbon_file; {path!r} came")
    clean = Clean(Grid(Path(path)))
    return Policy("carbon", clean.choose, note=clean.note, defer=clean.defer)


def _run_s(candidate: Candidate, tokens: int) -> float:
    """Seconds of the whole job; 0 where its plan's speed is unknown."""
    predicted = candidate.predicted
    if predicted.ttft_ms is None or predicted.tpot_ms is None:
        return 0.0
    return (predicted.ttft_ms + tokens * predicted.tpot_ms) / 1000


def _arm(candidate: Candidate) -> tuple[str, ...]:
    return (candidate.strategy, *(role.node_id for role in candidate.roles))


def _time(candidate: Candidate) -> float:
    predicted = candidate.predicted.tpot_ms
    return math.inf if predicted is None else predicted

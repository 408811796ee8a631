"""Scheduling over simulated devices and time, with the policies that run for real. Pure: the seed decides.

Time goes in slots. In each, devices harvest and idle; running jobs go on, and their energy is charged when
they end; then at most one job arrives, which needs a device of every group, and the policy chooses among
those that are free. A device whose battery falls below its reserve saves: it takes no work until it is above
its resume level. The law of one device is that of Khoshsirat, Perin, Rossi (arXiv:2408.15907).
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from .errors import ConfigError
from .types import (
    Battery,
    Candidate,
    DeviceState,
    NodeView,
    Outcome,
    PlanRequest,
    Policy,
    Predicted,
    Role,
    Situation,
)

REQUEST = PlanRequest()
SAMPLES = 200  # of the curves that a plot shows
HOURS = 24


@dataclass(frozen=True, slots=True)
class PowerMode:
    """From `above` (a part of the battery) on a job takes `slots` slots and `joules`."""

    slots: int
    joules: float
    above: float = 0.0


@dataclass(frozen=True, slots=True)
class Simulated:
    """A kind of device, `count` of them. `harvest_joules`: least and most in a slot, evenly between, and
    scaled by the sun where `is_solar`. A device without `capacity_joules` is on mains. `modes` ascend."""

    name: str
    modes: tuple[PowerMode, ...]
    count: int = 1
    group: str = "all"
    capacity_joules: float = 0.0
    start: float = 1.0
    reserve: float = 0.1
    resume: float = 0.2
    harvest_joules: tuple[float, float] = (0.0, 0.0)
    is_solar: bool = False
    idle_joules: float = 0.0
    joules_noise: float = 0.0  # of a job's joules, standard deviation over mean
    failure: float = 0.0  # probability to fail in a slot
    repair_slots: int = 10
    speed: float = 1.0  # relative, where jobs are shared


@dataclass(frozen=True, slots=True)
class Scenario:
    """`arrival`: probability of a job in a slot, for all groups together: each needs one device of every
    group. `sharing`: "one" device of a group runs a job, or "all" of them in shares."""

    name: str
    devices: tuple[Simulated, ...]
    arrival: float
    slots: int
    slot_s: float = 100.0
    runs: int = 1
    sharing: str = "one"
    policy: str = "latency"


@dataclass(slots=True)
class Device:
    """One device in one run."""

    kind: Simulated
    node_id: str
    bearable: float | None
    energy: float
    is_saving: bool = False
    is_dead: bool = False
    left: int = 0  # slots of the running job
    owed: float = 0.0  # its joules
    repair: int = 0
    views: dict[tuple[int, int], NodeView] = field(default_factory=dict)
    candidates: dict[int, Candidate] = field(default_factory=dict)

    @property
    def is_free(self) -> bool:
        return not (self.left or self.is_saving or self.repair)

    @property
    def mode(self) -> tuple[int, PowerMode]:
        """Its number, 1 the weakest, and what a job takes in it."""
        part = self.energy / self.kind.capacity_joules if self.kind.capacity_joules else 1.0
        modes = self.kind.modes
        number = max(i for i, mode in enumerate(modes, 1) if part >= mode.above)
        return number, modes[number - 1]

    def candidate(self, slot_s: float) -> Candidate:
        """The plan that this device runs a job alone, as it would now."""
        number, mode = self.mode
        found = self.candidates.get(number)
        if found is None:
            role = Role(0, self.node_id, 0, (0, 1), (0, 1), (0, 1), (0, 1), 1.0)
            predicted = Predicted(tpot_ms=1000 * slot_s * mode.slots, joules_per_token=mode.joules)
            found = self.candidates[number] = Candidate("local", (role,), predicted)
        return found

    def view(self) -> NodeView:
        """The node as a policy sees it; percents are whole."""
        capacity = self.kind.capacity_joules
        percent = round(100 * self.energy / capacity) if capacity else -1
        number, _ = self.mode
        found = self.views.get((percent, number))
        if found is None:
            battery = Battery(float(percent), False, False) if capacity else None
            found = NodeView(
                self.node_id,
                self.node_id,
                device=DeviceState(battery=battery),
                power_mode=number if len(self.kind.modes) > 1 else None,
                bearable=self.bearable,
            )
            self.views[percent, number] = found
        return found


@dataclass(slots=True)
class Result:
    """Sums over all runs; `downtime` and `mean_battery` are means over devices, slots and runs.

    `first_dead_slots`: of each run the slot in which a first battery was empty, or None. `curves`: samples of
    the last run. `regret`: (jobs so far, joules above those of the best device), at doubling numbers of jobs.
    """

    policy: str
    jobs_done: int = 0
    dropped: int = 0
    moved: int = 0
    joules: float = 0.0
    downtime: float = 0.0
    downtimes: list[float] = field(default_factory=list)  # of each run
    mean_battery: float | None = None
    first_dead_slots: list[int | None] = field(default_factory=list)
    curves: dict[str, list[float]] = field(default_factory=dict)
    regret: list[tuple[int, float]] = field(default_factory=list)


def check(scenario: Scenario) -> None:
    """ConfigError with the first thing that makes no sense."""
    rules = [
        (bool(scenario.devices) and sum(d.count for d in scenario.devices) > 0, "at least one device", 0),
        (0 <= scenario.arrival <= 1, "arrival from 0 to 1", scenario.arrival),
        (1 <= scenario.slots <= 10_000_000, "slots from 1 to ten million", scenario.slots),
        (1 <= scenario.runs <= 100_000, "runs from 1 to 100000", scenario.runs),
        (scenario.slot_s > 0, "slot_s above 0", scenario.slot_s),
        (scenario.sharing in ("one", "all"), 'sharing "one" or "all"', scenario.sharing),
    ]
    for device in scenario.devices:
        low, high = device.harvest_joules
        name = f"device {device.name!r}: "
        rules += [
            (device.count >= 0, f"{name}count of 0 or more", device.count),
            (bool(device.modes), f"{name}at least one power mode", 0),
            (
                all(m.slots >= 1 and m.joules >= 0 for m in device.modes),
                f"{name}slots and joules of a job",
                0,
            ),
            (bool(device.modes) and device.modes[0].above == 0, f"{name}a first mode above 0.0", 0),
            (_ascends([m.above for m in device.modes]), f"{name}modes that ascend in `above`", 0),
            (0 <= low <= high, f"{name}harvest_joules as least and most", device.harvest_joules),
            (device.capacity_joules >= 0, f"{name}capacity_joules of 0 or more", device.capacity_joules),
            (0 <= device.start <= 1, f"{name}start from 0 to 1", device.start),
            (
                0 <= device.reserve <= device.resume <= 1,
                f"{name}reserve up to resume, from 0 to 1",
                device.reserve,
            ),
            (0 <= device.failure <= 1, f"{name}failure from 0 to 1", device.failure),
            (device.speed > 0, f"{name}speed above 0", device.speed),
            (device.idle_joules >= 0 and device.joules_noise >= 0, f"{name}joules of 0 or more", 0),
        ]
    for holds, expected, came in rules:
        if not holds:
            raise ConfigError(
                f"expected {expected} in scenario {scenario.name!r}" + (f"; {came!r} came" if came else ""),
                remedy="mend the scenario file",
            )


def run(scenario: Scenario, policy: Policy, seed: int, bearable: Mapping[str, float] | None = None) -> Result:
    """All runs of a scenario. `bearable`: by device name, the jobs a slot that its battery bears."""
    check(scenario)
    result = Result(policy.name)
    levels = 0.0
    for number in range(scenario.runs):
        one = _Run(scenario, policy, random.Random(f"{seed}:{number}"), bearable or {}, result)
        one.go(is_last=number == scenario.runs - 1)
        levels += one.level
    result.downtime = sum(result.downtimes) / scenario.runs
    has_battery = any(device.capacity_joules for device in scenario.devices)
    result.mean_battery = levels / scenario.runs if has_battery else None
    return result


class _Run:
    def __init__(
        self,
        scenario: Scenario,
        policy: Policy,
        chance: random.Random,
        bearable: Mapping[str, float],
        result: Result,
    ) -> None:
        self._scenario, self._policy, self._chance, self._result = scenario, policy, chance, result
        self._devices = [
            Device(kind, f"{kind.name}-{i}", bearable.get(kind.name), kind.start * kind.capacity_joules)
            for kind in scenario.devices
            for i in range(kind.count)
        ]
        by_group = itertools.groupby(sorted(self._devices, key=_group_of), key=_group_of)
        self._groups = [list(devices) for _, devices in by_group]
        self._least_joules = min(mode.joules for kind in scenario.devices for mode in kind.modes)
        self._jobs = 0
        self._regret = 0.0
        self.level = 0.0

    def go(self, is_last: bool) -> None:
        scenario, chance, devices = self._scenario, self._chance, self._devices
        every = max(1, scenario.slots // SAMPLES)
        saving = 0
        batteries = [device for device in devices if device.kind.capacity_joules]
        first_dead: int | None = None
        for slot in range(scenario.slots):
            sun = _sun(slot * scenario.slot_s)
            for device in devices:
                self._live(device, sun)
            if chance.random() < scenario.arrival:
                self._arrive(slot)
            saving += sum(device.is_saving for device in devices)
            if batteries:
                self.level += sum(d.energy / d.kind.capacity_joules for d in batteries) / len(batteries)
            if first_dead is None and any(device.is_dead for device in batteries):
                first_dead = slot
            if is_last and slot % every == 0:
                self._sample(slot, batteries, saving)
        self.level /= scenario.slots
        self._result.downtimes.append(saving / len(devices) / scenario.slots)
        self._result.first_dead_slots.append(first_dead)

    # --- a device's slot ---

    def _live(self, device: Device, sun: float) -> None:
        kind = device.kind
        if kind.failure and not device.repair and self._chance.random() < kind.failure:
            device.repair = kind.repair_slots
            if device.left:
                device.left, device.owed = 0, 0.0
                self._move(device)
        elif device.repair:
            device.repair -= 1
        low, high = kind.harvest_joules
        if high:
            gained = self._chance.uniform(low, high) * (sun if kind.is_solar else 1.0)
            device.energy = min(device.energy + gained, kind.capacity_joules)
        if device.left:
            device.left -= 1
            if not device.left:
                self._spend(device, device.owed)
        if kind.idle_joules:
            self._spend(device, kind.idle_joules)
        if device.is_saving and device.energy > kind.resume * kind.capacity_joules:
            device.is_saving = False

    def _spend(self, device: Device, joules: float) -> None:
        self._result.joules += joules
        if not device.kind.capacity_joules:
            return
        device.energy = max(0.0, device.energy - joules)
        device.is_dead = device.is_dead or device.energy == 0.0
        if device.energy < device.kind.reserve * device.kind.capacity_joules:
            device.is_saving = True

    # --- a job ---

    def _arrive(self, slot: int) -> None:
        """One job: each group has a device for it, or it is dropped."""
        if self._scenario.sharing == "all":
            self._share()
            return
        chosen = []
        for group in self._groups:
            device = self._choose([device for device in group if device.is_free], slot)
            if device is None:
                self._result.dropped += 1
                return
            chosen.append(device)
        for device in chosen:
            self._begin(device)
        self._result.jobs_done += 1
        self._jobs += 1
        if self._jobs & (self._jobs - 1) == 0:
            self._result.regret.append((self._jobs, self._regret))

    def _choose(self, free: Sequence[Device], slot: int) -> Device | None:
        if not free:
            return None
        candidates = [device.candidate(self._scenario.slot_s) for device in free]
        nodes = {device.node_id: device.view() for device in free}
        now = slot * self._scenario.slot_s
        situation = Situation(candidates, nodes, REQUEST, self._chance.random(), now)
        index = self._policy.choose(situation)
        if index is None:
            return None
        return free[index]

    def _begin(self, device: Device) -> None:
        _, mode = device.mode
        noise = device.kind.joules_noise
        joules = mode.joules * max(0.0, self._chance.gauss(1.0, noise)) if noise else mode.joules
        device.left, device.owed = mode.slots, joules
        self._regret += mode.joules - self._least_joules
        if self._policy.learn is not None:
            self._policy.learn(Outcome(device.candidate(self._scenario.slot_s), joules, is_done=True))

    def _share(self) -> None:
        """Every active device takes a part: by speed and by what the policy lets it do."""
        able = [device for device in self._devices if device.is_free]
        if not able:
            self._result.dropped += 1
            return
        views = [device.view() for device in able]
        weights = self._policy.weigh(views) if self._policy.weigh else {}
        parts = [d.kind.speed * weights.get(d.node_id, 1.0) for d in able]
        whole = sum(parts)
        for device, part in zip(able, parts, strict=True):
            share = part / whole
            _, mode = device.mode
            device.left = max(1, math.ceil(mode.slots * share / device.kind.speed))
            device.owed = mode.joules * share
        self._result.jobs_done += 1

    def _move(self, device: Device) -> None:
        """The job of a device that failed goes to another of its group, or is lost."""
        group = next(group for group in self._groups if device in group)
        other = self._choose([d for d in group if d.is_free], 0)
        if other is None:
            self._result.dropped += 1
            self._result.jobs_done -= 1
        else:
            self._result.moved += 1
            self._begin(other)

    def _sample(self, slot: int, batteries: Sequence[Device], saving: int) -> None:
        curves = self._result.curves
        curves.setdefault("hours", []).append(slot * self._scenario.slot_s / 3600)
        curves.setdefault("busy", []).append(sum(bool(d.left) for d in self._devices))
        curves.setdefault("saving", []).append(sum(d.is_saving for d in self._devices))
        for kind in self._scenario.devices:
            levels = [d.energy / kind.capacity_joules for d in batteries if d.kind is kind]
            if levels:
                curves.setdefault(f"battery {kind.name}", []).append(sum(levels) / len(levels))


def _group_of(device: Device) -> str:
    return device.kind.group


def _sun(seconds: float) -> float:
    """Part of the day's best light: half a sine from six to eighteen o'clock."""
    hour = seconds / 3600 % HOURS
    return max(0.0, math.sin(math.pi * (hour - 6) / 12))


def _ascends(values: Sequence[float]) -> bool:
    return all(a < b for a, b in itertools.pairwise(values))

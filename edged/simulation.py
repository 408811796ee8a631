"""Scheduling over simulated devices and time, with the policies that run for real. Pure: the seed decides.

Time goes in slots. In each, devices harvest and idle; running iterations go on, and their energy is charged
when they end; then at most one job arrives; then who waits begins, as far as devices are free: the queue says
who, and the policy chooses the devices, one of every group. A job goes on where it ran; where it cannot,
another device takes over, at no cost. A device whose battery falls below its reserve saves: it takes no
work until it is above its resume level. The law of one device is that of Khoshsirat, Perin, Rossi
(arXiv:2408.15907).
"""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from .queueing import Fcfs, Mlfq, Queued
from .scenario import Law, PowerMode, Scenario, Simulated, check
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


@dataclass(slots=True, eq=False)
class Job(Queued):
    """One job. `left`: iterations to run. `devices`: where it runs, or last ran; so many are `running`."""

    arrived: int = 0
    left: int = 1
    ran: int = 0
    waited: int = 0  # slots in the queue
    devices: list[Device] = field(default_factory=list)
    running: int = 0

    @property
    def work(self) -> int:
        """Of the next iteration."""
        return 1 if self.ran else int(self.first)


@dataclass(slots=True)
class Device:
    """One device in one run."""

    kind: Simulated
    node_id: str
    bearable: float | None
    energy: float
    is_saving: bool = False
    is_dead: bool = False
    job: Job | None = None  # that runs here, unless it was lost elsewhere
    last: Job | None = None  # that ran here
    left: int = 0  # slots of its iteration
    owed: float = 0.0  # its joules
    share: float = 1.0  # of it
    repair: int = 0
    owner: int = 0  # slots that its owner goes on using it
    views: dict[tuple[int, int], NodeView] = field(default_factory=dict)
    candidates: dict[int, Candidate] = field(default_factory=dict)

    @property
    def is_free(self) -> bool:
        return not (self.left or self.is_saving or self.repair or self.owner)

    @property
    def is_kept(self) -> bool:
        """Is the job that ran here between two iterations?"""
        last = self.last
        return last is not None and last.left > 0 and not last.running and self in last.devices

    @property
    def mode(self) -> tuple[int, PowerMode]:
        """Its number, 1 the weakest, and what a job takes in it."""
        kind = self.kind
        number = len(kind.modes)
        part = self.energy / kind.capacity_joules if kind.capacity_joules else 1.0
        while number > 1 and part < kind.modes[number - 1].above:
            number -= 1
        return number, kind.modes[number - 1]

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

    `jobs_done`: ended, or running when time is up; `waiting`: in the queue then. `waits`, `turnarounds`: how
    many of the ended jobs were so many slots in the queue, or took so many from arrival to end.
    `first_dead_slots`: of each run the slot in which a first battery was empty, or None. `curves`: samples of
    the last run. `regret`: (jobs so far, joules above those of the best device), at doubling numbers of jobs.
    """

    policy: str
    jobs_done: int = 0
    dropped: int = 0
    waiting: int = 0
    moved: int = 0
    joules: float = 0.0
    downtime: float = 0.0
    downtimes: list[float] = field(default_factory=list)  # of each run
    mean_battery: float | None = None
    first_dead_slots: list[int | None] = field(default_factory=list)
    waits: Counter[int] = field(default_factory=Counter)
    turnarounds: Counter[int] = field(default_factory=Counter)
    curves: dict[str, list[float]] = field(default_factory=dict)
    regret: list[tuple[int, float]] = field(default_factory=list)


def mean(counts: Mapping[int, int]) -> float | None:
    """Of values and how often each came; None of none."""
    return sum(value * times for value, times in counts.items()) / sum(counts.values()) if counts else None


def percentile(counts: Mapping[int, int], part: float) -> int | None:
    """The least value that at least `part` of all do not exceed; None of none."""
    left = part * sum(counts.values())
    for value in sorted(counts):
        left -= counts[value]
        if left < 1e-9:
            return value
    return None


def run(scenario: Scenario, policy: Policy, seed: int, bearable: Mapping[str, float] | None = None) -> Result:
    """All runs of a scenario. `bearable`: by device name, the jobs a slot that its battery bears."""
    check(scenario)
    result = Result(policy.name)
    levels = 0.0
    for number in range(scenario.runs):
        one = _Run(scenario, policy, _chances(scenario, f"{seed}:{number}"), bearable or {}, result)
        one.go(is_last=number == scenario.runs - 1)
        levels += one.level
    result.downtime = sum(result.downtimes) / scenario.runs
    has_battery = any(device.capacity_joules for device in scenario.devices)
    result.mean_battery = levels / scenario.runs if has_battery else None
    return result


@dataclass(frozen=True, slots=True)
class Chances:
    """Random numbers: of what devices live by, of the jobs that come, of the policy and its jobs' joules."""

    devices: random.Random
    jobs: random.Random
    policy: random.Random


def _chances(scenario: Scenario, seed: str) -> Chances:
    """Where jobs wait, each has its own: then every queue and policy meets the same jobs and weather. Where
    they do not, one for all, as when there were no queues, so that a seed's results stay what they were."""
    if scenario.queue == "drop":
        one = random.Random(seed)
        return Chances(one, one, one)
    return Chances(*(random.Random(f"{seed}:{name}") for name in ("devices", "jobs", "policy")))


class _Run:
    def __init__(
        self,
        scenario: Scenario,
        policy: Policy,
        chances: Chances,
        bearable: Mapping[str, float],
        result: Result,
    ) -> None:
        self._scenario, self._policy, self._chances, self._result = scenario, policy, chances, result
        self._devices = [
            Device(kind, f"{kind.name}-{i}", bearable.get(kind.name), kind.start * kind.capacity_joules)
            for kind in scenario.devices
            for i in range(kind.count)
        ]
        by_group = itertools.groupby(sorted(self._devices, key=_group_of), key=_group_of)
        self._groups = [list(devices) for _, devices in by_group]
        self._least_joules = min(mode.joules for kind in scenario.devices for mode in kind.modes)
        self._waits = scenario.queue != "drop"
        self._room = scenario.queue_max if self._waits else 0
        self._queue = _queue(scenario)
        self._slot = 0
        self._jobs = 0
        self._regret = 0.0
        self._sampled_dropped = self._result.dropped
        self.level = 0.0

    def go(self, is_last: bool) -> None:
        scenario, jobs, devices = self._scenario, self._chances.jobs, self._devices
        every = max(1, scenario.slots // SAMPLES)
        saving = 0
        batteries = [device for device in devices if device.kind.capacity_joules]
        first_dead: int | None = None
        for slot in range(scenario.slots):
            self._slot = slot
            sun = _sun(slot * scenario.slot_s)
            for device in devices:
                self._live(device, sun)
            if jobs.random() < scenario.arrival:
                self._arrive()
            elif self._queue:
                self._serve()
            saving += sum(device.is_saving for device in devices)
            if batteries:
                self.level += sum(d.energy / d.kind.capacity_joules for d in batteries) / len(batteries)
            if first_dead is None and any(device.is_dead for device in batteries):
                first_dead = slot
            if is_last and slot % every == 0:
                self._sample(batteries)
        self.level /= scenario.slots
        result = self._result
        result.jobs_done += len({device.job for device in devices if device.job})
        result.waiting += len(self._queue)
        result.downtimes.append(saving / len(devices) / scenario.slots)
        result.first_dead_slots.append(first_dead)

    # --- a device's slot ---

    def _live(self, device: Device, sun: float) -> None:
        kind, chance = device.kind, self._chances.devices
        if kind.failure and not device.repair and chance.random() < kind.failure:
            self._fail(device)
        elif device.repair:
            device.repair -= 1
        if device.owner:
            device.owner -= 1
        elif kind.owner_use and chance.random() < kind.owner_use:
            device.owner = kind.owner_slots
        low, high = kind.harvest_joules
        if high:
            gained = chance.uniform(low, high) * (sun if kind.is_solar else 1.0)
            device.energy = min(device.energy + gained, kind.capacity_joules)
        if device.left:
            device.left -= 1
            if not device.left:
                self._spend(device, device.owed)
                self._end(device)
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

    def _fail(self, device: Device) -> None:
        device.repair = device.kind.repair_slots
        if device.left:
            job, device.job, device.left, device.owed = device.job, None, 0, 0.0
            if job is not None:
                self._move(job, device)

    # --- a job ---

    def _arrive(self) -> None:
        """One job: it runs, or waits, or there is no room and it is dropped."""
        first, left = self._drawn(self._scenario.prompts), self._drawn(self._scenario.lengths)
        if self._waits and len(self._queue) >= self._room + self._spare():
            self._result.dropped += 1
            self._serve()
            return
        job = Job(first, arrived=self._slot, left=left)
        self._queue.join(job, self._slot)
        self._serve()
        if not job.devices and len(self._queue) > self._room:
            self._queue.leave(job)
            self._result.dropped += 1

    def _spare(self) -> int:
        """Jobs that could begin now. By the queue's length alone, who overtakes would always find room."""
        if self._scenario.sharing == "all":
            return int(not any(device.job for device in self._devices))
        return min(sum(device.is_free for device in group) for group in self._groups)

    def _drawn(self, law: Law) -> int:
        if len(law) == 1:
            return law[0][0]
        numbers, probabilities = zip(*law, strict=True)
        return int(self._chances.jobs.choices(numbers, probabilities)[0])

    def _serve(self) -> None:
        """Whoever is next begins an iteration, as long as there are devices for it."""
        while (job := self._queue.head(self._slot)) is not None:
            devices = self._devices_for(job)
            if not devices:
                return
            self._queue.leave(job)
            self._begin(job, devices)

    def _devices_for(self, job: Job) -> list[Device] | None:
        """Those that it ran on, else one of every group, else none; where they share jobs, all that can."""
        if self._scenario.sharing == "all":
            return self._sharers()
        if job.devices and all(device.is_free for device in job.devices):
            return job.devices
        if self._waits and not all(any(device.is_free for device in group) for group in self._groups):
            return None
        chosen = []
        for group in self._groups:
            free = [device for device in group if device.is_free]
            device = self._choose([device for device in free if not device.is_kept] or free)
            if device is None:
                return None
            chosen.append(device)
        return chosen

    def _sharers(self) -> list[Device] | None:
        """Every active device takes a part: by speed and by what the policy lets it do. One job at a time,
        where jobs wait for another."""
        if self._waits and any(device.job for device in self._devices):
            return None
        able = [device for device in self._devices if device.is_free]
        views = [device.view() for device in able]
        weights = self._policy.weigh(views) if able and self._policy.weigh else {}
        parts = [d.kind.speed * weights.get(d.node_id, 1.0) for d in able]
        whole = sum(parts)
        for device, part in zip(able, parts, strict=True):
            device.share = part / whole
        return able

    def _choose(self, free: Sequence[Device]) -> Device | None:
        if not free:
            return None
        candidates = [device.candidate(self._scenario.slot_s) for device in free]
        nodes = {device.node_id: device.view() for device in free}
        now = self._slot * self._scenario.slot_s
        situation = Situation(candidates, nodes, REQUEST, self._chances.policy.random(), now)
        index = self._policy.choose(situation)
        if index is None:
            return None
        return free[index]

    def _begin(self, job: Job, devices: list[Device]) -> None:
        """Its next iteration, there."""
        job.waited += self._slot - int(job.since)
        if self._scenario.sharing == "one":
            self._result.moved += bool(job.devices) and job.devices != devices
        job.devices, job.running = devices, len(devices)
        for device in devices:
            self._run(device, job)
        if not job.ran and self._scenario.sharing == "one":
            self._jobs += 1
            if self._jobs & (self._jobs - 1) == 0:
                self._result.regret.append((self._jobs, self._regret))

    def _run(self, device: Device, job: Job) -> None:
        """An iteration of a job, or this device's share of it."""
        kind, work = device.kind, job.work
        _, mode = device.mode
        device.job = device.last = job
        if self._scenario.sharing == "all":
            device.left = max(1, math.ceil(mode.slots * work * device.share / kind.speed))
            device.owed = mode.joules * work * device.share
            return
        noise = kind.joules_noise
        joules = mode.joules * max(0.0, self._chances.policy.gauss(1.0, noise)) if noise else mode.joules
        device.left, device.owed = mode.slots * work, joules * work
        self._regret += (mode.joules - self._least_joules) * work
        if self._policy.learn is not None:
            self._policy.learn(Outcome(device.candidate(self._scenario.slot_s), joules, is_done=True))

    def _end(self, device: Device) -> None:
        """A device has done its part of an iteration; with the last part the iteration ends."""
        job, device.job = device.job, None
        if job is None:
            return
        job.running -= 1
        if job.running:
            return
        work = job.work
        job.ran += 1
        job.left -= 1
        if job.left:
            self._queue.back(job, work, self._slot)
            return
        self._result.jobs_done += 1
        self._result.waits[job.waited] += 1
        self._result.turnarounds[self._slot - job.arrived] += 1

    def _move(self, job: Job, failed: Device) -> None:
        """Another of its group does what a failed one did not end; else the job waits again, or is lost."""
        group = next(group for group in self._groups if failed in group)
        other = self._choose([device for device in group if device.is_free])
        if other is not None:
            self._result.moved += 1
            other.share = failed.share
            job.devices = [other if device is failed else device for device in job.devices]
            self._run(other, job)
            return
        for device in job.devices:
            device.job = None
        job.devices, job.running = [], 0
        if self._waits:
            self._queue.back(job, 0, self._slot)
        else:
            self._result.dropped += 1

    def _sample(self, batteries: Sequence[Device]) -> None:
        curves, devices = self._result.curves, self._devices
        kinds = self._scenario.devices

        def add(name: str, value: float) -> None:
            curves.setdefault(name, []).append(value)

        add("hours", self._slot * self._scenario.slot_s / 3600)
        add("busy", sum(bool(d.left) for d in devices))
        add("saving", sum(d.is_saving for d in devices))
        if any(kind.failure for kind in kinds):
            add("failed", sum(bool(d.repair) for d in devices))
        if any(kind.owner_use for kind in kinds):
            add("in use", sum(bool(d.owner) for d in devices))
        add("waiting", len(self._queue))
        add("dropped", self._result.dropped - self._sampled_dropped)
        self._sampled_dropped = self._result.dropped
        for kind in kinds:
            levels = [d.energy / kind.capacity_joules for d in batteries if d.kind is kind]
            if levels:
                add(f"battery {kind.name}", sum(levels) / len(levels))


def _queue(scenario: Scenario) -> Fcfs[Job] | Mlfq[Job]:
    if scenario.queue in ("drop", "fcfs"):
        return Fcfs()
    return Mlfq(skips=scenario.queue == "skip-join", starving=scenario.starve_slots)


def _group_of(device: Device) -> str:
    return device.kind.group


def _sun(seconds: float) -> float:
    """Part of the day's best light: half a sine from six to eighteen o'clock."""
    hour = seconds / 3600 % HOURS
    return max(0.0, math.sin(math.pi * (hour - 6) / 12))

"""What is simulated: devices, what they live by, the jobs that come; and the rules of a scenario file. Pure.

The processes, each off unless its key is there:

    arrival    a job in a slot, or none (`arrival`), of unlike work (`prompts`, `lengths`)
    harvest    joules in a slot, evenly between two bounds (`harvest_joules`), by the sun where `is_solar`
    load       idling (`idle_joules`); its owner begins to use the device (`owner_use`) for `owner_slots`
    failure    in a slot (`failure`), mended after `repair_slots`
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from .errors import ConfigError

ONE = ((1, 1.0),)  # a law: always one
QUEUES = ("drop", "fcfs", "mlfq", "skip-join")
DEVICES_MAX = 100_000  # some hundred bytes each
QUEUE_MAX = 10_000  # each choice looks at all that wait

Law = tuple[tuple[int, float], ...]
Rule = tuple[bool, str, Any]  # (holds, what is expected, what came or None)


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
    owner_use: float = 0.0  # probability that its owner, who is away, begins to use it in a slot
    owner_slots: int = 10  # so long; it takes no job meanwhile, and goes on with the one it has
    speed: float = 1.0  # relative, where jobs are shared


@dataclass(frozen=True, slots=True)
class Scenario:
    """`arrival`: probability of a job in a slot, for all groups together: each needs one device of every
    group. `sharing`: "one" device of a group runs a job, or "all" of them in shares.

    A job is `lengths` iterations; the first, its prompt, is as much work as `prompts` others. Both are laws:
    pairs of a number and its probability. What a device's modes say is for one iteration of work 1.

    `queue`: a job that comes and finds no device free is lost ("drop"), or waits: "fcfs", "mlfq", "skip-join"
    (see `edged.queueing`; a quantum is an iteration of work 1). `queue_max`: so many wait; who comes to more
    is lost. Whoever has begun is never refused. Where priority falls, who has not run for `starve_slots` goes
    first.
    """

    name: str
    devices: tuple[Simulated, ...]
    arrival: float
    slots: int
    slot_s: float = 100.0
    runs: int = 1
    sharing: str = "one"
    policy: str = "latency"
    queue: str = "drop"
    queue_max: int = 64
    starve_slots: int = 300
    prompts: Law = ONE
    lengths: Law = ONE


def check(scenario: Scenario) -> None:
    """ConfigError with the first thing that makes no sense."""
    for holds, expected, came in _rules(scenario):
        if not holds:
            raise ConfigError(
                f"expected {expected} in scenario {scenario.name!r}"
                + ("" if came is None else f"; {came!r} came"),
                remedy="mend the scenario file",
            )


def _rules(scenario: Scenario) -> Iterator[Rule]:
    devices = scenario.devices
    for device in devices:
        yield device.count >= 0, f"device {device.name!r}: count of 0 or more", device.count
    count = sum(device.count for device in devices)
    names = [device.name for device in devices]
    yield count > 0, "at least one device", None
    yield count <= DEVICES_MAX, f"at most {DEVICES_MAX} devices", count
    yield len(set(names)) == len(names), "another name for each kind of device", names
    yield 0 <= scenario.arrival <= 1, "arrival from 0 to 1", scenario.arrival
    yield 1 <= scenario.slots <= 10_000_000, "slots from 1 to ten million", scenario.slots
    yield 1 <= scenario.runs <= 100_000, "runs from 1 to 100000", scenario.runs
    yield 0 < scenario.slot_s < math.inf, "slot_s above 0", scenario.slot_s
    yield scenario.sharing in ("one", "all"), 'sharing "one" or "all"', scenario.sharing
    yield scenario.queue in QUEUES, f"queue of {', '.join(QUEUES)}", scenario.queue
    yield 0 <= scenario.queue_max <= QUEUE_MAX, f"queue_max from 0 to {QUEUE_MAX}", scenario.queue_max
    yield scenario.starve_slots >= 1, "starve_slots of 1 or more", scenario.starve_slots
    for key, law in (("prompts", scenario.prompts), ("lengths", scenario.lengths)):
        expected = f"{key} as pairs of a number from 1 and its probability, which add up to 1"
        yield _is_law(law), expected, law
    for device in devices:
        for holds, expected, came in _rules_of(device):
            yield holds, f"device {device.name!r}: {expected}", came


def _rules_of(device: Simulated) -> Iterator[Rule]:
    low, high = device.harvest_joules
    energies = (device.idle_joules, device.joules_noise)
    yield bool(device.modes), "at least one power mode", None
    for mode in device.modes:
        yield mode.slots >= 1, "slots of a job from 1", mode.slots
        yield 0 <= mode.joules < math.inf, "joules of a job of 0 or more", mode.joules
    yield device.modes[0].above == 0, "a first mode above 0.0", device.modes[0].above
    yield _ascends([mode.above for mode in device.modes]), "modes that ascend in `above`", None
    yield 0 <= low <= high < math.inf, "harvest_joules as least and most", device.harvest_joules
    yield 0 <= device.capacity_joules < math.inf, "capacity_joules of 0 or more", device.capacity_joules
    yield 0 <= device.start <= 1, "start from 0 to 1", device.start
    yield 0 <= device.reserve <= device.resume <= 1, "reserve up to resume, from 0 to 1", device.reserve
    yield 0 <= device.failure <= 1, "failure from 0 to 1", device.failure
    yield device.repair_slots >= 0, "repair_slots of 0 or more", device.repair_slots
    yield 0 <= device.owner_use <= 1, "owner_use from 0 to 1", device.owner_use
    yield device.owner_slots >= 1, "owner_slots of 1 or more", device.owner_slots
    yield 0 < device.speed < math.inf, "speed above 0", device.speed
    yield all(0 <= value < math.inf for value in energies), "idle_joules, joules_noise of 0 or more", energies


def _is_law(law: Law) -> bool:
    whole = sum(probability for _, probability in law)
    return abs(whole - 1) < 1e-6 and all(number >= 1 and probability >= 0 for number, probability in law)


def _ascends(values: Sequence[float]) -> bool:
    return all(a < b for a, b in itertools.pairwise(values))

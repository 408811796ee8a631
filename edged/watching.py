"""Looks at the roles of this node once a second while it holds any: what they spend, and how fast they are.

A reading of the power sensor and what each worker computed go to the meter. Tokens that one role alone
computed, by the thread's own time, say what the device sustains of its benchmark: beside other processes a
token takes up to twice as long by the clock, and the same of the thread's time within 3 %.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass

from . import pricing, sizes, wire
from .device import Device
from .supervisor import WorkerHandle
from .types import Computed, DeviceState, EngineSpeed, ModelDescription, PlanRequest, Role

log = logging.getLogger(__name__)
EVERY_S = 1.0
USAGE_S = 5.0
ALONE = 0.5  # of the time by the clock in the thread's own, or others had the core and its caches
READING = 0.5  # of a token's time in reading weights: what is fixed beside it is known less well


@dataclass(slots=True)
class Watched:
    """A role, and what decides how fast it should be."""

    worker: WorkerHandle
    role: Role
    model: ModelDescription
    request: PlanRequest
    computed: Computed | None = None  # when last looked at


class Watch:
    """The roles of one node."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._watched: dict[str, Watched] = {}
        self._task: asyncio.Task[None] | None = None

    def begin(self, group: str, watched: Watched) -> None:
        self._watched[group] = watched
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._run())

    def end(self, group: str) -> None:
        self._watched.pop(group, None)
        self._device.meter.forget(group)

    async def used(self, group: str) -> wire.Used:
        """What a role sent, holds and spent until now."""
        watched = self._watched[group]
        spent = (await self._look()).get(group) or await _ask(watched)
        return wire.Used(
            spent.bytes_sent,
            spent.memory_bytes,
            self._device.meter.of(group, time.monotonic()),
            self._device.sustained(watched.model.weight_type),
            spent.sent,
        )

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        while self._watched:
            try:
                await self._look()
            except Exception:  # the outermost frame: the roles go on though nobody looks
                log.exception("roles not looked at")
            await asyncio.sleep(EVERY_S)

    async def _look(self) -> dict[str, wire.Spent]:
        """Hear every worker and the sensors once."""
        groups = dict(self._watched)
        answers = await asyncio.gather(*(_ask(each) for each in groups.values()), return_exceptions=True)
        found = {g: a for g, a in zip(groups, answers, strict=True) if isinstance(a, wire.Spent)}
        state, now = self._device.read(), time.monotonic()
        computed = {
            group: found[group].computed if group in found else None
            for group in groups
            if group in self._watched
        }
        busy = {group: None if each is None else each.compute_s for group, each in computed.items()}
        self._device.meter.hear(now, state.power_watts, state.power_source, busy)
        self._hear_rate(now, state, computed)
        return found

    def _hear_rate(self, now: float, state: DeviceState, computed: Mapping[str, Computed | None]) -> None:
        worked = []
        for group, after in computed.items():
            watched = self._watched[group]
            before, watched.computed = watched.computed, after
            if before is None or after is None:
                continue
            if (made := _between(before, after)).compute_s > 0:
                worked.append((watched, made))
        if worked or None in computed.values():
            self._device.worked_at = now
        if len(worked) != 1 or not self._is_alone(state, worked[0][1]):
            return  # roles slow each other down, and so do other processes
        watched, made = worked[0]
        speed = self._device.speed_of(watched.model.weight_type)
        if speed is None or (each_s := _token_s(watched, speed, made)) is None:
            return
        self._device.hear_rate(speed.weight_type, now, made.compute_s, made.token_cpu_s, made.tokens * each_s)

    def _is_alone(self, state: DeviceState, made: Computed) -> bool:
        if state.load_1m is not None and state.load_1m > self._device.threads + 1:
            return False
        return made.tokens > 0 and made.token_cpu_s >= ALONE * made.token_s


def _between(before: Computed, after: Computed) -> Computed:
    return Computed(
        after.compute_s - before.compute_s,
        after.tokens - before.tokens,
        after.token_s - before.token_s,
        after.token_cpu_s - before.token_cpu_s,
        after.positions - before.positions,
    )


def _token_s(watched: Watched, speed: EngineSpeed, made: Computed) -> float | None:
    """Seconds that such a token takes by the benchmark; None where that is no measure of it: exact numerics
    have other weights, a window waits for its disk, and a small part is mostly fixed costs."""
    role, model, request = watched.role, watched.model, watched.request
    if request.numerics == "exact" or sizes.weights_room(role, model, request):
        return None
    weights_s, beside_s = pricing.token_parts(role, model, speed, request, made.positions // made.tokens)
    return weights_s + beside_s if weights_s >= READING * (weights_s + beside_s) else None


async def _ask(watched: Watched) -> wire.Spent:
    return wire.read_body(wire.Spent, await watched.worker.call("usage", {}, USAGE_S))

"""A node that looks at its roles: what workers say they computed becomes a sustained rate, and energy."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
from edged_plugins import echo
from edged_plugins._echo_engine import describe

from edged import config, planning, pricing, wire
from edged.config import Budget, Profile
from edged.device import Device
from edged.groups import Group, Groups
from edged.peers import Peers
from edged.supervisor import Supervisor, WorkerHandle
from edged.sustaining import REST_S, WINDOW_S, WINDOWS
from edged.types import (
    Computed,
    DeviceState,
    EngineSpeed,
    ModelDescription,
    NodeView,
    PlanRequest,
    SensorEntry,
)
from edged.watching import Watch, Watched

ECHO = echo.edged_engines({})[0]
BYTES_S = 1e8
STEADY = int(WINDOW_S * WINDOWS) + 1  # looks a second apart


class Worker:
    """A worker of one role that decodes single tokens at a part of the benchmark's rate."""

    def __init__(self, token_s: float, rate: float = 1.0, cpu: float = 1.0) -> None:
        self.token_s, self.rate, self.cpu = token_s, rate, cpu
        self.computed: Computed | None = Computed()

    def work(self, seconds: float) -> None:
        done = self.computed
        assert done is not None
        tokens = round(seconds * self.rate / self.token_s)
        self.computed = Computed(
            done.compute_s + seconds,
            done.tokens + tokens,
            done.token_s + seconds,
            done.token_cpu_s + self.cpu * seconds,
            done.positions,
        )

    async def call(self, kind: str, body: Any, timeout_s: float) -> dict[str, Any]:
        return wire.to_map(wire.Spent(7, 8, self.computed))


class Rig:
    """A device with a benchmark, and roles that the test makes work."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (folder / "model").write_text("edged-echo 1\n")
        self.model = msgspec.convert(describe(str(folder / "model")), ModelDescription)
        self.role = planning.whole(NodeView("me", "phone"), self.model, "local").roles[0]
        self.state = DeviceState(power_watts=10.0, power_source="s")
        profile = Profile(budget=Budget(threads=1), device=config.Device(4.0, 20.0, None, 80.0))
        sensor = SensorEntry("s", lambda: self.state)
        self.device = Device(profile, folder, {"s": sensor}, {ECHO.name: ECHO}, Supervisor())
        self.device._write("speed", ECHO, [msgspec.to_builtins(EngineSpeed("echo", "u8", BYTES_S, 1e9))])
        self.watch, self.now = Watch(self.device), 1000.0
        monkeypatch.setattr("time.monotonic", lambda: self.now)
        self.token_s = sum(self.parts(PlanRequest()))
        self.workers: dict[str, Worker] = {}

    def parts(self, request: PlanRequest) -> tuple[float, float]:
        speed = self.device.speed_of(self.model.weight_type)
        assert speed is not None
        return pricing.token_parts(self.role, self.model, speed, request, 0)

    def begin(self, group: str = "g", rate: float = 1.0, cpu: float = 1.0, **asked: Any) -> Worker:
        worker = self.workers[group] = Worker(self.token_s, rate, cpu)
        watched = Watched(cast(WorkerHandle, worker), self.role, self.model, PlanRequest(**asked))
        self.watch._watched[group] = watched  # without its own clock
        return worker

    async def work(self, looks: int = STEADY) -> None:
        for _ in range(looks):
            await self.watch._look()
            self.now += 1.0
            for worker in self.workers.values():
                worker.work(1.0)
        await self.watch._look()

    @property
    def sustained(self) -> float:
        (speed,) = self.device.speeds()
        assert speed.decode_bytes_s == BYTES_S  # the peak stands beside it
        return speed.sustained


def run(folder: Path, monkeypatch: pytest.MonkeyPatch, test: Callable[[Rig], Awaitable[None]]) -> None:
    rig = Rig(folder, monkeypatch)
    asyncio.run(test(rig))  # type: ignore[arg-type]


def test_what_a_hot_device_sustains_stands_beside_its_peak_until_it_rested(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def test(rig: Rig) -> None:
        rig.begin(rate=0.5)
        await rig.work(3 * STEADY)
        assert rig.sustained == pytest.approx(0.5, rel=0.05)
        assert (await rig.watch.used("g")).sustained == rig.sustained
        assert caplog.text.count("sustained rate moved") == 1
        rig.now += REST_S
        rig.state = dataclasses.replace(rig.state, temperature_celsius=79.0)
        rig.device.watch()
        assert rig.sustained < 1
        rig.state = dataclasses.replace(rig.state, temperature_celsius=60.0)
        rig.device.watch()
        assert rig.sustained == 1

    run(tmp_path, monkeypatch, test)


@pytest.mark.parametrize(
    ("changes", "worker"),
    [
        ({"load_1m": 3.5}, {}),
        ({}, {"cpu": 0.5}),
        ({}, {"numerics": "exact"}),
    ],
    ids=["other processes compute", "the core was another's", "other weights than measured"],
)
def test_a_slowness_that_is_not_the_devices_own_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], worker: dict[str, Any]
) -> None:
    async def test(rig: Rig) -> None:
        rig.state = dataclasses.replace(rig.state, **changes)
        rig.begin(rate=0.5, **worker)
        await rig.work()
        assert rig.sustained == 1

    run(tmp_path, monkeypatch, test)


def test_roles_that_slow_each_other_say_nothing_of_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(rig: Rig) -> None:
        rig.begin("a", rate=0.5)
        rig.begin("b", rate=0.5)
        await rig.work()
        assert rig.sustained == 1

    run(tmp_path, monkeypatch, test)


def test_a_new_benchmark_is_the_measure_from_then_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(rig: Rig) -> None:
        rig.begin(rate=0.5)
        await rig.work()
        assert rig.sustained < 1
        rig.device._engines = {}  # nothing takes long
        await rig.device.measure()
        assert rig.device.sustained("u8") == 1

    run(tmp_path, monkeypatch, test)


def test_the_answer_to_usage_has_what_the_role_spent_until_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(rig: Rig) -> None:
        rig.begin()
        await rig.work(10)
        used = await rig.watch.used("g")
        assert (used.bytes_sent, used.memory_bytes) == (7, 8)
        assert used.metered is not None
        assert used.metered.joules == pytest.approx(10 * (10.0 - 4.0))
        rig.watch.end("g")
        assert rig.device.meter.of("g", rig.now) is None

    run(tmp_path, monkeypatch, test)


class Said:
    """Peers whose answers to `usage` the test chooses."""

    def __init__(self) -> None:
        self.sustained = [1.0, 1.0]

    def takes(self, kind: str, take: Any) -> None: ...

    def when_gone(self, callback: Any) -> None: ...

    async def ask(self, node_id: str, kind: str, body: Any, timeout_s: float) -> dict[str, Any]:
        return wire.to_map(wire.Used(0, 0, sustained=self.sustained[int(node_id)]))


@pytest.mark.parametrize(
    ("later", "moved"),
    [
        ([1.0, 1.0], []),
        ([1.0, 0.5], ["1"]),
        ([0.4, 0.5], ["0", "1"]),
        ([1.0, float("nan")], []),
        ([0.0, 1.0], []),
    ],
)
def test_a_group_gets_no_new_job_once_a_node_of_it_sustains_another_rate(
    later: list[float], moved: list[str]
) -> None:
    async def test() -> None:
        peers = Said()
        groups = Groups(cast(Peers, peers), 1.0)
        load = SimpleNamespace(roles=[SimpleNamespace(node_id="0"), SimpleNamespace(node_id="1")], key=("k",))
        group = Group("g", cast(Any, load), cast(Any, None), cast(Any, None))
        told: list[str] = []
        groups.when_rate_moved = told.append
        groups._groups["g"] = groups._by_key["k",] = group
        await groups.used(group)
        peers.sustained = later
        for _ in range(2):  # it is told once
            await groups.used(group)
        assert told == moved
        assert (("k",) in groups._by_key) == (not moved) == (not group.has_moved_rate)

    asyncio.run(test())

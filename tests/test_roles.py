"""Roles as they are offered: what they are admitted with, by real workers of the echo engine."""

from __future__ import annotations

import asyncio
import dataclasses
import os
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from edged_plugins import echo

from edged import models, planning, sizes, wire
from edged.adapters import AdapterStore
from edged.config import Budget, Network, Profile
from edged.datasets import DataStore
from edged.device import Device
from edged.errors import ConfigError, EdgedError, EngineError, PeerError, PolicyViolation, ProtocolError
from edged.identity import Home
from edged.ingest import ingest
from edged.lending import Lending
from edged.models import ModelStore
from edged.peers import Peers
from edged.plugins import Host
from edged.roles import BESIDE_MAX, Roles
from edged.supervisor import Supervisor
from edged.transfers import Transfers
from edged.types import (
    AdapterFile,
    DeviceState,
    EngineEntry,
    NodeView,
    PlanRequest,
    Predicted,
    SensorEntry,
    Training,
    TrainingCost,
    TrainingPlan,
)

ECHO = echo.edged_engines({})[0]
WINDOWED = dataclasses.replace(ECHO, window_bytes=1)
CONTEXT = 512
PLENTY = 64 << 30


def check(table: Mapping[str, Any]) -> Mapping[str, Any]:
    if set(table) != {"steps"}:
        raise ConfigError("expected steps")
    return table


TRAINING = Training(
    "sums", "echo", check, lambda *_: TrainingPlan({}), lambda *_: TrainingCost(), "nowhere:load"
)
JOB = "0123456789abcdef"


class Stranger:
    """The side of the network: takes the answers that a node registers, and asks nobody."""

    identity = SimpleNamespace(node_id="me", name="phone")
    membership = SimpleNamespace(member=lambda node_id: None)

    def __init__(self) -> None:
        self.offered: Callable[[str, wire.Offer], Awaitable[Any]] | None = None
        self.answer: dict[str, Callable[[str, Any], Awaitable[Any]]] = {}
        self.taken: dict[str, Callable[[str, Any], None]] = {}

    def answers(self, kind: str, answer: Any) -> None:
        self.answer[kind] = answer
        if kind == "offer":
            self.offered = answer

    def takes(self, kind: str, take: Any) -> None:
        self.taken[kind] = take

    def when_gone(self, callback: Any) -> None: ...


class Rig:
    """One node with an echo model, and free memory as the test says."""

    def __init__(self, folder: Path, engine: EngineEntry) -> None:
        home = Home(folder)
        home.models.mkdir(parents=True)
        home.cache.mkdir(parents=True)
        source = folder / "source"
        source.write_text("edged-echo 1\n")
        with source.open("rb") as file:
            params = {"source_fd": file.fileno(), "name": "m", "models": str(home.models)}
            added = ingest(params | {"describe": [["echo", ECHO.describe]]}, lambda event: None)
        store, self.supervisor, self.peers = ModelStore(home), Supervisor(), Stranger()
        self.manifest = store.manifest(added["sha256"])
        self.engine, self.free = engine, PLENTY
        engines, peers = {engine.name: engine}, cast("Peers", self.peers)
        profile = Profile(budget=Budget(memory_share=1.0), network=Network(interfaces=("lo",)))
        sensor = SensorEntry("free", lambda: DeviceState(memory_free=self.free))
        self.device = Device(profile, home.cache, {"free": sensor}, engines, self.supervisor)
        transfers = Transfers(home, profile, store, Lending(), peers, self.supervisor, engines)
        self.data, self.counted = DataStore(home, self.supervisor), 0
        counting = Training(
            "abacus", "echo", dict, lambda *_: TrainingPlan({}), lambda *_: TrainingCost(), "none:none",
            memory=lambda settings, model, roles, rank: self.counted,
        )  # fmt: skip
        self.trainings = {"sums": TRAINING, "abacus": counting}
        self.roles = Roles(
            profile, peers, Host(), self.device, self.supervisor, transfers, engines, self.trainings,
            {}, self.data, AdapterStore(home), home.training,
        )  # fmt: skip
        [role] = planning.whole(NodeView("me", "phone"), self.manifest.model, "local").roles
        self.role = role
        asked = PlanRequest(context_tokens=CONTEXT)
        self.full = sizes.memory_of(role, self.manifest.model, asked)
        self.least = sizes.least_memory_of(role, self.manifest.model, asked, engine.window_bytes)

    async def offer(
        self,
        group: str = "g",
        memory_bytes: int = 0,
        training: wire.TrainingOffer | None = None,
        adapter: AdapterFile | None = None,
        **model: Any,
    ) -> None:
        described = dataclasses.replace(self.manifest.model, **model)
        role = dataclasses.replace(self.role, memory_bytes=memory_bytes)
        assert self.peers.offered is not None
        await self.peers.offered(
            "coordinator",
            wire.Offer(
                group, 0, (role,), self.manifest.sha256, "m", models.manifest_hash(self.manifest), described,
                self.engine.name, CONTEXT, "fast", (), "me", training=training, adapter=adapter,
            ),
        )  # fmt: skip


def run(folder: Path, test: Callable[[Rig], Awaitable[None]], engine: EngineEntry = ECHO) -> None:
    async def bounded() -> None:
        rig = Rig(folder, engine)
        try:
            await test(rig)
        finally:
            await rig.roles.close()
            await rig.supervisor.close()

    asyncio.run(bounded())


@pytest.mark.parametrize("claimed", [0, 1])
def test_a_role_counts_with_what_it_needs_whatever_it_claims(tmp_path: Path, claimed: int) -> None:
    async def test(rig: Rig) -> None:
        await rig.offer(memory_bytes=claimed)
        assert rig.roles.memory_taken == rig.full
        rig.roles._end("g", "the test is done with it")
        assert rig.roles.memory_taken == rig.roles.memory_promised == 0

    run(tmp_path, test)


def test_a_role_takes_what_this_node_knows_of_the_model_not_what_the_offer_says(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        await rig.offer(layer_bytes=(0,) * rig.manifest.model.layers, kv_heads=1)
        assert rig.roles.memory_taken == rig.full
        assert rig.roles._held["g"].model == rig.manifest.model

    run(tmp_path, test)


@pytest.mark.parametrize(("claimed", "counted"), [(0, 700 << 20), (900 << 20, 0), (500 << 20, 600 << 20)])
def test_a_training_counts_with_the_larger_of_what_is_claimed_and_what_is_counted_here(
    tmp_path: Path, claimed: int, counted: int
) -> None:
    training = wire.TrainingOffer("0" * 16, "abacus", {})

    async def test(rig: Rig) -> None:
        rig.counted, most = counted, max(claimed, counted)
        await rig.offer(memory_bytes=claimed, training=training)
        assert rig.roles.memory_taken == most
        rig.roles._end("g", "the test is done with it")
        rig.free = most - 1
        with pytest.raises(PolicyViolation, match="by its own count") as caught:
            await rig.offer(memory_bytes=claimed, training=training)
        for needed in (max(counted, sizes.WORKER_BYTES), claimed):
            assert f"{needed >> 20} MiB" in str(caught.value)
        assert rig.roles.memory_taken == 0

    run(tmp_path, test)


@pytest.mark.parametrize("model", [{"heads": 0}, {"vocab": 0}, {"kv_heads": -6}], ids=str)
def test_a_model_with_figures_that_none_has_is_refused(tmp_path: Path, model: dict[str, int]) -> None:
    async def test(rig: Rig) -> None:
        with pytest.raises(ProtocolError, match="within the model's size"):
            await rig.offer(**model)

    run(tmp_path, test)


def test_a_budget_that_shrank_makes_the_window_smaller_and_refuses_below_the_least(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        rig.free = rig.full - 1
        await rig.offer(memory_bytes=rig.full)
        assert rig.roles.memory_taken == rig.free
        rig.roles._end("g", "the test is done with it")
        rig.free = rig.least - 1
        with pytest.raises(PolicyViolation, match="phone: its part needs at least"):
            await rig.offer(memory_bytes=rig.full)
        assert rig.roles.memory_taken == 0

    run(tmp_path, test, WINDOWED)


def test_memory_that_is_promised_and_not_touched_is_not_given_twice(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        rig.free = 2 * rig.full - 1
        first, second = asyncio.create_task(rig.offer("a")), asyncio.create_task(rig.offer("b"))
        await first  # while it was on its way in, nothing of it was resident
        with pytest.raises(PolicyViolation, match="its part needs at least"):
            await second
        [worker] = [held.worker for held in rig.roles._held.values()]
        assert rig.device.resident(worker.pid) > 0
        assert 0 <= rig.roles.memory_promised < rig.full

    run(tmp_path, test)


def test_an_engine_that_asks_outside_does_so_for_nobody_else(tmp_path: Path) -> None:
    """Whoever pays for an endpoint decides who uses it."""

    async def test(rig: Rig) -> None:
        with pytest.raises(PolicyViolation, match="phone asks its own endpoint for its own jobs only"):
            await rig.offer()
        assert rig.roles.memory_taken == 0

    run(tmp_path, test, dataclasses.replace(ECHO, stated=Predicted(tpot_ms=1.0)))


@pytest.mark.parametrize(
    ("adapter", "kind", "says"),
    [
        (AdapterFile("a" * 64, 1), EngineError, "phone: its engine 'echo' applies no adapters"),
        (AdapterFile("../" + "a" * 61, 1), ProtocolError, "by its SHA-256 and size"),
        (AdapterFile("a" * 64, -(1 << 40)), ProtocolError, "by its SHA-256 and size"),
        (AdapterFile("a" * 64, 1 << 60), ProtocolError, "by its SHA-256 and size"),
    ],
    ids=lambda value: "",
)
def test_an_offer_s_adapter_is_one_that_can_be_applied(
    tmp_path: Path, adapter: AdapterFile, kind: type[Exception], says: str
) -> None:
    """A name that is a path, or a size that makes others' memory look free, is no adapter."""

    async def test(rig: Rig) -> None:
        with pytest.raises(kind, match=says):
            await rig.offer(adapter=adapter)
        assert rig.roles.memory_taken == 0

    run(tmp_path, test)


# --- trainings ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"kind": "products"}, EngineError, "phone has no training 'products'; loaded: abacus, sums"),
        ({"settings": {"steps": 1, "rank": 2}}, ConfigError, "phone: expected steps"),
        ({"data": "absent"}, ConfigError, "phone: .*absent"),
        ({"data": "../absent"}, ConfigError, "phone: .*absent"),
        ({"data": "job-fedcba9876543210-0"}, ConfigError, "phone: .*job-fedcba"),
    ],
    ids=str,
)
def test_a_training_that_cannot_run_here_is_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], error: type[Exception], says: str
) -> None:
    async def test(rig: Rig) -> None:
        offered = dataclasses.replace(wire.TrainingOffer(JOB, "sums", {"steps": 1}), **changes)
        with pytest.raises(error, match=says):
            await rig.offer(training=offered)
        assert rig.roles.memory_taken == rig.roles.count == 0

    run(tmp_path, test)


def test_an_adapter_counts_in_a_role_s_memory(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        rig.free = rig.full + 99
        with pytest.raises(PolicyViolation, match="phone: its part needs at least"):
            await rig.offer(adapter=AdapterFile("a" * 64, 100))

    run(tmp_path, test, dataclasses.replace(ECHO, adapters=True))


@pytest.mark.parametrize(
    "job", ["", "../../../etc", "0123456789ABCDEF", "0123456789abcdef0", "0123/56789abcdef"]
)
def test_a_job_s_id_names_no_other_folder(job: str) -> None:
    offered = wire.to_map(wire.TrainingOffer(job, "sums", {}))
    with pytest.raises(ProtocolError, match="job"):
        wire.read_body(wire.TrainingOffer, offered)


@pytest.mark.parametrize(
    ("rights", "training", "is_refused"),
    [
        (("submit",), True, True),
        (("train",), True, False),
        (("train",), False, True),
        (("submit",), False, False),
    ],
)
def test_who_may_train_here_and_who_may_generate_are_two_rights(
    tmp_path: Path, rights: tuple[str, ...], training: bool, is_refused: bool
) -> None:
    async def test(rig: Rig) -> None:
        member = SimpleNamespace(name="desk", rights=rights)
        rig.peers.membership = SimpleNamespace(member=lambda node_id: member)  # type: ignore[misc]
        offered = wire.TrainingOffer(JOB, "sums", {"steps": 1}) if training else None
        if is_refused:
            with pytest.raises(PolicyViolation, match="phone: desk has no right") as caught:
                await rig.offer(training=offered)
            assert caught.value.code == "no-right"
        else:
            await rig.offer(training=offered)
            assert rig.roles.count == 1

    run(tmp_path, test)


def test_an_offer_whose_stop_came_with_it_starts_nothing(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        rig.peers.taken["stop"]("coordinator", wire.Stop("g"))
        with pytest.raises(PeerError, match="stopped already"):
            await rig.offer("g")
        rig.peers.taken["stop"]("somebody else", wire.Stop("h"))
        await rig.offer("h")
        assert rig.roles.count == 1

    run(tmp_path, test)


# --- adapters beside a model ------------------------------------------------------------------------

SWAPPING = dataclasses.replace(ECHO, adapters=True, swaps=True)
MIB = 1 << 20


def _content_of(path: str) -> bytes:
    return Path(path).read_bytes() if path else b""


class Beside:
    """A role that is held, its worker and its transfers only remembering what they are asked."""

    def __init__(self, rig: Rig, file: Path) -> None:
        self.rig, self.told, self.fails = rig, list[dict[str, Any]](), list[EdgedError]()
        self.came, self.answers = asyncio.Event(), asyncio.Event()  # an adapter; the worker
        self.came.set()
        self.answers.set()
        self.worker = rig.roles._held["g"].worker
        self.worker.call = self._call
        rig.roles._transfers = cast(
            "Any",
            SimpleNamespace(ensure_adapter=self._ensure, open_adapter=lambda *_: os.open(file, os.O_RDONLY)),
        )

    async def _ensure(self, offer: wire.Offer, coordinator: str) -> None:
        await self.came.wait()

    async def _call(self, kind: str, body: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        assert kind == "adapt"
        if self.fails:
            raise self.fails.pop()
        self.told.append(body | {"content": _content_of(body["path"])})
        await self.answers.wait()
        return {}

    async def adapt(
        self, number: int = 0, size: int = 0, coordinator: str = "coordinator", **more: Any
    ) -> None:
        file = AdapterFile("a" * 64, size) if size else None
        await self.rig.peers.answer["adapt"](coordinator, wire.Adapt("g", number, file, **more))


def test_an_adapter_counts_beside_its_role_until_it_is_given_back(tmp_path: Path) -> None:
    """The worker is given what the daemon has open, whatever becomes of the name."""
    (tmp_path / "file").write_bytes(b"lora")

    async def test(rig: Rig) -> None:
        await rig.offer()
        before, beside = rig.roles.memory_taken, Beside(rig, tmp_path / "file")
        await beside.adapt(1, 5 * MIB)
        await beside.adapt(2, 7 * MIB)
        assert beside.told[0]["content"] == b"lora"
        assert rig.roles.memory_taken == before + 12 * MIB
        await beside.adapt(forgets=(1,))
        assert rig.roles.memory_taken == before + 7 * MIB
        await beside.adapt(undoes=2)
        await beside.adapt(undoes=2)
        assert rig.roles.memory_taken == before
        assert [each["forgets"] for each in beside.told] == [(), (), (1,), (), ()]
        beside.fails.append(EngineError("it adapts another model"))
        with pytest.raises(EngineError, match="phone: it adapts another model"):
            await beside.adapt(3, MIB)
        assert rig.roles.memory_taken == before

    run(tmp_path, test, SWAPPING)


@pytest.mark.parametrize("is_busy", [False, True])
def test_an_adapter_that_is_given_back_while_it_comes_is_not_loaded(tmp_path: Path, is_busy: bool) -> None:
    """A worker that is busy may not have heard of that when the adapter is here."""

    async def test(rig: Rig) -> None:
        await rig.offer()
        before, beside = rig.roles.memory_taken, Beside(rig, tmp_path / "none")
        beside.came.clear()
        comes = asyncio.ensure_future(beside.adapt(1, 5 * MIB))
        await asyncio.sleep(0)
        if is_busy:
            beside.answers.clear()
        undone = asyncio.ensure_future(beside.adapt(undoes=1))
        await asyncio.sleep(0)
        assert undone.done() != is_busy
        with pytest.raises(ProtocolError, match="a new number"):  # while it comes it counts
            await beside.adapt(1, MIB)
        assert rig.roles.memory_taken == before + 5 * MIB
        beside.came.set()
        with pytest.raises(PeerError, match="phone: the adapter was given back while it came"):
            await comes
        beside.answers.set()
        await undone
        assert [each["path"] for each in beside.told] == [""]
        assert rig.roles.memory_taken == before

    run(tmp_path, test, SWAPPING)


def test_an_adapter_counts_no_more_once_its_worker_was_told_unless_it_says_no(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"lora")

    async def test(rig: Rig) -> None:
        await rig.offer()
        before, beside = rig.roles.memory_taken, Beside(rig, tmp_path / "file")
        await beside.adapt(1, 5 * MIB)
        beside.fails.append(PolicyViolation("a job waits for it"))
        with pytest.raises(PolicyViolation):
            await beside.adapt(forgets=(1,))
        assert rig.roles.memory_taken == before + 5 * MIB
        beside.fails.append(EngineError("expected the worker to adapt within 300 s", code="worker-silent"))
        with pytest.raises(EngineError):
            await beside.adapt(forgets=(1,))
        assert rig.roles.memory_taken == before
        await beside.adapt(2, 7 * MIB)
        beside.answers.clear()
        cut_off = asyncio.ensure_future(beside.adapt(forgets=(2,)))
        await asyncio.sleep(0)
        assert rig.roles.memory_taken == before + 7 * MIB
        cut_off.cancel()
        await asyncio.wait([cut_off])
        assert rig.roles.memory_taken == before

    run(tmp_path, test, SWAPPING)


def test_an_adapter_without_room_or_right_is_refused_and_counts_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"lora")

    async def test(rig: Rig) -> None:
        await rig.offer()
        before, beside = rig.roles.memory_taken, Beside(rig, tmp_path / "file")
        rig.free = rig.roles.memory_promised + 4 * MIB
        with pytest.raises(
            PolicyViolation, match="phone: the adapter needs 5 MiB beside the model"
        ) as caught:
            await beside.adapt(1, 5 * MIB)
        assert caught.value.code == "no-room-for-adapter"
        rig.free = PLENTY
        with pytest.raises(PeerError, match="holds no such role"):
            await beside.adapt(1, MIB, coordinator="stranger")
        with pytest.raises(ProtocolError, match="a new number"):
            await beside.adapt(0, MIB)
        await beside.adapt(1, MIB)
        with pytest.raises(ProtocolError, match="a new number"):
            await beside.adapt(1, MIB)
        for number in range(2, BESIDE_MAX + 1):
            await beside.adapt(number, MIB)
        with pytest.raises(ProtocolError, match=f"at most {BESIDE_MAX} adapters"):
            await beside.adapt(BESIDE_MAX + 1, MIB)
        assert rig.roles.memory_taken == before + BESIDE_MAX * MIB

    run(tmp_path, test, SWAPPING)


def test_an_engine_that_loads_a_model_for_each_adapter_takes_none_beside_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"lora")

    async def test(rig: Rig) -> None:
        await rig.offer()
        with pytest.raises(EngineError, match="phone: its engine 'echo' takes no adapter beside"):
            await Beside(rig, tmp_path / "file").adapt(1, MIB)

    run(tmp_path, test, dataclasses.replace(ECHO, adapters=True))

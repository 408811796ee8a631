"""Adapters beside a group's model: who loads which, who makes room, what is undone; nodes only answer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from types import SimpleNamespace
from typing import Any, cast

import pytest

from edged import groups as groups_module
from edged import roles, wire, worker
from edged.errors import EngineError, PeerError, PolicyViolation
from edged.groups import BESIDE_MAX, Group, Groups
from edged.peers import Peers
from edged.types import AdapterFile

NODES = ("laptop", "phone")


class Members:
    """Two nodes that have room for `room` adapters, and remember what they hold and were told."""

    def __init__(self, room: int = 100, broken: str = "") -> None:
        self.room, self.broken = room, broken
        self.held: dict[str, list[int]] = {name: [] for name in NODES}
        self.loads = 0

    def takes(self, kind: str, taken: object) -> None: ...

    def when_gone(self, told: object) -> None: ...

    def name_of(self, node_id: str) -> str:
        return node_id

    def tell_when_online(self, node_id: str, kind: str, body: object) -> None:
        if kind == "stop" and node_id == "phone":
            self.room += 1  # where a group's worker was

    async def ask(self, node_id: str, kind: str, body: wire.Adapt, timeout_s: float) -> dict[str, Any]:
        await asyncio.sleep(0)  # on its way
        held = self.held[node_id]
        for number in (*body.forgets, body.undoes):
            if number in held:
                held.remove(number)
        await asyncio.sleep(0)
        if body.file is None:
            return {}
        self.loads += 1
        if node_id == "phone" and len(held) >= self.room:
            raise PolicyViolation("phone: no room", code="no-room-for-adapter")
        if node_id == self.broken:
            raise EngineError(f"{node_id}: it does not fit")
        held.append(body.number)
        return {}


def file(number: int) -> AdapterFile:
    return AdapterFile(f"{number:064x}", 1000)


def running(
    members: Members, work: Callable[[Groups, Group], Coroutine[Any, Any, None]], guard_s: float = 20.0
) -> None:
    async def run() -> None:
        groups = Groups(cast(Peers, members), 60.0)
        roles = tuple(SimpleNamespace(node_id=name, rank=rank) for rank, name in enumerate(NODES))
        load = SimpleNamespace(roles=roles, key=("k",), adapter=None, training=())
        group = Group("g", cast(Any, load), cast(Any, None), cast(Any, None), swaps=True)
        groups._groups["g"] = groups._by_key[("k",)] = group
        async with asyncio.timeout(guard_s):
            await work(groups, group)

    asyncio.run(run())


def test_jobs_with_the_same_adapter_load_it_once_and_every_node_has_it() -> None:
    members = Members()

    async def work(groups: Groups, group: Group) -> None:
        numbers = await asyncio.gather(*(groups.adapt(group, f"job{i}", file(1)) for i in range(3)))
        assert len(set(numbers)) == 1
        assert members.held == {name: [numbers[0]] for name in NODES}
        assert members.loads == len(NODES)
        assert groups.users_of(file(1).sha256) == set(NODES)
        assert groups.users_of(file(2).sha256) == set()

    running(members, work)


def test_the_longest_unused_adapter_makes_room_and_none_that_a_job_runs_with() -> None:
    members = Members()

    async def work(groups: Groups, group: Group) -> None:
        numbers = {i: await groups.adapt(group, f"job{i}", file(i)) for i in range(BESIDE_MAX)}
        for i in (2, 1):
            groups.release(group, f"job{i}")
        assert await groups.adapt(group, "again", file(2)) == numbers[2]  # used last
        groups.release(group, "again")
        await groups.adapt(group, "more", file(100))
        assert numbers[1] not in members.held["laptop"]
        assert set(numbers.values()) - {numbers[1]} < set(members.held["laptop"])
        await groups.adapt(group, "last", file(101))
        assert numbers[2] not in members.held["phone"]
        waits = asyncio.ensure_future(groups.adapt(group, "waits", file(102)))
        await asyncio.sleep(0.05)
        assert not waits.done()  # every one is used
        groups.release(group, "job5")
        await waits
        assert numbers[5] not in members.held["phone"]
        assert len(members.held["phone"]) == BESIDE_MAX

    running(members, work)


def test_a_node_without_room_gets_it_from_unused_ones_or_the_job_is_refused() -> None:
    members = Members(room=2)

    async def work(groups: Groups, group: Group) -> None:
        for i in range(2):
            await groups.adapt(group, f"job{i}", file(i))
        groups.release(group, "job0")
        number = await groups.adapt(group, "job2", file(2))
        assert {number} < set(members.held["laptop"]) == set(members.held["phone"])
        with pytest.raises(PolicyViolation, match="no room"):
            await groups.adapt(group, "job3", file(3))
        assert len(members.held["laptop"]) == 2  # what it had loaded already was undone
        groups.release(group, "job1")
        await groups.adapt(group, "job3", file(3))

    running(members, work)


def test_of_two_adapters_at_once_neither_is_refused_for_the_room_that_is_made_for_the_other() -> None:
    members = Members(room=2)

    async def work(groups: Groups, group: Group) -> None:
        for i in range(2):
            await groups.adapt(group, f"job{i}", file(i))
            groups.release(group, f"job{i}")
        numbers = await asyncio.gather(*(groups.adapt(group, f"new{i}", file(i)) for i in (2, 3)))
        assert {name: sorted(held) for name, held in members.held.items()} == dict.fromkeys(
            NODES, sorted(numbers)
        )

    running(members, work)


def test_where_every_adapter_is_used_idle_groups_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """A group that works, and one of which nobody is left who wants the adapter, ends none."""
    monkeypatch.setattr(groups_module, "SETTLE_S", 0.0)
    members = Members(room=1)

    async def work(groups: Groups, group: Group) -> None:
        idle, works = (
            Group(name, cast(Any, SimpleNamespace(roles=group.load.roles, key=name)), group.asked,
                  group.candidate, load_ms=1.0)
            for name in ("idle", "works")
        )  # fmt: skip
        groups.enter(works, "another")
        groups._groups |= {"idle": idle, "works": works}
        await groups.adapt(group, "job0", file(0))
        gone = asyncio.ensure_future(groups.adapt(group, "gone", file(9)))
        await asyncio.sleep(0)
        made = cast("asyncio.Task[None]", group.beside[file(9).sha256].made)
        gone.cancel()
        groups.release(group, "gone")
        await asyncio.wait([made])
        assert set(groups._groups) == {"g", "idle", "works"}
        await groups.adapt(group, "job1", file(1))
        assert set(groups._groups) == {"g", "works"}
        assert len(members.held["phone"]) == 2
        with pytest.raises(PolicyViolation, match="no room"):
            await groups.adapt(group, "job2", file(2))
        assert set(groups._groups) == {"g", "works"}

    running(members, work)


def test_what_is_given_back_is_so_though_the_job_that_wanted_its_room_ends() -> None:
    members = Members()

    async def work(groups: Groups, group: Group) -> None:
        numbers = [await groups.adapt(group, f"job{i}", file(i)) for i in range(BESIDE_MAX)]
        groups.release(group, "job0")
        more = asyncio.ensure_future(groups.adapt(group, "more", file(100)))
        await asyncio.sleep(0)
        more.cancel()
        await asyncio.wait([more])
        for _ in range(3):  # to the nodes and back
            await asyncio.sleep(0)
        assert members.held == dict.fromkeys(NODES, numbers[1:])

    running(members, work)


def test_a_worker_within_a_piece_of_a_prompt_is_waited_for_and_its_node_gives_up_first() -> None:
    tokens_per_s = 2.0  # of a large model on a small device
    assert worker.PIECE_TOKENS / tokens_per_s < roles.ADAPT_S < groups_module.ADAPT_S


def test_what_one_node_cannot_load_leaves_nothing_on_the_other() -> None:
    members = Members(broken="phone")

    async def work(groups: Groups, group: Group) -> None:
        with pytest.raises(EngineError, match="phone: it does not fit"):
            await groups.adapt(group, "job", file(1))
        assert members.held == {name: [] for name in NODES}
        assert not group.beside
        members.broken = ""
        await groups.adapt(group, "job", file(1))

    running(members, work)


def test_who_waits_for_an_adapter_to_be_free_hears_of_a_loss() -> None:
    async def work(groups: Groups, group: Group) -> None:
        for i in range(BESIDE_MAX):
            await groups.adapt(group, f"job{i}", file(i))
        waits = asyncio.ensure_future(groups.adapt(group, "waits", file(100)))
        await asyncio.sleep(0)
        groups.lose(group, "phone", "it is gone")
        with pytest.raises(PeerError, match="node phone was lost"):
            await waits

    running(Members(), work)


def test_an_adapter_whose_job_went_while_it_was_loaded_makes_room_when_it_is_there_and_not_before() -> None:
    members = Members()

    async def work(groups: Groups, group: Group) -> None:
        for i in range(BESIDE_MAX - 1):
            await groups.adapt(group, f"job{i}", file(i))
        loads = asyncio.ensure_future(groups.adapt(group, "gone", file(50)))
        await asyncio.sleep(0)
        loads.cancel()
        groups.release(group, "gone")
        number = await groups.adapt(group, "next", file(51))
        expected = sorted(beside.number for beside in group.beside.values())
        assert len(expected) == BESIDE_MAX
        assert number in expected
        assert {name: sorted(held) for name, held in members.held.items()} == dict.fromkeys(NODES, expected)

    running(members, work)

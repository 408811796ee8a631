"""Loaded plans: workers on one or more nodes that together hold a model, reused while they stand.

A group is prepared by offering each rank its role, then telling every rank where the others are.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import logging
import secrets
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from . import wire
from .errors import EdgedError, PeerError, PolicyViolation, ProtocolError
from .peers import Peers
from .types import AdapterFile, CacheType, Candidate, NodeView, Numerics, PlanRequest, Right, Role, Zone

log = logging.getLogger(__name__)
OFFER_S = 330.0  # an engine's first self-check may take that long
FETCH_BYTES_S = 0.5e6  # a model travels at least this fast, or its transfer ends by itself first
START_S = 90.0
GROUPS_MAX = 8
BESIDE_MAX = 8  # adapters beside one group's model: as many as a node keeps of another's
ADAPT_S = 360.0  # for a worker to have one beside its model, when it is here; its node gives up before
SETTLE_S = 1.0  # for ended workers to give their memory back
REASON_CHARS_MAX = 200  # of another node's words, which a person reads
Listeners = Mapping[tuple[int, int], int]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Load:
    """What a group holds; equal loads share a group."""

    roles: tuple[Role, ...]
    manifest: wire.Manifest
    manifest_sha256: str
    engine: str
    context_tokens: int
    numerics: Numerics
    holder: str  # a node that gives the file to those who lack it
    cache_tokens: int
    cache_type: CacheType
    training: tuple[wire.TrainingOffer, ...] = ()  # by rank; empty: it generates
    adapter: AdapterFile | None = None
    optional: frozenset[int] = frozenset()  # ranks of a training without which it goes on
    engines: tuple[str, ...] = ()  # of a training, by rank; empty: `engine` for all

    @property
    def key(self) -> tuple[object, ...]:
        cache = (self.context_tokens, self.cache_tokens, self.cache_type)
        jobs = tuple(offer.job for offer in self.training)
        loaded = (self.manifest.sha256, self.engine, self.numerics, self.adapter)
        return (jobs, self.roles, loaded, cache)


@dataclass(frozen=True, slots=True)
class Member:
    """A node, and what decides whether a job may use it."""

    node_id: str
    zone: Zone
    rights: tuple[Right, ...]


@dataclass(frozen=True, slots=True)
class Asked:
    """What a group was planned for: an equal question gets it again, without a new plan."""

    model_sha256: str
    request: PlanRequest
    members: frozenset[Member]  # who was online, and as what: a newcomer may make another plan better


@dataclass(slots=True)
class Beside:
    """An adapter beside a group's model. `jobs`: that run with it."""

    number: int
    file: AdapterFile
    jobs: set[str]
    made: asyncio.Task[None] | None = None  # until every rank has it


@dataclass(slots=True)
class Group:
    group_id: str
    load: Load
    asked: Asked
    candidate: Candidate
    jobs: set[str] = field(default_factory=set)
    idle_since: float = 0.0
    load_ms: float = 0.0
    lost: PeerError | None = None
    lost_node: str = ""  # whose loss that was, or who took no role in it
    made: asyncio.Task[None] | None = None  # until it is loaded
    heard_at: float = 0.0  # when its last token came, of whichever job
    tokens: int = 0  # that came, of all jobs
    sustained: tuple[float, ...] = ()  # what its nodes sustained when they were first asked; 0: unknown
    has_moved_rate: bool = False  # one of them sustains another part since
    swaps: bool = False  # its engine takes adapters beside the model
    beside: dict[str, Beside] = field(default_factory=dict)  # these, by SHA-256, the longest unused first
    freed: asyncio.Event = field(default_factory=asyncio.Event)  # a job left; somebody may wait for that
    adapting: asyncio.Lock = field(default_factory=asyncio.Lock)  # two at once would take each other's room
    started: tuple[wire.Started, ...] = ()  # what each rank said when it was loaded; nothing, of one away
    away: dict[int, str] = field(default_factory=dict)  # optional ranks that have no part any more, and why
    refused: set[int] = field(default_factory=set)  # of these, who is there and said no: asking again is vain

    @property
    def rank_0(self) -> str:
        """The node that drives the others."""
        return self.load.roles[0].node_id

    @property
    def own_members(self) -> set[Member]:
        """Those that have a role in it, as what they were when it was planned."""
        nodes = {role.node_id for role in self.load.roles}
        return {member for member in self.asked.members if member.node_id in nodes}

    @property
    def is_made(self) -> bool:
        """Is loading over, well or not?"""
        return self.made is not None and self.made.done()


class Groups:
    """The groups that this node coordinates."""

    def __init__(self, peers: Peers, idle_s: float) -> None:
        self._peers, self._idle_s = peers, idle_s
        self._numbers = itertools.count(1)  # of adapters; none is used again
        self._groups: dict[str, Group] = {}
        self._by_key: dict[tuple[object, ...], Group] = {}
        self._when_lost: list[Callable[[Group], None]] = []
        self.when_rate_moved: Callable[[str], None] = lambda node_id: None
        peers.takes("lost", self._told_lost)
        self.when_left: Callable[[Group, int, str], None] = lambda group, rank, reason: None
        self.when_resting: Callable[[Group, str, str], None] = lambda group, node_id, reason: None
        peers.takes("draining", self._told_draining)
        peers.takes("resting", self._told_resting)
        peers.takes("short", self._told_short)
        peers.when_gone(self._peer_gone)

    def when_lost(self, told: Callable[[Group], None]) -> None:
        """Have a group's loss told: `group.lost` says whose it was."""
        self._when_lost.append(told)

    def standing(self, asked: Asked) -> Group | None:
        """A group that was planned for the same question among the same members."""
        groups = self._by_key.values()
        return next((g for g in groups if g.asked.members == asked.members and _answers(g, asked)), None)

    def still_serving(self, asked: Asked) -> Group | None:
        """A group that was planned for the same question, and whose own members are what they were."""
        groups = self._by_key.values()
        return next((g for g in groups if g.own_members <= asked.members and _answers(g, asked)), None)

    def users_of(self, adapter_sha256: str) -> set[str]:
        """The nodes of the groups that run with this adapter, or are about to."""
        groups = [
            group
            for group in self._groups.values()
            if adapter_sha256 in group.beside
            or (group.load.adapter and group.load.adapter.sha256 == adapter_sha256)
        ]
        return {role.node_id for group in groups for role in group.load.roles}

    def begin(
        self,
        load: Load,
        asked: Asked,
        candidate: Candidate,
        nodes: Mapping[str, NodeView],
        swaps: bool = False,
    ) -> Group:
        """A standing group for this load, else a new one that begins to load; `enter` it at once. `swaps`: as
        its engine's entry says."""
        group = self._by_key.get(load.key)
        if group is None:
            self._end_oldest()
            group = Group(
                secrets.token_hex(8), load, asked, candidate, idle_since=time.monotonic(), swaps=swaps
            )
            self._groups[group.group_id] = self._by_key[load.key] = group
            group.made = asyncio.get_running_loop().create_task(self._make(group, nodes))
            group.made.add_done_callback(_looked_at)
        return group

    def enter(self, group: Group, job: str) -> None:
        """`job` uses the group until `release`."""
        group.jobs.add(job)

    async def loaded(self, group: Group, job: str) -> float:
        """Wait until the group that `job` entered is loaded, or release it; the ms spent waiting."""
        started = time.monotonic()
        assert group.made is not None
        if group.made.done():
            group.made.result()
            return 0.0
        try:
            await asyncio.shield(group.made)
        except BaseException:
            self.release(group, job)
            raise
        return (time.monotonic() - started) * 1000

    async def adapt(self, group: Group, job: str, file: AdapterFile) -> int:
        """Have an adapter beside a loaded group's model, for `job` until its `release`; its number.

        Where there are as many as BESIDE_MAX, or a node has no room, those that no job runs with make some;
        where all are used, this waits, or idle groups make room for it.
        """
        while file.sha256 not in group.beside and len(group.beside) >= BESIDE_MAX:
            if group.lost is not None:
                raise group.lost
            if unused := _unused(group):
                await self._unadapt(group, unused[:1])
            else:
                group.freed.clear()
                await group.freed.wait()
        beside = group.beside.pop(file.sha256, None)
        if beside is None:
            beside = Beside(next(self._numbers), file, set())
            beside.made = asyncio.get_running_loop().create_task(self._adapt(group, beside))
            beside.made.add_done_callback(_looked_at)
        group.beside[file.sha256] = beside  # the last used
        beside.jobs.add(job)
        assert beside.made is not None
        await asyncio.shield(beside.made)
        return beside.number

    async def _adapt(self, group: Group, beside: Beside) -> None:
        try:
            async with group.adapting:
                await self._load_with_room(group, beside)
        except BaseException:
            group.beside.pop(beside.file.sha256, None)
            raise
        finally:
            group.freed.set()

    async def _load_with_room(self, group: Group, beside: Beside) -> None:
        """As often as something can make room where a node has none."""
        while True:
            try:
                await self._load_beside(group, beside)
                return
            except PolicyViolation as error:
                is_wanted = error.code == "no-room-for-adapter" and beside.jobs
                if not is_wanted or not await self._make_room(group):
                    raise
            beside.number = next(self._numbers)

    async def _make_room(self, group: Group) -> bool:
        """Of the group's adapters that no job runs with, or else of idle groups; False: all is used."""
        if unused := _unused(group):
            await self._unadapt(group, unused)
        elif self.end_unused():
            await asyncio.sleep(SETTLE_S)
        else:
            return False
        return True

    async def _load_beside(self, group: Group, beside: Beside) -> None:
        """On every rank; where one cannot, the others give it back."""
        body = wire.Adapt(group.group_id, beside.number, beside.file)
        timeout_s = ADAPT_S + beside.file.bytes / FETCH_BYTES_S
        roles = group.load.roles
        asked = [self._ask(role, "adapt", body, timeout_s) for role in roles]
        answers = await asyncio.gather(*asked, return_exceptions=True)
        errors = [answer for answer in answers if isinstance(answer, BaseException)]
        if errors:
            undo = wire.Adapt(group.group_id, undoes=beside.number)
            asked = [self._ask(role, "adapt", undo, ADAPT_S) for role in roles]
            await asyncio.gather(*asked, return_exceptions=True)
            raise errors[0]

    async def _unadapt(self, group: Group, unused: Sequence[str]) -> None:
        """Give back what no job runs with, also where the job that wanted its room ends meanwhile."""
        body = wire.Adapt(group.group_id, forgets=tuple(group.beside.pop(each).number for each in unused))
        work = self._each(group.load.roles, lambda role: self._ask(role, "adapt", body, ADAPT_S))
        given_back = asyncio.get_running_loop().create_task(work)
        given_back.add_done_callback(_looked_at)
        await asyncio.shield(given_back)

    def release(self, group: Group, job: str) -> None:
        group.jobs.discard(job)
        for beside in group.beside.values():
            beside.jobs.discard(job)
        group.freed.set()
        group.idle_since = time.monotonic()
        if not group.jobs and group.load_ms and self._by_key.get(group.load.key) is not group:
            self.end(group)  # it was retired

    def end_idle(self) -> None:
        """End groups that nobody used for the profile's time."""
        for group in self._unused():
            if time.monotonic() - group.idle_since > self._idle_s:
                self.end(group)

    def end(self, group: Group) -> None:
        if self._groups.pop(group.group_id, None) is None:
            return
        group.freed.set()  # who waits for an adapter to be free sees that it is lost
        self.retire(group)
        self._stop(group.group_id, group.load.roles)

    def retire(self, group: Group) -> None:
        """No new job gets it; those that run in it go on."""
        if self._by_key.get(group.load.key) is group:
            del self._by_key[group.load.key]

    def close(self) -> None:
        for group in list(self._groups.values()):
            self.end(group)

    async def used(self, group: Group) -> tuple[wire.Used | None, ...]:
        """What each role of a group has sent and spent so far; None where its node does not say.

        A group of which a node sustains another part of its speed than when it was planned gets no new job:
        the next one is planned anew.
        """
        asked = [
            self._peers.ask(role.node_id, "usage", wire.Usage(group.group_id), 2.0)
            for role in group.load.roles
        ]
        answers = await asyncio.gather(*asked, return_exceptions=True)
        found = []
        for answer in answers:
            used = None
            with contextlib.suppress(ProtocolError):
                used = wire.read_body(wire.Used, answer)
            found.append(used)
        self._hear_sustained(group, tuple(0.0 if used is None else used.sustained for used in found))
        return tuple(found)

    def _hear_sustained(self, group: Group, now: tuple[float, ...]) -> None:
        known = group.sustained or now
        before = group.sustained = tuple(a or b for a, b in zip(known, now, strict=True))
        moved = [
            role.node_id
            for role, a, b in zip(group.load.roles, before, now, strict=True)
            if 0 < a <= 1 and 0 < b <= 1 and a != b
        ]
        if not moved or group.has_moved_rate:
            return
        names = ", ".join(node_id[:8] for node_id in moved)
        log.info("rates moved: the next job is planned anew", extra={"group": group.group_id, "peers": names})
        group.has_moved_rate = True
        self.retire(group)
        for node_id in moved:
            self.when_rate_moved(node_id)

    # --- making one ---

    def end_unused(self) -> bool:
        """End every group without a job, for the memory it holds; True when there was one."""
        unused = self._unused()
        for group in unused:
            self.end(group)
        return bool(unused)

    def _unused(self) -> list[Group]:
        """Loaded groups without a job, the longest idle first."""
        unused = [group for group in self._groups.values() if not group.jobs and group.load_ms]
        return sorted(unused, key=lambda group: group.idle_since)

    def _end_oldest(self) -> None:
        unused = self._unused()
        for group in unused[: max(0, len(self._groups) + 1 - GROUPS_MAX)]:
            self.end(group)

    async def _make(self, group: Group, nodes: Mapping[str, NodeView]) -> None:
        started, load = time.monotonic(), group.load
        try:
            roles = self._there(group, nodes)
            listeners = _listeners(roles, nodes)
            answers = await self._each(roles, lambda role: self._offer_or_leave(group, role, listeners))
            offered = {
                role.rank: answer for role, answer in zip(roles, answers, strict=True) if answer is not None
            }
            roles = [role for role in roles if role.rank in offered]
            started_by = await self._each(roles, lambda role: self._start(group, role, offered, listeners))
            said = dict(zip(offered, started_by, strict=True))
            if group.lost is not None:
                raise group.lost
        except BaseException as error:
            self.end(group)
            if group.lost is not None:  # it names the node; the error may be of another that was stopped
                raise group.lost from error
            raise
        group.started = tuple(said.get(role.rank, wire.Started(0.0, 0, {}, ())) for role in load.roles)
        group.idle_since = time.monotonic()
        group.load_ms = (group.idle_since - started) * 1000

    def _there(self, group: Group, nodes: Mapping[str, NodeView]) -> list[Role]:
        """The roles of a group but for optional ones whose node is not to be seen, or takes no new role."""
        roles = []
        for role in group.load.roles:
            node = nodes.get(role.node_id)
            if role.rank in group.load.optional and (node is None or node.refuses):
                group.away[role.rank] = node.refuses if node is not None else "it is offline"
            else:
                roles.append(role)
        return roles

    async def _offer_or_leave(self, group: Group, role: Role, listeners: Listeners) -> wire.Offered | None:
        """None of an optional rank that does not take its role."""
        try:
            return await self._offer(group, role, listeners)
        except EdgedError as error:
            if role.rank not in group.load.optional or group.lost is not None:
                raise
            group.away[role.rank] = str(error)[:REASON_CHARS_MAX]
            if not isinstance(error, PeerError):
                group.refused.add(role.rank)
            self._stop(group.group_id, [role])
            return None

    async def _each(self, roles: Sequence[Role], work: Callable[[Role], Coroutine[Any, Any, T]]) -> list[T]:
        """`work` for every role at once; the first error ends the others."""
        try:
            async with asyncio.TaskGroup() as tasks:
                running = [tasks.create_task(work(role)) for role in roles]
        except BaseExceptionGroup as errors:
            first = errors.exceptions[0]
            raise first from None
        return [task.result() for task in running]

    async def _offer(self, group: Group, role: Role, listeners: Listeners) -> wire.Offered:
        load = group.load
        offer = wire.Offer(
            group.group_id,
            role.rank,
            load.roles,
            load.manifest.sha256,
            load.manifest.name,
            load.manifest_sha256,
            load.manifest.model,
            load.engines[role.rank] if load.engines else load.engine,
            load.context_tokens,
            load.numerics,
            tuple(_other(pair, role.rank) for pair, rank in listeners.items() if rank == role.rank),
            load.holder,
            load.cache_tokens,
            load.cache_type,
            load.training[role.rank] if load.training else None,
            load.adapter,
        )
        size = load.manifest.size + (load.adapter.bytes if load.adapter else 0)
        timeout_s = OFFER_S + size / FETCH_BYTES_S
        try:
            return wire.read_body(wire.Offered, await self._ask(role, "offer", offer, timeout_s))
        except EdgedError:
            group.lost_node = group.lost_node or role.node_id
            raise

    async def _start(
        self,
        group: Group,
        role: Role,
        offered: Mapping[int, wire.Offered],
        listeners: Listeners,
    ) -> wire.Started:
        ends = []
        for other in group.load.roles:
            if other.rank == role.rank or other.rank not in offered:
                continue
            listens = listeners[_pair(role.rank, other.rank)] == other.rank
            dialler = role.rank if listens else None
            ends.append(wire.end_of(offered[other.rank], other.rank, other.node_id, dialler))
        timeout_s = START_S + max(role.memory_bytes, group.load.manifest.size) / 10e6
        answer = await self._ask(role, "start", wire.Start(group.group_id, tuple(ends)), timeout_s)
        return wire.read_body(wire.Started, answer)

    async def _ask(self, role: Role, kind: str, body: Any, timeout_s: float) -> dict[str, Any]:
        """A role's node's answer; a loss names the node."""
        try:
            return await self._peers.ask(role.node_id, kind, body, timeout_s)
        except PeerError as error:
            name = self._peers.name_of(role.node_id)
            raise PeerError(f"node {name}: {error}", remedy=error.remedy, code=error.code) from error

    # --- losing one ---

    def _told_lost(self, node_id: str, body: wire.Lost) -> None:
        """Of a training each node speaks for itself; elsewhere also of whom its worker lost."""
        group = self._groups.get(body.group)
        if group is None or not any(role.node_id == node_id for role in group.load.roles):
            return
        roles = group.load.roles
        if not group.load.training and 0 <= body.rank < len(roles):
            node_id = roles[body.rank].node_id
        self._lose_or_leave(group, node_id, body.reason[:REASON_CHARS_MAX])

    def _peer_gone(self, node_id: str, reason: str) -> None:
        for group in list(self._groups.values()):
            if any(role.node_id == node_id for role in group.load.roles):
                self._lose_or_leave(group, node_id, reason)

    def _told_draining(self, node_id: str, body: wire.Empty) -> None:
        """A node wants to leave: its groups get no new job, and end with the last one; a training waits."""
        for group in self._retire_all(node_id):
            if group.load.training:
                self._lose_or_leave(group, node_id, "it leaves")

    def _told_resting(self, node_id: str, body: wire.Resting) -> None:
        """A node saves energy: its groups get no new job, and what runs in them may move."""
        for group in self._retire_all(node_id):
            if group.load.training:  # it waits until the node works again
                self._lose_or_leave(group, node_id, f"it rests: {body.reason[:REASON_CHARS_MAX]}")
            elif group.is_made:
                self.when_resting(group, node_id, body.reason[:REASON_CHARS_MAX])

    def _retire_all(self, node_id: str) -> list[Group]:
        """Retire a node's groups, and end those without a job; the others."""
        mine = [g for g in self._groups.values() if any(r.node_id == node_id for r in g.load.roles)]
        for group in mine:
            self.retire(group)
            if not group.jobs:
                self.end(group)
        return [group for group in mine if group.jobs]

    def _told_short(self, node_id: str, body: wire.Empty) -> None:
        """A node's memory is short: what no job uses there is loaded again when one comes."""
        for group in self._unused():
            if any(role.node_id == node_id for role in group.load.roles):
                log.info("idle group ended for memory", extra={"group": group.group_id, "peer": node_id[:8]})
                self.end(group)

    def _lose_or_leave(self, group: Group, node_id: str, reason: str) -> None:
        """A node is lost: the group with it, unless its rank is optional. One that is lost while the group is
        loaded ends that: the others wait for it already."""
        [rank, *_] = [role.rank for role in group.load.roles if role.node_id == node_id]
        if rank not in group.load.optional or (not group.is_made and rank not in group.away):
            self.lose(group, node_id, reason)
        else:
            self.leave(group, rank, reason)

    def leave(self, group: Group, rank: int, reason: str) -> None:
        """An optional rank has no part any more: its worker ends, and the others are told."""
        if rank in group.away:
            return
        group.away[rank] = reason
        for role in group.load.roles:
            if role.rank == rank:
                self._stop(group.group_id, [role])
            elif role.rank not in group.away:
                left = wire.Left(group.group_id, rank, reason)
                self._peers.tell_if_online(role.node_id, "left", left)
        log.warning("a rank left", extra={"group": group.group_id, "rank": rank, "reason": reason})
        self.when_left(group, rank, reason)

    def lose(self, group: Group, node_id: str, reason: str) -> None:
        name, group.lost_node = self._peers.name_of(node_id), node_id
        group.lost = PeerError(
            f"node {name} was lost while it worked: {reason}",
            remedy="run it again; see that node's log",
        )
        self.end(group)
        for told in self._when_lost:
            told(group)

    def _stop(self, group_id: str, roles: Sequence[Role]) -> None:
        for role in roles:
            self._peers.tell_when_online(role.node_id, "stop", wire.Stop(group_id))


def _looked_at(made: asyncio.Task[Any]) -> None:
    """Who waited for it may have been cancelled: then its error is nobody's."""
    if not made.cancelled():
        made.exception()


def _listeners(roles: Sequence[Role], nodes: Mapping[str, NodeView]) -> dict[tuple[int, int], int]:
    """For each pair of ranks the one that listens: the side that did not open the control connection."""
    found = {}
    for a, b in itertools.combinations(roles, 2):
        dials = any(link.node_id == b.node_id and link.dials for link in nodes[a.node_id].links)
        found[_pair(a.rank, b.rank)] = b.rank if dials else a.rank
    return found


def _unused(group: Group) -> list[str]:
    """The adapters beside its model that no job runs with, the longest unused first. One that is still loaded
    is used: its job may have gone, and its worker has it half."""
    return [
        sha256
        for sha256, beside in group.beside.items()
        if not beside.jobs and beside.made is not None and beside.made.done()
    ]


def _answers(group: Group, asked: Asked) -> bool:
    """Was it planned for this question but for sizes, and is its context enough?"""
    return (
        not group.load.training
        and (group.load.adapter == asked.request.adapter or (group.swaps and not group.load.adapter))
        and group.load.context_tokens >= asked.request.context_tokens
        and group.asked.model_sha256 == asked.model_sha256
        and _without_sizes(group.asked.request) == _without_sizes(asked.request)
    )


def _without_sizes(request: PlanRequest) -> PlanRequest:
    return dataclasses.replace(request, context_tokens=0, cache_tokens=0, prompt_tokens=0, adapter=None)


def _pair(a: int, b: int) -> tuple[int, int]:
    return (min(a, b), max(a, b))


def _other(pair: tuple[int, int], rank: int) -> int:
    return pair[1] if pair[0] == rank else pair[0]

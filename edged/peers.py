"""The group as it lives: pairing, connections, who is online. Keeps `node.Membership` and its file.

Each member has one task that keeps a connection to it: it waits for the member's own, else it dials.
A ping each second over the same connection says whether the member is there and how far away.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import secrets
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from . import identity as ids
from . import node, token, wire
from .config import Profile
from .errors import EdgedError, PeerError, ProtocolError, TrustError
from .health import Health
from .identity import Home, Identity
from .plugins import Host
from .transport import INVITED, Transport, local_addresses, new_keys, public_of
from .types import RIGHTS, Condition, LinkCost, LinkState, Right, Sighting, Zone
from .version import PROTOCOL, VERSION

log = logging.getLogger(__name__)
SILENCE_S = 3.0  # without an answer for so long a member is offline
YIELD_S = 0.7  # the node with the larger id lets the other dial first
REDIAL_S = (0.2, 5.0)  # first and longest pause between two rounds of dialling
REFUSED_REDIAL_S = (0.5, 30.0)  # the same where the other side refused our key
JOIN_S = 10.0
SIGHTINGS_MAX = 64
LATE_MAX = 64  # events kept for an offline member: the ends of as many groups as it may hold workers
RTT_WEIGHT = 0.3  # of a new measurement in the moving average

Answer = Callable[[str, Any], Awaitable[Any]]
Take = Callable[[str, Any], None]


@dataclass(slots=True)
class Link:
    """What is known of a member's connection now."""

    state: str = "offline"  # joining, online, offline
    run: int = 0  # of its daemon, as its last hello said
    rtt_ms: float | None = None
    address: str = ""
    wake: asyncio.Event = field(default_factory=asyncio.Event)  # look at the connection now
    came: asyncio.Event = field(default_factory=asyncio.Event)  # it was online once
    tasks: list[asyncio.Task[None]] = field(default_factory=list)


class Peers:
    """Everything about other nodes. Other parts register what they answer and what they take."""

    def __init__(self, identity: Identity, home: Home, profile: Profile, host: Host, health: Health) -> None:
        self.identity, self._home, self._profile = identity, home, profile
        self._host, self._health = host, health
        self.membership = node.from_map(ids.read_membership(home))
        self.links: dict[str, Link] = {}
        self.link_cost: Callable[[str], LinkCost | None] = lambda node_id: None  # of the data plane
        self._sightings: dict[str, dict[str, Sighting]] = {}  # discoverer -> fingerprint -> last word
        self.transport = Transport(identity, self._admit, self._on_request, self._on_event)
        self._answers: dict[str, Answer] = {}
        self._takes: dict[str, Take] = {}
        self._gone: list[Callable[[str, str], None]] = []
        self._run = 1 + secrets.randbits(52)
        self._late: dict[str, list[tuple[str, Any]]] = {}  # for members that were offline
        self._tasks: set[asyncio.Task[Any]] = set()
        self.is_closing = False

    # --- composition ---

    def answers(self, kind: str, answer: Answer) -> None:
        """`answer(node_id, body)` serves requests of a kind, from members and from this node itself."""
        self._answers[kind] = answer

    def takes(self, kind: str, take: Take) -> None:
        self._takes[kind] = take

    def when_gone(self, callback: Callable[[str, str], None]) -> None:
        """`callback(node_id, reason)` when a member goes offline or is forgotten."""
        self._gone.append(callback)

    async def start(self) -> int:
        await self.transport.start(self._profile.network.interfaces, self._profile.network.port)
        for node_id in self.membership.members:
            self._keep(node_id)
        self._spawn(self._expire())
        return self.transport.port

    async def close(self) -> None:
        self.is_closing = True
        for node_id, link in self.links.items():
            if link.state == "online":
                self.tell_if_online(node_id, "leave")
        tasks = [task for link in self.links.values() for task in link.tasks] + list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.transport.close()

    # --- asking other nodes ---

    async def ask(self, node_id: str, kind: str, body: Any, timeout_s: float) -> dict[str, Any]:
        """The answer of a member, or of this node itself without a detour."""
        if node_id != self.identity.node_id:
            return await self.transport.request(node_id, kind, body, timeout_s)
        try:
            async with asyncio.timeout(timeout_s):
                answer = await self._answers[kind](node_id, body)
        except TimeoutError as error:
            raise PeerError(f"expected an answer to {kind!r} within {timeout_s:g} s; none came") from error
        return wire.to_map(answer) if answer is not None else {}

    def tell(self, node_id: str, kind: str, body: Any = None) -> None:
        """An event for a member or for this node itself; PeerError without a connection."""
        if node_id == self.identity.node_id:
            self._takes[kind](node_id, body)
        else:
            self.transport.send(node_id, kind, body)

    def tell_if_online(self, node_id: str, kind: str, body: Any = None) -> None:
        try:
            self.tell(node_id, kind, body)
        except PeerError as error:
            log.info("message not delivered", extra={"peer": node_id[:8], "kind": kind, "reason": str(error)})

    def tell_when_online(self, node_id: str, kind: str, body: Any) -> None:
        """An event for now or for when the member is back: it may not have noticed that it was gone."""
        try:
            self.tell(node_id, kind, body)
        except PeerError as error:
            log.info("message waits", extra={"peer": node_id[:8], "kind": kind, "reason": str(error)})
            if node_id in self.membership.members:
                self._late[node_id] = [*self._late.get(node_id, ()), (kind, body)][-LATE_MAX:]

    def is_online(self, node_id: str) -> bool:
        if node_id == self.identity.node_id:
            return True
        link = self.links.get(node_id)
        return link is not None and link.state == "online"

    def name_of(self, node_id: str) -> str:
        if node_id == self.identity.node_id:
            return self.identity.name
        member = self.membership.member(node_id)
        return member.name if member else node_id[:8]

    def find(self, text: str) -> str:
        return self.membership.find(text, [(self.identity.node_id, self.identity.name)])

    def address_of(self, node_id: str) -> str:
        """Where this member was really reached, or reached us from."""
        link = self.links.get(node_id)
        address = (link.address if link else "") or self.transport.addresses_seen.get(node_id, "")
        if not address:
            raise PeerError(f"expected an address of {self.name_of(node_id)}; none is known")
        return address

    def way_to(self, end: wire.PeerEnd) -> list[Any]:
        """Where and as whom a worker reaches another rank, as `channel.End`."""
        address = self.address_of(end.node_id) if end.port else ""
        return [end.public_key, address, end.port, end.certificate, end.stream_port]

    def link_states(self) -> tuple[LinkState, ...]:
        return tuple(
            self._link_state(node_id, link.rtt_ms)
            for node_id, link in self.links.items()
            if link.state == "online"
        )

    def _link_state(self, node_id: str, rtt_ms: float | None) -> LinkState:
        cost, dials = self.link_cost(node_id), self.dials(node_id)
        if cost is None:
            return LinkState(node_id, rtt_ms, None, dials)
        return LinkState(node_id, rtt_ms, cost.bytes_s, dials, cost.latency_s, cost.burst_bytes)

    def rtt_ms(self, node_id: str) -> float | None:
        """Of pings between the daemons."""
        link = self.links.get(node_id)
        return None if link is None else link.rtt_ms

    def dials(self, node_id: str) -> bool:
        """Is it this side that opens connections?"""
        return self.transport.dials(node_id)

    # --- pairing ---

    def invite(self, ttl_s: float, rights: tuple[Right, ...], zone: Zone) -> tuple[str, float]:
        """A token and when it expires (seconds since the epoch)."""
        public, secret = new_keys()
        expires_at = time.time() + ttl_s
        self.membership.invite(public, expires_at, rights, zone, time.time())
        self._store()
        addresses = local_addresses(self._profile.network.interfaces)
        made = token.Token(
            addresses, self.transport.port, self.identity.public_key, secret, int(expires_at), zone
        )
        return made.encode(), expires_at

    async def join(self, text: str) -> node.Member:
        """Use a token; returns when both ends are online to each other."""
        given = token.decode(text)
        inviter = ids.node_id_of(given.public_key)
        if inviter == self.identity.node_id:
            raise TrustError("expected another node's token; this one is my own", remedy="use it there")
        one_time = (public_of(given.one_time_secret), given.one_time_secret)
        mine = wire.Pair(
            self.identity.node_id,
            self.identity.name,
            self.transport.port,
            PROTOCOL,
            local_addresses(self._profile.network.interfaces),
        )
        paired, address = await self._pair_somewhere(given, one_time, mine)
        if paired.node_id != inviter:
            raise TrustError("expected the inviter to name its own key; another came")
        member = node.Member(inviter, paired.name, RIGHTS, given.zone, (address,), given.port)
        self.membership.admit(member)
        self._store()
        self._keep(inviter, at_once=True)
        await self._prove_again(inviter, self.links[inviter])
        await self._until_online(inviter)
        self._host.observe("edged_peer_joined", node_id=inviter, name=paired.name)
        return member

    async def _pair_somewhere(
        self, given: token.Token, one_time: tuple[bytes, bytes], mine: wire.Pair
    ) -> tuple[wire.Paired, str]:
        reasons = []
        for address in given.addresses:
            try:
                paired = await self.transport.pair(given.public_key, one_time, address, given.port, mine)
                return paired, address
            except PeerError as error:
                reasons.append(f"{address}:{given.port}: {error}")
            except TrustError as error:
                raise TrustError(
                    "expected a token that is unused and not expired; the inviter refused it",
                    remedy="ask for a new `edged invite`",
                ) from error
        raise PeerError(
            f"expected to reach the inviter; {'; '.join(reasons)}",
            remedy="check that it runs and the network",
        )

    async def _prove_again(self, node_id: str, link: Link) -> None:
        """A member since before may have forgotten this node: greet it over the connection that stands."""
        if link.state == "online":
            try:
                await self.transport.request(node_id, "hello", self.hello(), SILENCE_S)
                return
            except PeerError as error:
                self.transport.disconnect(node_id)
                self._went(node_id, str(error))
        link.came.clear()
        link.wake.set()

    async def _until_online(self, node_id: str) -> None:
        try:
            async with asyncio.timeout(JOIN_S):
                await self.links[node_id].came.wait()
        except TimeoutError as error:
            raise PeerError(
                f"paired with {self.name_of(node_id)}, but it is not online", remedy="see `edged peers`"
            ) from error

    def trust(self, text: str, rights: tuple[Right, ...] | None, zone: Zone | None) -> node.Member:
        member = self.membership.trust(self.membership.find(text), rights, zone)
        self._store()
        return member

    def forget(self, text: str) -> str:
        """Revoke a member at once, here and on every member that is online now or later."""
        node_id = self.membership.find(text)
        self._drop(node_id, "it was forgotten")
        version = self.membership.forget(node_id)
        self._store()
        for member in self.membership.members:
            self.tell_if_online(member, "forget", wire.Forget(node_id, version))
        return node_id

    # --- what comes in ---

    def _admit(self, key: bytes) -> str | None:
        """ZAP's question, asked for each connection and again for each message."""
        node_id = ids.node_id_of(key)
        if node_id in self.membership.members:
            return node_id
        if self.membership.is_invited(key, time.time()):
            return INVITED + key.hex()
        return None

    async def _on_request(self, user: str, message: wire.Message) -> Any:
        body = _read(message)
        if user.startswith(INVITED):
            return self._redeem(bytes.fromhex(user.removeprefix(INVITED)), body)
        if message.kind == "hello":
            return self._greeted(user, body)
        if message.kind == "ping":
            link = self.links.get(user)
            if link is None or link.state != "online":  # then it dials and greets anew
                raise ProtocolError("expected hello first")
            return wire.Empty()
        member = self.membership.members[user]
        if member.state != "member":
            raise ProtocolError("expected hello first")
        if message.kind not in self._answers:
            raise ProtocolError(f"{message.kind!r} is no request")
        return await self._answers[message.kind](user, body)

    def _on_event(self, user: str, message: wire.Message) -> None:
        body = _read(message)
        if user.startswith(INVITED) or self.membership.members[user].state != "member":
            raise ProtocolError("expected hello first")
        match message.kind:
            case "introduce":
                self._introduced(user, body)
            case "forget":
                self._told_to_forget(user, body)
            case "leave":
                self._went(user, "it left")
            case kind if kind in self._takes:
                self._takes[kind](user, body)
            case kind:
                raise ProtocolError(f"{kind!r} is no event")

    def _redeem(self, client_key: bytes, body: wire.Pair) -> wire.Paired:
        _check_protocol(body.protocol)
        ids.key_of(body.node_id)
        newcomer = node.Member(
            body.node_id, ids.check_name(body.name), addresses=body.addresses[:8], port=body.port
        )
        if body.node_id == self.identity.node_id:
            raise TrustError("expected another node's key; mine came")
        self.membership.redeem(client_key, newcomer, time.time())
        self._store()
        self._keep(body.node_id)
        return wire.Paired(self.identity.node_id, self.identity.name)

    def hello(self) -> wire.Hello:
        addresses = local_addresses(self._profile.network.interfaces)
        return wire.Hello(
            PROTOCOL, VERSION, self.identity.name, self.transport.port, addresses, run=self._run
        )

    def _greeted(self, node_id: str, hello: wire.Hello) -> wire.Hello:
        """A member dialled us."""
        _check_protocol(hello.protocol)
        address = self.transport.addresses_seen.get(node_id, "")
        self._came(node_id, address, hello)
        return self.hello()

    def _came(self, node_id: str, address: str, hello: wire.Hello) -> None:
        """A connection to a member stands."""
        link = self.links.get(node_id)
        if link is None:
            return
        is_new = self.membership.prove(node_id)
        addresses = (address, *hello.addresses) if address else hello.addresses
        self.membership.relocate(node_id, ids.check_name(hello.name), addresses, hello.port)
        self._store()
        link.address = address or link.address
        was_online, link.state = link.state == "online", "online"
        if was_online and link.run and hello.run and hello.run != link.run:
            self._tell_gone(node_id, "its daemon started anew")  # faster than its end was noticed
        link.run = hello.run
        link.came.set()
        self._health.clear(f"refused-by-{node_id[:8]}")
        if not was_online:
            log.info("peer online", extra={"peer": node_id[:8], "address": address})
            asyncio.get_running_loop().call_soon(self._introduce_all, node_id)
            for kind, body in self._late.pop(node_id, ()):
                asyncio.get_running_loop().call_soon(self.tell_if_online, node_id, kind, body)
        if is_new:
            self._host.observe("edged_peer_joined", node_id=node_id, name=hello.name)

    def _introduce_all(self, node_id: str) -> None:
        """Tell a member that came online of all others and of all revocations, and them of it."""
        for other in list(self.membership.members):
            if other != node_id and self.is_online(other):
                self._introduce(other, node_id)
                self._introduce(node_id, other)
        for forgotten, version in self.membership.forgotten.items():
            self.tell_if_online(node_id, "forget", wire.Forget(forgotten, version))

    def _introduce(self, to: str, node_id: str) -> None:
        member = self.membership.member(node_id)
        if member is None or member.state != "member":
            return
        body = wire.Introduce(
            node_id,
            member.name,
            member.addresses,
            member.port,
            member.rights,
            member.zone,
            member.admission,
        )
        self.tell_if_online(to, "introduce", body)

    def _introduced(self, introducer: str, body: wire.Introduce) -> None:
        ids.key_of(body.node_id)
        if body.node_id == self.identity.node_id:
            return
        newcomer = node.Member(
            body.node_id,
            ids.check_name(body.name),
            body.rights,
            body.zone,
            body.addresses[:8],
            body.port,
            admission=body.admission,
        )
        before = self.membership.version
        is_new = self.membership.introduce(introducer, newcomer)
        if self.membership.version != before:
            self._store()
        if is_new:
            self._keep(body.node_id)
            self._host.observe("edged_peer_joined", node_id=body.node_id, name=body.name)
        elif body.node_id in self.links:
            self.links[body.node_id].wake.set()  # it may admit us again, if it refused us before

    def _told_to_forget(self, teller: str, body: wire.Forget) -> None:
        ids.key_of(body.node_id)
        if body.node_id == self.identity.node_id:
            return
        if not self.membership.is_revoked_by(teller, body.node_id, body.version):
            return
        if body.node_id in self.membership.members:
            self._drop(body.node_id, "it was forgotten")
        if self.membership.forget_on_word(teller, body.node_id, body.version):
            for member in self.membership.members:
                if member != teller:
                    self.tell_if_online(member, "forget", body)
        self._store()

    # --- connections ---

    def seen(self, discoverer: str, sighting: Sighting) -> None:
        """Discovery heard of a node: a hint where to dial a member, or a candidate to show."""
        if sighting.fingerprint == ids.fingerprint_of(self.identity.node_id):
            return
        known = self._sightings.setdefault(discoverer, {})
        if sighting.fingerprint in known or len(known) < SIGHTINGS_MAX:
            known[sighting.fingerprint] = sighting
        for node_id, link in self.links.items():
            if ids.fingerprint_of(node_id) == sighting.fingerprint:
                link.wake.set()

    def lost(self, discoverer: str, fingerprint: str) -> None:
        """One discoverer's word: what another one said of that node stays."""
        self._sightings.get(discoverer, {}).pop(fingerprint, None)

    def sightings(self) -> dict[str, Sighting]:
        """By fingerprint; where several discoverers know a node, all its addresses."""
        merged: dict[str, Sighting] = {}
        for known in self._sightings.values():
            for fingerprint, sighting in known.items():
                before = merged.get(fingerprint)
                if before is not None:
                    addresses = tuple(dict.fromkeys((*before.addresses, *sighting.addresses)))
                    sighting = dataclasses.replace(sighting, addresses=addresses)
                merged[fingerprint] = sighting
        return merged

    def _keep(self, node_id: str, *, at_once: bool = False) -> None:
        """Hold a connection to a member from now on; `at_once`: without letting the other dial first."""
        if node_id in self.links:
            return
        link = self.links[node_id] = Link()
        yields = 0.0 if at_once or node_id > self.identity.node_id else YIELD_S
        loop = asyncio.get_running_loop()
        link.tasks = [
            loop.create_task(self._connect(node_id, link, yields)),
            loop.create_task(self._ping(node_id, link)),
        ]

    async def _connect(self, node_id: str, link: Link, yields: float) -> None:
        pause = REDIAL_S[0]
        await asyncio.sleep(yields)
        while True:
            is_up = self.transport.is_connected(node_id) and link.state == "online"
            pause = REDIAL_S[0] if is_up else await self._dial_round(node_id, link, pause)
            link.wake.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(None if link.state == "online" else pause):
                    await link.wake.wait()

    async def _dial_round(self, node_id: str, link: Link, pause: float) -> float:
        """Try every known address once, staying while one works; the pause before the next round."""
        for address, port in self._targets(node_id):
            was_up = asyncio.Event()

            def came(hello: wire.Hello, address: str = address, up: asyncio.Event = was_up) -> None:
                _check_protocol(hello.protocol)
                up.set()
                self._came(node_id, address, hello)

            try:
                await self.transport.dial(node_id, address, port, self.hello(), came)
            except TrustError as error:
                self._refused(node_id, error)
                return min(max(pause * 2, REFUSED_REDIAL_S[0]), REFUSED_REDIAL_S[1])
            except EdgedError as error:
                log.debug("dial ended", extra={"peer": node_id[:8], "reason": str(error)})
                if isinstance(error, ProtocolError):
                    self._incompatible(node_id, error)
            if was_up.is_set():
                self._went(node_id, "its connection closed")
                return REDIAL_S[0]
        return min(pause * 2, REDIAL_S[1])

    def _targets(self, node_id: str) -> list[tuple[str, int]]:
        """Where to dial a member: nowhere while it has yet to prove its key by dialling us."""
        member = self.membership.members[node_id]
        if member.state == "joining":
            return []
        fingerprint = ids.fingerprint_of(node_id)
        seen = [known[fingerprint] for known in self._sightings.values() if fingerprint in known]
        targets = [(address, sighting.port) for sighting in seen for address in sighting.addresses]
        if member.port:
            targets += [(address, member.port) for address in member.addresses]
        return list(dict.fromkeys(targets))

    async def _ping(self, node_id: str, link: Link) -> None:
        while True:
            await asyncio.sleep(wire.PING_S)
            if link.state != "online":
                continue
            started = time.perf_counter()
            try:
                await self.transport.request(node_id, "ping", wire.Empty(), SILENCE_S)
            except EdgedError:
                self.transport.disconnect(node_id)
                self._went(node_id, f"it was silent for {SILENCE_S:g} s")
                continue
            rtt_ms = (time.perf_counter() - started) * 1000
            old = link.rtt_ms if link.rtt_ms is not None else rtt_ms
            link.rtt_ms = min(old + RTT_WEIGHT * (rtt_ms - old), rtt_ms * 4)

    def _went(self, node_id: str, reason: str) -> None:
        link = self.links.get(node_id)
        if link is None or link.state != "online" or self.is_closing:
            return
        link.state = "offline"
        link.wake.set()
        self.transport.drop_inbound(node_id)
        log.info("peer offline", extra={"peer": node_id[:8], "reason": reason})
        self._host.observe("edged_peer_left", node_id=node_id, name=self.name_of(node_id), reason=reason)
        self._tell_gone(node_id, reason)

    def _tell_gone(self, node_id: str, reason: str) -> None:
        for callback in self._gone:
            callback(node_id, reason)

    def _drop(self, node_id: str, reason: str) -> None:
        """End everything that runs with a member that is no longer one."""
        self._went(node_id, reason)
        self._late.pop(node_id, None)
        self._health.clear(f"refused-by-{node_id[:8]}")
        link = self.links.pop(node_id, None)
        if link is not None:
            for task in link.tasks:
                task.cancel()
        self.transport.disconnect(node_id)

    def _refused(self, node_id: str, error: TrustError) -> None:
        name = self.name_of(node_id)
        self._health.set(
            Condition(
                f"refused-by-{node_id[:8]}",
                "warning",
                f"{name} does not admit this node ({error})",
                f"pair again with `edged invite` and `edged join`, or `edged forget {name}`",
            )
        )

    def _incompatible(self, node_id: str, error: ProtocolError) -> None:
        self._health.set(
            Condition(
                f"refused-by-{node_id[:8]}",
                "warning",
                f"{self.name_of(node_id)}: {error}",
                "update the older of the two",
            )
        )

    async def _expire(self) -> None:
        while True:
            await asyncio.sleep(5)
            before = len(self.membership.invites)
            late = self.membership.expire(time.time())
            for node_id in late:
                self._drop(node_id, "it never proved its key")
            if late or len(self.membership.invites) != before:
                self._store()

    def _store(self) -> None:
        ids.write_membership(self._home, self.membership.to_map())

    def _spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _read(message: wire.Message) -> Any:
    kind = wire.BODIES.get(message.kind)
    if kind is None:
        raise ProtocolError(f"no message kind {message.kind[:32]!r}")
    return wire.read_body(kind, message.body)


def _check_protocol(theirs: int) -> None:
    if theirs != PROTOCOL:
        raise ProtocolError(
            f"expected protocol {PROTOCOL}; the other node speaks {theirs}",
            remedy="update the older of the two",
        )

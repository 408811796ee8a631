"""What the data plane between this node and others costs, measured before any plan needs it.

Two short-lived workers, one on each side, exchange frames over the very connection that the ranks of a plan
would have: same dialling direction, same encryption, same spinning. A ping between daemons cannot say that:
it goes through two event loops. One measurement at a time on each node, for two would measure each other.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from dataclasses import dataclass

from . import wire
from .config import Profile
from .device import Device
from .errors import EdgedError, PeerError, PolicyViolation, ProtocolError
from .peers import Peers
from .supervisor import Supervisor, WorkerHandle
from .types import LinkCost

log = logging.getLogger(__name__)
PREPARE_S = 35.0  # of the other side, which waits 30 for its worker
PROBE_S = 90.0  # 256 KiB six times at 300 kbit/s, and the time to connect
ATTEMPTS, BUSY_S = 20, 0.5  # while the other side measures another link
FRESH_S = 1800.0
DRIFT = 0.5  # a ping time that moved by so much of itself is another link
DRIFT_MS = 3.0  # and by so much at least: event loops beside a computation make pings swing


@dataclass(slots=True)
class _Known:
    cost: LinkCost
    measured_at: float  # monotonic
    rtt_ms: float | None  # of the pings then


@dataclass(slots=True)
class _Answering:
    """A measurement that another node began."""

    peer: str
    worker: WorkerHandle
    ending: asyncio.TimerHandle


class Probing:
    """Measured connections, by node."""

    def __init__(self, profile: Profile, peers: Peers, supervisor: Supervisor, device: Device) -> None:
        self._profile, self._peers = profile, peers
        self._supervisor, self._device = supervisor, device
        self._known: dict[str, _Known] = {}
        self._answering: dict[str, _Answering] = {}
        self._stopping: set[asyncio.Task[None]] = set()
        self._turn = asyncio.Lock()
        peers.answers("probe", self._prepare_for)
        peers.answers("probe_start", self._start_for)
        peers.when_gone(lambda node_id, reason: self._gone(node_id))
        peers.link_cost = self.cost

    def cost(self, node_id: str) -> LinkCost | None:
        """What was last measured of the connection to a node since it is online; None where nothing was."""
        known = self._known.get(node_id)
        return None if known is None else known.cost

    async def ensure(self) -> None:
        """Have every connection that is this node's to measure measured, now or lately.

        Of two nodes the one with the lower id begins, or both would refuse each other as busy.
        """
        mine = self._peers.identity.node_id
        for link in self._peers.link_states():
            if mine < link.node_id and not self._is_fresh(link.node_id):
                await self._try(link.node_id)

    def forget(self) -> None:
        """Measure everything again when it is asked for next."""
        self._known.clear()

    async def _try(self, node_id: str) -> None:
        """Measure; what cannot be measured is logged, and unknown."""
        for attempt in range(1, ATTEMPTS + 1):
            try:
                async with self._turn:
                    found = await self._measure(node_id)
            except EdgedError as error:
                if error.code == "busy" and attempt < ATTEMPTS:
                    await asyncio.sleep(BUSY_S)
                    continue
                log.info("link not measured", extra={"peer": node_id[:8], "reason": str(error)})
                return
            self._known[node_id] = _Known(found, time.monotonic(), self._peers.rtt_ms(node_id))
            return

    def _is_fresh(self, node_id: str) -> bool:
        known = self._known.get(node_id)
        if known is None:
            return False
        now, then = self._peers.rtt_ms(node_id), known.rtt_ms
        if now is not None and then is not None and abs(now - then) > max(DRIFT_MS, DRIFT * then):
            return False
        return time.monotonic() - known.measured_at < FRESH_S

    def _gone(self, node_id: str) -> None:
        self._known.pop(node_id, None)
        for group, answering in list(self._answering.items()):
            if answering.peer == node_id:
                self._end(group)

    # --- as the side that begins ---

    async def _measure(self, node_id: str) -> LinkCost:
        group = secrets.token_hex(8)
        is_listening = not self._peers.dials(node_id)
        worker = await self._supervisor.spawn(lambda message: None)
        try:
            mine = await worker.prepare(group, 0, 2, [1] if is_listening else [], self._profile.network)
            probe = wire.Probe(group, listens=not is_listening)
            theirs = wire.read_body(wire.Offered, await self._peers.ask(node_id, "probe", probe, PREPARE_S))
            there = wire.ProbeStart(
                group, wire.end_of(mine, 0, self._peers.identity.node_id, 1 if is_listening else None)
            )
            asked = asyncio.ensure_future(self._peers.ask(node_id, "probe_start", there, PROBE_S))
            try:
                return await self._run(
                    worker, group, wire.end_of(theirs, 1, node_id, None if is_listening else 0)
                )
            finally:
                asked.cancel()
                await asyncio.gather(asked, return_exceptions=True)
        finally:
            await asyncio.shield(worker.stop())

    async def _run(self, worker: WorkerHandle, group: str, end: wire.PeerEnd) -> LinkCost:
        body = {
            "group": group,
            "ends": {end.rank: self._peers.way_to(end)},
            "may_spin": self._device.may_spin,
        }
        return wire.read_body(LinkCost, await worker.call("probe", body, PROBE_S))

    # --- as the other side ---

    async def _prepare_for(self, peer: str, body: wire.Probe) -> wire.Offered:
        member = self._peers.membership.member(peer)
        if member is None or "submit" not in member.rights:
            raise PolicyViolation("a node without the right to submit jobs has no link to measure here")
        if self._answering or self._turn.locked():
            raise PeerError("another link is being measured here", remedy="try again later", code="busy")
        worker = await self._supervisor.spawn(lambda message: None)
        try:
            offered = await worker.prepare(
                body.group, 1, 2, [0] if body.listens else [], self._profile.network
            )
            if self._answering:
                raise PeerError("another link is being measured here", code="busy")
        except BaseException:
            await asyncio.shield(worker.stop())
            raise
        ending = asyncio.get_running_loop().call_later(PROBE_S, self._end, body.group)
        self._answering[body.group] = _Answering(peer, worker, ending)
        worker.on_exit = lambda reason: self._end(body.group)
        return offered

    async def _start_for(self, peer: str, body: wire.ProbeStart) -> LinkCost:
        answering = self._answering.get(body.group)
        if answering is None or answering.peer != peer or body.end.node_id != peer:
            raise ProtocolError("expected a measurement that this node began")
        try:
            found = await self._run(answering.worker, body.group, body.end)
        finally:
            self._end(body.group)
        self._known[peer] = _Known(found, time.monotonic(), self._peers.rtt_ms(peer))
        return found

    def _end(self, group: str) -> None:
        answering = self._answering.pop(group, None)
        if answering is None:
            return
        answering.ending.cancel()
        task = asyncio.get_running_loop().create_task(answering.worker.stop())
        self._stopping.add(task)
        task.add_done_callback(self._stopping.discard)

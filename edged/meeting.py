"""How the workers of a plan find each other's TLS streams: who listens, who dials, and the handshakes.

Streams are offered beside ZeroMQ and never instead of it: a rank that cannot be met within OPEN_S is
talked to over ZeroMQ, which both sides agree on (`ZmqChannel.open`).
"""

from __future__ import annotations

import contextlib
import logging
import select
import socket
import ssl
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .certificate import Credential
from .errors import ConfigError, EdgedError, PeerError
from .stream import Stream, context_for
from .transport import ipv4_of

log = logging.getLogger(__name__)
OPEN_S = 6.0  # for all streams of a plan; whoever is not there by then is talked to over ZeroMQ
HANDSHAKE_S = 2.0  # of one connection; a stranger who says nothing holds its place no longer
PENDING_MAX = 16  # handshakes at once, strangers' included; more wait in the kernel's queue
BACKLOG = 16
_Address = tuple[int, Any]  # family, and what `connect` takes of it


@dataclass(frozen=True, slots=True)
class StreamEnd:
    """Where a rank's stream is: `port` 0 where that rank dials us."""

    certificate: bytes  # DER
    address: str
    port: int


@dataclass(slots=True)
class _Dial:
    """A TCP connection on its way. `rest`: the rank's other addresses, for when this one is refused."""

    rank: int
    sock: socket.socket
    rest: list[_Address]


@dataclass(slots=True)
class _Pending:
    """A handshake."""

    stream: Stream
    certificate: bytes
    until: float


class Meeting:
    """`listen` for those who dial, then `meet` all; or `close`."""

    def __init__(self, own: Credential) -> None:
        self._own = own
        self._listeners: dict[int, list[socket.socket]] = {}
        self._met: dict[int, Stream] = {}

    def listen(self, ranks: Sequence[int], interfaces: Sequence[str], ports: range) -> dict[int, int]:
        """Listen for each rank that will dial; rank -> port. ConfigError when no port is free."""
        taken = {}
        for rank in ranks:
            port, sockets = _listen(interfaces, ports)
            taken[rank], self._listeners[rank] = port, sockets
        return taken

    def meet(self, ends: Mapping[int, StreamEnd]) -> dict[int, Stream]:
        """The streams of every rank of `ends` that can be met within OPEN_S; nobody listens afterwards."""
        try:
            self._meet(ends, time.monotonic() + OPEN_S)
        except BaseException:
            for stream in self._met.values():
                stream.close()
            raise
        finally:
            self.close()
        return self._met

    def close(self) -> None:
        """Listen no more."""
        for rank in list(self._listeners):
            self._stop_listening(rank)

    def _meet(self, ends: Mapping[int, StreamEnd], until: float) -> None:
        contexts = self._contexts(ends)
        awaited = {rank for rank in contexts if rank in self._listeners}
        dials = [
            dial
            for rank in contexts
            if rank not in awaited and (dial := _dial(rank, _addresses(rank, ends[rank]))) is not None
        ]
        pending: list[_Pending] = []
        try:
            while (dials or pending or awaited - self._met.keys()) and time.monotonic() < until:
                room = PENDING_MAX - len(pending)
                ready = self._poll(dials, pending, awaited - self._met.keys() if room > 0 else set())
                for dial in [dial for dial in dials if dial.sock.fileno() in ready]:
                    dials.remove(dial)
                    if (stream := _stream(dial.sock, contexts[dial.rank], dial.rank, False)) is not None:
                        pending.append(_Pending(stream, ends[dial.rank].certificate, until))
                    elif (another := _dial(dial.rank, dial.rest)) is not None:
                        dials.append(another)
                for rank in awaited - self._met.keys():
                    pending += self._accept(rank, ends[rank], contexts[rank], PENDING_MAX - len(pending))
                pending = [entry for entry in pending if self._is_still_pending(entry)]
        finally:
            for dial in dials:
                dial.sock.close()
            for entry in pending:
                entry.stream.close()

    def _poll(self, dials: list[_Dial], pending: list[_Pending], awaited: set[int]) -> set[int]:
        """Wait for a moment until something goes on; the descriptors of those that do."""
        poller = select.poll()
        for rank in awaited:
            for listener in self._listeners[rank]:
                poller.register(listener, select.POLLIN)
        for dial in dials:
            poller.register(dial.sock, select.POLLOUT)
        for entry in pending:
            poller.register(entry.stream, select.POLLIN)
        return {number for number, _ in poller.poll(50)}

    def _contexts(self, ends: Mapping[int, StreamEnd]) -> dict[int, ssl.SSLContext]:
        """TLS for each rank whose certificate is one."""
        found = {}
        for rank, end in ends.items():
            try:
                found[rank] = context_for(self._own, end.certificate, is_server=rank in self._listeners)
            except OSError as error:  # ssl.SSLError is one
                log.info("no stream", extra={"rank": rank, "reason": str(error)})
        return found

    def _accept(self, rank: int, end: StreamEnd, context: ssl.SSLContext, room: int) -> list[_Pending]:
        """Connections that wait for `rank`'s place, at most `room`."""
        found: list[_Pending] = []
        for listener in self._listeners[rank]:
            for _ in range(room - len(found)):
                try:
                    sock, _ = listener.accept()
                except OSError:  # none waits, or it left
                    break
                if (stream := _stream(sock, context, rank, is_server=True)) is not None:
                    found.append(_Pending(stream, end.certificate, time.monotonic() + HANDSHAKE_S))
        return found

    def _is_still_pending(self, entry: _Pending) -> bool:
        """Go on with a handshake; whoever is not the one is closed, before a frame of its is read."""
        stream = entry.stream
        try:
            if not stream.handshake():
                if time.monotonic() < entry.until:
                    return True
                raise PeerError("expected the handshake to be done by now", rank=stream.rank)
            stream.check_peer(entry.certificate, self._own.group)
        except (OSError, EdgedError) as error:  # ssl.SSLError is an OSError
            log.info("stream refused", extra={"rank": stream.rank, "reason": str(error)})
            stream.close()
            return False
        if stream.rank in self._met:
            stream.close()
        else:
            self._met[stream.rank] = stream
        return False

    def _stop_listening(self, rank: int) -> None:
        for sock in self._listeners.pop(rank):
            sock.close()


def _addresses(rank: int, end: StreamEnd) -> list[_Address]:
    """Where `end` may be; blocks only where its address is a name, which ZeroMQ has just resolved."""
    try:
        found = socket.getaddrinfo(end.address, end.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:  # UnicodeError: no name that DNS could hold
        log.info("no stream", extra={"rank": rank, "reason": str(error)})
        return []
    return [(family, address) for family, _, _, _, address in found]


def _dial(rank: int, addresses: list[_Address]) -> _Dial | None:
    """Begin to connect to the first of `addresses` that allows it; None where none does."""
    for number, (family, address) in enumerate(addresses, 1):
        try:
            return _Dial(rank, _connect(family, address), addresses[number:])
        except OSError as error:
            log.info("no stream", extra={"rank": rank, "reason": str(error)})
    return None


def _connect(family: int, address: Any) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        with contextlib.suppress(BlockingIOError):  # on its way
            sock.connect(address)
    except BaseException:
        sock.close()
        raise
    return sock


def _stream(sock: socket.socket, context: ssl.SSLContext, rank: int, is_server: bool) -> Stream | None:
    """A stream over `sock`; None where that was refused, or reset meanwhile."""
    try:
        return Stream(sock, context, rank, is_server)
    except OSError as error:
        log.info("no stream", extra={"rank": rank, "reason": str(error)})
        return None


def _listen(interfaces: Sequence[str], ports: range) -> tuple[int, list[socket.socket]]:
    """Listening sockets on one port of `ports` on every given interface (names or addresses)."""
    addresses = [ipv4_of(name) or name for name in interfaces] or [""]
    reason: OSError | None = None
    for wanted in ports:
        made: list[socket.socket] = []
        port = wanted
        try:
            for address in addresses:
                made.append(_listen_at(address, port))
                port = made[0].getsockname()[1]
            return port, made
        except OSError as error:
            reason = error
            for sock in made:
                sock.close()
    raise ConfigError(f"expected a free port in {ports.start}-{ports.stop - 1} for a stream; {reason}")


def _listen_at(address: str, port: int) -> socket.socket:
    is_any = not address and socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if is_any or ":" in address else socket.AF_INET
    sock = socket.create_server((address, port), family=family, backlog=BACKLOG, dualstack_ipv6=is_any)
    sock.setblocking(False)
    return sock

"""ZeroMQ with CURVE between daemons: one bound ROUTER, one DEALER per dialled peer, ZAP before both.

Each message is checked against the membership by its authenticated key before it is unpacked. A
peer's connection is opened by whichever side can; requests and answers go over it both ways.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import itertools
import logging
import socket
import struct
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

import zmq
import zmq.asyncio
from zmq.utils import z85
from zmq.utils.monitor import parse_monitor_message

from . import wire
from .errors import ConfigError, EdgedError, PeerError, ProtocolError, TrustError
from .identity import Identity, key_of

log = logging.getLogger(__name__)
HANDSHAKE_MS = 3000  # libzmq ends a connection that has not finished its handshake by then
BACKLOG = 64
QUEUE_MESSAGES = 1000  # per peer and direction; control messages are small and answered at once
REQUESTS_PER_PEER = 64  # handled at once; more wait in the socket
INVITED = "invite:"
ZAP_ENDPOINT = "inproc://zeromq.zap.01"
ZAP_DOMAIN = b"edged"

Admit = Callable[[bytes], str | None]  # client key -> User-Id, or None to refuse
HandleRequest = Callable[[str, wire.Message], Awaitable[Any]]
HandleEvent = Callable[[str, wire.Message], None]


def new_keys() -> tuple[bytes, bytes]:
    """A fresh CURVE key pair: (public, secret), 32 bytes each."""
    public, secret = zmq.curve_keypair()
    return z85.decode(public), z85.decode(secret)


def public_of(secret_key: bytes) -> bytes:
    """The public half of a CURVE secret key."""
    return z85.decode(zmq.curve_public(z85.encode(secret_key)))


def check_keys(identity: Identity) -> None:
    """TrustError unless the public key belongs to the secret one."""
    if public_of(identity.secret_key) != identity.public_key:
        raise TrustError(
            "expected a public key that belongs to the secret key; node.key was altered",
            remedy="restore it from a backup, or make a new home and pair again",
        )


def secure_server(sock: zmq.Socket[Any], secret_key: bytes) -> None:
    """Options of every bound socket of ours, in daemons and workers."""
    sock.linger = 0
    sock.ipv6 = True
    sock.set(zmq.BACKLOG, BACKLOG)
    sock.set(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
    sock.zap_domain = ZAP_DOMAIN
    sock.curve_server = True
    sock.curve_secretkey = z85.encode(secret_key)


def secure_client(sock: zmq.Socket[Any], keys: tuple[bytes, bytes], server_key: bytes) -> None:
    """Options of every dialling socket of ours: `keys` is (public, secret)."""
    sock.linger = 0
    sock.ipv6 = True
    sock.set(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
    sock.curve_publickey, sock.curve_secretkey = z85.encode(keys[0]), z85.encode(keys[1])
    sock.curve_serverkey = z85.encode(server_key)


def answer_zap(frames: Sequence[bytes], admit: Admit, domain: bytes = ZAP_DOMAIN) -> list[bytes]:
    """The ZAP 1.0 reply to one request (RFC 27): 200 with a User-Id, or 400."""
    version, request = frames[0], frames[1]
    is_ours = len(frames) == 7 and frames[2] == domain and frames[5] == b"CURVE"
    user = admit(frames[6]) if is_ours else None
    status, text = (b"200", b"OK") if user else (b"400", b"not admitted")
    return [version, request, status, text, (user or "").encode(), b""]


def endpoint(address: str, port: int) -> str:
    return f"tcp://[{address}]:{port}" if ":" in address else f"tcp://{address}:{port}"


def bind(sock: zmq.Socket[Any], interfaces: Sequence[str], ports: range) -> int:
    """Bind to one port of `ports` on every given interface (names or addresses); the port."""
    # a name is resolved here: libzmq would take its IPv6 address alone
    addresses = [ipv4_of(name) or name for name in interfaces] or ["*"]
    for port in ports:
        bound: list[bytes] = []
        try:
            for address in addresses:
                sock.bind(endpoint(address, port))
                bound.append(bytes(sock.getsockopt(zmq.LAST_ENDPOINT)).rstrip(b"\0"))
                port = port or int(bound[0].rsplit(b":", 1)[1])
            return port
        except zmq.ZMQError as error:
            for earlier in bound:
                sock.unbind(earlier)
            reason = error
            if error.errno != zmq.EADDRINUSE:
                break
    raise ConfigError(
        f"expected a free port in {ports.start}-{ports.stop - 1} on "
        f"{', '.join(interfaces) or 'every interface'}; "
        f"{reason}",
        remedy="mend [network] in the profile",
    )


def local_addresses(interfaces: Sequence[str]) -> tuple[str, ...]:
    """Addresses of the given interfaces (names or addresses), or of all but loopback; at least one."""
    given = [name for name in interfaces if "." in name or ":" in name]
    by_name = {name: address for _, name in socket.if_nameindex() if (address := ipv4_of(name))}
    named = [by_name[name] for name in interfaces if name in by_name]
    if interfaces:
        return tuple(given + named)
    outer = [address for address in by_name.values() if not address.startswith("127.")]
    return tuple(outer) or ("127.0.0.1",)


def ipv4_of(interface: str) -> str | None:
    """The IPv4 address of an interface by its name; None where it has none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:  # SIOCGIFADDR, netdevice(7)
            reply = fcntl.ioctl(probe.fileno(), 0x8915, struct.pack("256s", interface.encode()[:15]))
        except OSError:
            return None
    return socket.inet_ntoa(reply[20:24])


@dataclass(slots=True)
class _Peer:
    """Open connections to one peer."""

    outbound: zmq.asyncio.Socket | None = None
    hang_up: asyncio.Event = field(default_factory=asyncio.Event)  # ends the dial that holds `outbound`
    inbound: bytes | None = None  # its routing id on our ROUTER
    inbound_seen: float = 0.0
    busy: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(REQUESTS_PER_PEER))


class Transport:
    """All connections of one daemon. `request` for answers, `send` for events."""

    def __init__(
        self, identity: Identity, admit: Admit, handle_request: HandleRequest, handle_event: HandleEvent
    ) -> None:
        """`admit` is asked for each connection and again for each message."""
        self._identity, self._admit = identity, admit
        self._handle_request, self._handle_event = handle_request, handle_event
        self._context = zmq.asyncio.Context()
        self._peers: dict[str, _Peer] = {}
        self._pending: dict[tuple[str, int], asyncio.Future[dict[str, Any]]] = {}
        self._numbers = itertools.count(1)
        self._tasks: set[asyncio.Task[None]] = set()
        self._router: zmq.asyncio.Socket | None = None
        self.port = 0
        self.refused_messages = 0
        self.addresses_seen: dict[str, str] = {}  # node id -> address of its last inbound message

    async def start(self, interfaces: Sequence[str], port: int) -> None:
        zap = self._context.socket(zmq.REP)
        zap.linger = 0
        zap.bind(ZAP_ENDPOINT)
        self._spawn(self._serve_zap(zap))
        router = self._context.socket(zmq.ROUTER)
        self._limit(router)
        secure_server(router, self._identity.secret_key)
        try:
            self.port = bind(router, interfaces, range(port, port + 1))
        except BaseException:
            router.close()
            raise
        self._router = router
        self._spawn(self._receive_inbound(router))

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for future in self._pending.values():
            future.cancel()
        self._context.destroy(linger=200)

    # --- sending ---

    def is_connected(self, node_id: str) -> bool:
        peer = self._peers.get(node_id)
        return peer is not None and (peer.outbound is not None or peer.inbound is not None)

    def dials(self, node_id: str) -> bool:
        """True when this side opened the connection: then our workers dial too."""
        peer = self._peers.get(node_id)
        return peer is not None and peer.outbound is not None

    def send(self, node_id: str, kind: str, body: Any = None) -> None:
        """An event, without an answer; PeerError when there is no connection."""
        self._send(node_id, wire.pack(kind, body))

    async def request(self, node_id: str, kind: str, body: Any, timeout_s: float) -> dict[str, Any]:
        """The answer's body. PeerError when none comes in time; the peer's own error when it sent one."""
        number = next(self._numbers)
        future: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._pending[node_id, number] = future
        try:
            self._send(node_id, wire.pack(kind, body, request=number))
            async with asyncio.timeout(timeout_s):
                return await future
        except TimeoutError as error:
            raise PeerError(
                f"expected node {node_id[:8]} to answer {kind!r} within {timeout_s:g} s; nothing came"
            ) from error
        finally:
            self._pending.pop((node_id, number), None)

    def _send(self, node_id: str, packed: bytes) -> None:
        peer = self._peers.get(node_id)
        try:
            if peer is not None and peer.outbound is not None:
                peer.outbound.send(packed, zmq.DONTWAIT)
                return
            if peer is not None and peer.inbound is not None and self._router is not None:
                self._router.send_multipart([peer.inbound, packed], zmq.DONTWAIT)
                return
        except zmq.ZMQError as error:
            raise PeerError(f"node {node_id[:8]} does not take messages: {error}") from error
        raise PeerError(f"expected a connection to node {node_id[:8]}; there is none")

    # --- dialling ---

    async def dial(
        self,
        node_id: str,
        address: str,
        port: int,
        hello: wire.Hello,
        connected: Callable[[wire.Hello], None],
    ) -> None:
        """Connect to a peer at one address, greet it, then receive until the connection ends.

        Raises PeerError when there is no answer, TrustError when the other side refuses our key.
        """
        sock = self._context.socket(zmq.DEALER)
        self._limit(sock)
        secure_client(sock, (self._identity.public_key, self._identity.secret_key), key_of(node_id))
        monitor = sock.get_monitor_socket(zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_FAILED_AUTH)
        ended = asyncio.ensure_future(_until_ended(monitor))
        receiving = asyncio.ensure_future(self._receive_outbound(node_id, sock))
        hang_up = asyncio.Event()
        told = asyncio.ensure_future(hang_up.wait())
        try:
            _connect(sock, address, port)
            greeting = asyncio.ensure_future(self._greet(node_id, sock, hello))
            await asyncio.wait([ended, greeting], return_when=asyncio.FIRST_COMPLETED)
            if not greeting.done():
                greeting.cancel()
                await asyncio.gather(greeting, return_exceptions=True)
                raise ended.result()
            their_hello = greeting.result()
            peer = self._peer(node_id)
            peer.outbound, peer.hang_up = sock, hang_up
            connected(their_hello)
            await asyncio.wait([ended, receiving, told], return_when=asyncio.FIRST_COMPLETED)
            raise PeerError(f"the connection to node {node_id[:8]} ended")
        finally:
            known = self._peers.get(node_id)
            if known is not None and known.outbound is sock:
                known.outbound = None
                self._fail_pending(node_id)
            for task in (ended, receiving, told):
                task.cancel()
            await asyncio.gather(ended, receiving, told, return_exceptions=True)
            sock.disable_monitor()
            monitor.close(0)
            sock.close(0)

    async def _greet(self, node_id: str, sock: zmq.asyncio.Socket, hello: wire.Hello) -> wire.Hello:
        number = next(self._numbers)
        future: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._pending[node_id, number] = future
        try:
            await sock.send(wire.pack("hello", hello, request=number))
            async with asyncio.timeout(HANDSHAKE_MS / 1000):
                return wire.read_body(wire.Hello, await future)
        except TimeoutError as error:
            raise PeerError(f"expected node {node_id[:8]} to greet back; nothing came") from error
        finally:
            self._pending.pop((node_id, number), None)

    async def pair(
        self, server_key: bytes, one_time: tuple[bytes, bytes], address: str, port: int, body: wire.Pair
    ) -> wire.Paired:
        """Use a one-time key for the one message it admits."""
        sock = self._context.socket(zmq.DEALER)
        self._limit(sock)
        secure_client(sock, one_time, server_key)
        monitor = sock.get_monitor_socket(zmq.EVENT_HANDSHAKE_FAILED_AUTH)
        refused = asyncio.ensure_future(_until_ended(monitor))
        try:
            _connect(sock, address, port)
            await sock.send(wire.pack("pair", body, request=1))
            answer = asyncio.ensure_future(sock.recv())
            await asyncio.wait([answer, refused], timeout=5, return_when=asyncio.FIRST_COMPLETED)
            if refused.done():
                answer.cancel()
                raise refused.result()
            if not answer.done():
                answer.cancel()
                raise PeerError(f"expected an answer from {address}:{port}; nothing came")
            message = wire.unpack(answer.result())
            if message.kind == "error":
                wire.raise_error(message.body)
            return wire.read_body(wire.Paired, message.body)
        finally:
            refused.cancel()
            await asyncio.gather(refused, return_exceptions=True)
            sock.disable_monitor()
            monitor.close(0)
            sock.close(0)

    def disconnect(self, node_id: str) -> None:
        """Stop talking to a peer at once; its dial ends by itself."""
        peer = self._peers.pop(node_id, None)
        if peer is not None:
            peer.hang_up.set()
        self._fail_pending(node_id)

    def drop_inbound(self, node_id: str) -> None:
        peer = self._peers.get(node_id)
        if peer is not None and peer.inbound is not None:
            peer.inbound = None
            if peer.outbound is None:
                self._fail_pending(node_id)

    # --- receiving ---

    async def _serve_zap(self, zap: zmq.asyncio.Socket) -> None:
        try:
            while True:
                frames = await zap.recv_multipart()
                await zap.send_multipart(answer_zap(frames, self._admit))
        finally:
            zap.close(0)

    async def _receive_inbound(self, router: zmq.asyncio.Socket) -> None:
        try:
            while True:
                frames = await router.recv_multipart(copy=False)
                user = str(frames[-1].get("User-Id"))
                # the connection may be older than a revocation: the key is asked about each time
                key = bytes.fromhex(user[len(INVITED) :]) if user.startswith(INVITED) else key_of(user)
                if len(frames) != 2 or self._admit(key) != user:
                    self.refused_messages += 1
                    continue
                routing_id = frames[0].bytes
                reply = self._reply_inbound(router, routing_id)
                if not user.startswith(INVITED):
                    peer = self._peer(user)
                    peer.inbound, peer.inbound_seen = routing_id, time.monotonic()
                    with contextlib.suppress(zmq.ZMQError):
                        self.addresses_seen[user] = str(frames[-1].get("Peer-Address")).removeprefix(
                            "::ffff:"
                        )
                self._dispatch(user, frames[1].bytes, reply)
        finally:
            router.close(200)

    async def _receive_outbound(self, node_id: str, sock: zmq.asyncio.Socket) -> None:
        while True:
            packed = await sock.recv()
            if self._admit(key_of(node_id)) != node_id:
                self.refused_messages += 1
                return
            self._dispatch(node_id, packed, lambda answer: sock.send(answer, zmq.DONTWAIT))

    def _reply_inbound(self, router: zmq.asyncio.Socket, routing_id: bytes) -> Callable[[bytes], Any]:
        return lambda packed: router.send_multipart([routing_id, packed], zmq.DONTWAIT)

    def _dispatch(self, user: str, packed: bytes, reply: Callable[[bytes], Any]) -> None:
        """One message of an authenticated peer; nothing that it holds may raise here."""
        try:
            message = wire.unpack(packed)
            if user.startswith(INVITED) and message.kind != "pair":
                raise ProtocolError("a one-time key may only pair")
            if message.answers:
                self._resolve(user, message)
            elif message.request:
                self._spawn(self._answer(user, message, reply))
            else:
                self._handle_event(user, message)
        except EdgedError as error:
            self.refused_messages += 1
            log.warning("message refused", extra={"peer": user[:8], "reason": str(error)})
        except Exception:  # outermost frame of a connection: one message must not end the others
            self.refused_messages += 1
            log.exception("message failed", extra={"peer": user[:8]})

    def _resolve(self, node_id: str, message: wire.Message) -> None:
        future = self._pending.get((node_id, message.answers))
        if future is None or future.done():
            return
        if message.kind == "error":
            try:
                wire.raise_error(message.body)
            except EdgedError as error:
                future.set_exception(error)
        else:
            future.set_result(message.body)

    async def _answer(self, user: str, message: wire.Message, reply: Callable[[bytes], Any]) -> None:
        async with self._peer(user).busy if not user.startswith(INVITED) else contextlib.nullcontext():
            try:
                body = await self._handle_request(user, message)
                packed = wire.pack("ok", body, answers=message.request)
            except EdgedError as error:
                packed = wire.pack_error(error, answers=message.request)
            except Exception as error:  # outermost frame of a connection: one request must not end it
                log.exception("request failed", extra={"peer": user[:8], "kind": message.kind})
                packed = wire.pack_error(
                    EdgedError(f"internal error: {type(error).__name__}"), answers=message.request
                )
        with contextlib.suppress(zmq.ZMQError):
            reply(packed)

    # --- bookkeeping ---

    def _peer(self, node_id: str) -> _Peer:
        return self._peers.setdefault(node_id, _Peer())

    def _fail_pending(self, node_id: str) -> None:
        if self.is_connected(node_id):
            return
        for (node, _), future in self._pending.items():
            if node == node_id and not future.done():
                future.set_exception(PeerError(f"the connection to node {node_id[:8]} ended"))

    def _limit(self, sock: zmq.asyncio.Socket) -> None:
        sock.linger = 0
        sock.maxmsgsize = wire.HEADER_BYTES_MAX
        sock.sndhwm = sock.rcvhwm = QUEUE_MESSAGES

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _connect(sock: zmq.asyncio.Socket, address: str, port: int) -> None:
    """Dial; PeerError where the address is none, since a peer may name anything."""
    try:
        sock.connect(endpoint(address, port))
    except zmq.ZMQError as error:
        raise PeerError(f"expected an address and a port; {address:.64}:{port} came ({error})") from error


async def _until_ended(monitor: zmq.asyncio.Socket) -> EdgedError:
    """The reason why a dialled connection is over, when it is."""
    event = parse_monitor_message(await monitor.recv_multipart())
    if event["event"] == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
        return TrustError(
            "the other side does not admit this key", remedy="pair with `edged invite` and `edged join`"
        )
    return PeerError("the connection was closed")

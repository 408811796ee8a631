"""No frame of ours is parsed for anybody unpaired: one real transport, its parser counted.

The transport listens on loopback; strangers are plain sockets and libzmq clients in this process.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import zmq
import zmq.asyncio
from zmq.utils import z85

from edged import wire
from edged.identity import Identity, node_id_of
from edged.transport import INVITED, Transport, new_keys, secure_client

GUARD_S = 30.0
PATIENCE_S = 0.3  # for what must not come, after something that came


@dataclass
class Door:
    """One listening transport, whom it admits, and everything that got through."""

    transport: Transport
    server_key: bytes
    admitted: dict[bytes, str]
    parsed: list[bytes] = field(default_factory=list)
    handled: list[str] = field(default_factory=list)

    async def until(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(GUARD_S):
            while True:
                if holds():
                    return
                await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def door(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Door]:
    public, secret = new_keys()
    admitted: dict[bytes, str] = {}
    opened = Door(None, public, admitted)  # type: ignore[arg-type]

    async def handle_request(user: str, message: wire.Message) -> dict[str, Any]:
        opened.handled.append(message.kind)
        return {}

    def handle_event(user: str, message: wire.Message) -> None:
        opened.handled.append(message.kind)

    unpack = wire.unpack

    def counted(packed: bytes | memoryview) -> wire.Message:
        opened.parsed.append(bytes(packed))
        return unpack(packed)

    monkeypatch.setattr(wire, "unpack", counted)
    opened.transport = Transport(
        Identity("laptop", public, secret), admitted.get, handle_request, handle_event
    )
    await opened.transport.start(["127.0.0.1"], 0)
    try:
        yield opened
    finally:
        await opened.transport.close()


@contextlib.asynccontextmanager
async def dealer(at: Door, keys: tuple[bytes, bytes] | None) -> AsyncIterator[zmq.asyncio.Socket]:
    context = zmq.asyncio.Context()
    sock = context.socket(zmq.DEALER)
    sock.linger = 0
    if keys is not None:
        secure_client(sock, keys, at.server_key)
    sock.connect(f"tcp://127.0.0.1:{at.transport.port}")
    try:
        yield sock
    finally:
        context.destroy(linger=0)


async def a_member_still_gets_through(at: Door) -> None:
    """The proof that what came before had its chance: a later message is parsed."""
    keys = new_keys()
    at.admitted[keys[0]] = node_id_of(keys[0])
    async with dealer(at, keys) as sock:
        await sock.send(wire.pack("introduce", request=77))
        async with asyncio.timeout(GUARD_S):
            await sock.recv()
    assert at.handled.pop() == "introduce"
    assert wire.pack("introduce", request=77) in at.parsed


# --- strangers --------------------------------------------------------------------------------------

Attack = Callable[[Door], Awaitable[None]]


def raw(sent: bytes) -> Attack:
    async def attack(at: Door) -> None:
        loop = asyncio.get_running_loop()
        with socket.create_connection(("127.0.0.1", at.transport.port), timeout=GUARD_S) as sock:
            sock.setblocking(False)
            with contextlib.suppress(OSError):
                await loop.sock_sendall(sock, sent)
            with contextlib.suppress(OSError, TimeoutError):
                async with asyncio.timeout(PATIENCE_S):
                    while await loop.sock_recv(sock, 65536):
                        pass

    return attack


def zmtp(mechanism: bytes) -> bytes:
    """A ZMTP 3.1 greeting of another mechanism, then a message as if it had been agreed to."""
    greeting = b"\xff" + bytes(8) + b"\x7f\x03\x01" + mechanism.ljust(20, b"\0") + bytes(32)
    ready = b"\x05READY\x0bSocket-Type" + (6).to_bytes(4, "big") + b"DEALER"
    hello = wire.pack("ping", request=1)
    return greeting + b"\x04" + bytes([len(ready)]) + ready + b"\x00" + bytes([len(hello)]) + hello


async def null_client(at: Door) -> None:
    async with dealer(at, None) as sock:
        await sock.send(wire.pack("ping", request=1))
        assert not await sock.poll(PATIENCE_S * 1000)


async def plain_client(at: Door) -> None:
    async with dealer(at, None) as sock:
        sock.disconnect(f"tcp://127.0.0.1:{at.transport.port}")
        sock.plain_username, sock.plain_password = b"laptop", b"secret"
        sock.connect(f"tcp://127.0.0.1:{at.transport.port}")
        await sock.send(wire.pack("ping", request=1))
        assert not await sock.poll(PATIENCE_S * 1000)


async def unknown_key(at: Door) -> None:
    async with dealer(at, new_keys()) as sock:
        for message in (wire.pack("ping", request=1), wire.pack("pair", request=2), b"garbage"):
            await sock.send(message)
        assert not await sock.poll(PATIENCE_S * 1000)


async def somebody_else_s_public_key(at: Door) -> None:
    """A member's public key is no secret; without its secret half the handshake fails."""
    member, mine = new_keys(), new_keys()
    at.admitted[member[0]] = node_id_of(member[0])
    context = zmq.asyncio.Context()
    sock = context.socket(zmq.DEALER)
    sock.linger = 0
    secure_client(sock, mine, at.server_key)
    sock.curve_publickey = z85.encode(member[0])
    sock.connect(f"tcp://127.0.0.1:{at.transport.port}")
    try:
        await sock.send(wire.pack("ping", request=1))
        assert not await sock.poll(PATIENCE_S * 1000)
    finally:
        context.destroy(linger=0)


@pytest.mark.parametrize(
    "attack",
    [
        raw(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"),
        raw(bytes(100_000)),
        raw(b"\xff" * 100_000),
        raw(wire.pack("ping", request=1)),
        raw(zmtp(b"NULL")),
        raw(zmtp(b"CURVE")),
        null_client,
        plain_client,
        unknown_key,
        somebody_else_s_public_key,
    ],
    ids=["http", "zeros", "ones", "header", "zmtp-null", "zmtp-curve", "null", "plain", "unknown", "stolen"],
)
def test_nothing_of_a_stranger_is_parsed(attack: Attack, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with door(monkeypatch) as at:
            await attack(at)
            assert at.parsed == []
            await a_member_still_gets_through(at)
            assert len(at.parsed) == 1
            assert at.transport.refused_messages == 0  # it never came so far

    asyncio.run(scenario())


@pytest.mark.parametrize("kind", [kind for kind in wire.BODIES if kind != "pair"])
def test_a_one_time_key_may_only_pair(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The header is read to know its kind; nothing acts on any other."""

    async def scenario() -> None:
        async with door(monkeypatch) as at:
            keys = new_keys()
            at.admitted[keys[0]] = INVITED + keys[0].hex()
            async with dealer(at, keys) as sock:
                await sock.send(wire.pack(kind))
                await sock.send(wire.pack(kind, request=1))
                await sock.send(wire.pack(kind, answers=1))
                await at.until(lambda: at.transport.refused_messages == 3)
            assert at.handled == []

    asyncio.run(scenario())


# --- those who were members -------------------------------------------------------------------------


def test_nothing_of_a_forgotten_node_is_parsed_on_an_open_connection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scenario() -> None:
        async with door(monkeypatch) as at:
            keys = new_keys()
            at.admitted[keys[0]] = node_id_of(keys[0])
            async with dealer(at, keys) as sock:
                await sock.send(wire.pack("ping"))
                await at.until(lambda: at.handled == ["ping"])
                del at.admitted[keys[0]]
                await sock.send(wire.pack("ping"))
                await sock.send(b"\xc1 no msgpack")
                await at.until(lambda: at.transport.refused_messages == 2)
            assert len(at.parsed) == 1

    asyncio.run(scenario())


def test_nothing_of_a_forgotten_node_is_parsed_where_we_dialled_it(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with door(monkeypatch) as at:
            public, secret = new_keys()
            node_id = node_id_of(public)
            context = zmq.asyncio.Context()
            router = context.socket(zmq.ROUTER)
            router.linger = 0
            router.curve_server = True
            router.curve_secretkey = z85.encode(secret)
            port = router.bind_to_random_port("tcp://127.0.0.1")
            at.admitted[public] = node_id
            mine = wire.Hello(1, "0", "laptop", 1)
            up = asyncio.Event()
            dialling = asyncio.ensure_future(
                at.transport.dial(node_id, "127.0.0.1", port, mine, lambda hello: up.set())
            )
            try:
                routing_id, hello = await router.recv_multipart()
                request = wire.unpack(hello).request
                answer = wire.pack("ok", wire.Hello(1, "0", "phone", 1), answers=request)
                await router.send_multipart([routing_id, answer])
                async with asyncio.timeout(GUARD_S):
                    await up.wait()
                at.parsed.clear()
                del at.admitted[public]
                await router.send_multipart([routing_id, wire.pack("ping")])
                await at.until(lambda: at.transport.refused_messages == 1)
                assert at.parsed == []
                assert at.handled == []
            finally:
                dialling.cancel()
                await asyncio.gather(dialling, return_exceptions=True)
                context.destroy(linger=0)

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "frames",
    [[b"", wire.pack("ping")], [wire.pack("ping"), b"more"], [b""], [bytes(wire.HEADER_BYTES_MAX + 1)]],
    ids=["empty first", "two frames", "empty", "too long"],
)
def test_a_member_s_frames_have_one_form(frames: list[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """One frame, not too long, or nothing is done; others are served on."""

    async def scenario() -> None:
        async with door(monkeypatch) as at:
            keys = new_keys()
            at.admitted[keys[0]] = node_id_of(keys[0])
            async with dealer(at, keys) as sock:
                await sock.send_multipart(frames)
                await a_member_still_gets_through(at)
                assert at.handled == []

    asyncio.run(scenario())

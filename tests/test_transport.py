"""Two real transports on loopback: who gets in, what comes back, what is refused."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import zmq

from edged import transport, wire
from edged.errors import ConfigError, EngineError, PeerError, ProtocolError, TrustError
from edged.identity import Identity, node_id_of
from edged.transport import INVITED, Transport, new_keys

LO = ("127.0.0.1",)
PATIENCE_S = 30.0  # a hang, not a slow machine


@dataclass
class End:
    """One node: its transport, whom it admits, what it was told."""

    name: str
    identity: Identity
    transport: Transport = field(init=False)
    admitted: dict[bytes, str] = field(default_factory=dict)
    events: list[tuple[str, wire.Message]] = field(default_factory=list)
    answer: Callable[[str, wire.Message], Awaitable[Any]] | None = None
    heard: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.transport = Transport(self.identity, self.admitted.get, self._answer, self._event)

    @property
    def node_id(self) -> str:
        return self.identity.node_id

    def admit(self, *others: End) -> None:
        for other in others:
            self.admitted[other.identity.public_key] = other.node_id

    def hello(self) -> wire.Hello:
        return wire.Hello(1, "0.1.0", self.name, self.transport.port)

    async def _answer(self, user: str, message: wire.Message) -> Any:
        if self.answer is not None and message.kind != "hello":
            return await self.answer(user, message)
        return self.hello()

    def _event(self, user: str, message: wire.Message) -> None:
        self.events.append((user, message))
        self.heard.set()


@contextlib.asynccontextmanager
async def ends(*names: str) -> AsyncIterator[list[End]]:
    """Nodes that listen; strangers to each other."""
    made = [End(name, Identity(name, *new_keys())) for name in names]
    try:
        for end in made:
            await end.transport.start(LO, 0)
        yield made
    finally:
        for end in made:
            await end.transport.close()


@contextlib.asynccontextmanager
async def dialled(a: End, b: End) -> AsyncIterator[asyncio.Task[None]]:
    """`a` has dialled `b`, and both greeted."""
    up = asyncio.Event()
    dialling = asyncio.ensure_future(
        a.transport.dial(b.node_id, LO[0], b.transport.port, a.hello(), lambda hello: up.set())
    )
    waiting = asyncio.ensure_future(up.wait())
    await asyncio.wait([dialling, waiting], return_when=asyncio.FIRST_COMPLETED, timeout=PATIENCE_S)
    try:
        if dialling.done():
            dialling.result()
        yield dialling
    finally:
        for task in (dialling, waiting):
            task.cancel()
        await asyncio.gather(dialling, waiting, return_exceptions=True)


@contextlib.asynccontextmanager
async def connected() -> AsyncIterator[tuple[End, End]]:
    async with ends("a", "b") as (a, b):
        a.admit(b)
        b.admit(a)
        async with dialled(a, b):
            yield a, b


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(2 * PATIENCE_S):
            await test()

    asyncio.run(bounded())


async def ask(sender: End, receiver: End, body: Any = None, timeout_s: float = PATIENCE_S) -> dict[str, Any]:
    return await sender.transport.request(receiver.node_id, "ask", body or {}, timeout_s)


# --- talking --------------------------------------------------------------------------------------


def test_both_ends_ask_over_the_connection_that_one_of_them_opened() -> None:
    async def test() -> None:
        async with connected() as (a, b):
            for asker, asked in ((a, b), (b, a)):

                async def answer(user: str, message: wire.Message, asker: End = asker) -> dict[str, Any]:
                    assert user == asker.node_id
                    return {"twice": 2 * message.body["n"]}

                asked.answer = answer
                assert await ask(asker, asked, {"n": 21}) == {"twice": 42}
            assert a.transport.dials(b.node_id)
            assert not b.transport.dials(a.node_id)
            assert b.transport.addresses_seen == {a.node_id: "127.0.0.1"}

    run(test)


def test_answers_find_their_requests_in_any_order() -> None:
    async def test() -> None:
        async with connected() as (a, b):
            first = asyncio.Event()

            async def answer(user: str, message: wire.Message) -> dict[str, Any]:
                if message.body["n"] == 0:
                    await first.wait()
                elif message.body["n"] == 9:
                    first.set()
                return message.body

            b.answer = answer
            answers = await asyncio.gather(*(ask(a, b, {"n": n}) for n in range(10)))
            assert [found["n"] for found in answers] == list(range(10))

    run(test)


def test_an_event_arrives_with_the_key_that_sent_it() -> None:
    async def test() -> None:
        async with connected() as (a, b):
            a.transport.send(b.node_id, "leave")
            await b.heard.wait()
            assert [(user, message.kind) for user, message in b.events] == [(a.node_id, "leave")]

    run(test)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (EngineError("no memory", remedy="free some"), EngineError),
        (TrustError("not you"), TrustError),
        (ValueError("a secret /path"), None),
    ],
)
def test_an_error_comes_back_as_its_class_and_a_mistake_without_its_text(
    error: Exception, expected: type[Exception] | None
) -> None:
    async def test() -> None:
        async with connected() as (a, b):

            async def answer(user: str, message: wire.Message) -> None:
                raise error

            b.answer = answer
            with pytest.raises(expected or transport.EdgedError) as caught:
                await ask(a, b)
            if expected:
                assert (str(caught.value), caught.value.remedy) == (str(error), error.remedy)  # type: ignore
            else:
                assert "/path" not in str(caught.value)
            b.answer = None
            await ask(a, b)  # the connection is as good as before

    run(test)


def test_a_peer_that_does_not_answer_is_named_with_what_was_asked() -> None:
    async def test() -> None:
        async with connected() as (a, b):

            async def answer(user: str, message: wire.Message) -> None:
                await asyncio.Event().wait()

            b.answer = answer
            with pytest.raises(
                PeerError, match=f"expected node {b.node_id[:8]} to answer 'ask' within 0.05 s"
            ):
                await ask(a, b, timeout_s=0.05)
            with pytest.raises(PeerError, match="there is none"):
                await a.transport.request("x" * 52, "ask", {}, 1.0)

    run(test)


def test_a_request_that_waits_fails_when_the_connection_ends() -> None:
    async def test() -> None:
        async with ends("a", "b") as (a, b):
            a.admit(b)
            b.admit(a)
            asked = asyncio.Event()

            async def answer(user: str, message: wire.Message) -> None:
                asked.set()
                await asyncio.Event().wait()

            b.answer = answer
            async with dialled(a, b) as dialling:
                waiting = asyncio.ensure_future(ask(a, b))
                await asked.wait()
                await b.transport.close()
                with pytest.raises(PeerError, match="ended"):
                    await waiting
                with pytest.raises(PeerError, match="ended"):
                    await dialling
            assert not a.transport.is_connected(b.node_id)

    run(test)


# --- who gets in ----------------------------------------------------------------------------------


def test_a_key_that_nobody_admitted_is_refused_at_the_handshake() -> None:
    async def test() -> None:
        async with ends("a", "b") as (a, b):
            a.admit(b)
            with pytest.raises(TrustError, match="does not admit this key"):
                async with dialled(a, b):
                    pass
            assert not b.events
            assert not b.transport.is_connected(a.node_id)

    run(test)


def test_a_listener_with_another_key_than_the_one_expected_is_not_talked_to() -> None:
    async def test() -> None:
        async with ends("a", "b", "impostor") as (a, b, impostor):
            a.admit(b)
            for end in (b, impostor):
                end.admit(a)
            with pytest.raises(PeerError):
                await a.transport.dial(
                    b.node_id, LO[0], impostor.transport.port, a.hello(), lambda hello: None
                )
            assert not impostor.events

    run(test)


def test_a_revoked_key_is_refused_on_the_connection_that_it_already_has() -> None:
    async def test() -> None:
        async with connected() as (a, b):
            await ask(a, b)
            del b.admitted[a.identity.public_key]
            refused = b.transport.refused_messages
            a.transport.send(b.node_id, "leave")
            with pytest.raises(PeerError, match="nothing came"):
                await ask(a, b, timeout_s=0.3)
            assert b.transport.refused_messages == refused + 2
            assert not b.events

    run(test)


def test_a_one_time_key_may_pair_and_nothing_else() -> None:
    async def test() -> None:
        async with ends("inviter") as (inviter,):
            public, secret = new_keys()
            inviter.admitted[public] = INVITED + public.hex()
            seen: list[str] = []

            async def answer(user: str, message: wire.Message) -> wire.Paired:
                seen.append(message.kind)
                return wire.Paired(inviter.node_id, "inviter")

            inviter.answer = answer
            newcomer = End("new", Identity("new", *new_keys()))
            body = wire.Pair(newcomer.node_id, "new", 1, 1)
            port, key = inviter.transport.port, inviter.identity.public_key
            paired = await newcomer.transport.pair(key, (public, secret), LO[0], port, body)
            assert paired == wire.Paired(inviter.node_id, "inviter")

            with zmq.Context() as context, context.socket(zmq.DEALER) as sock:
                transport.secure_client(sock, (public, secret), key)
                sock.connect(transport.endpoint(LO[0], port))
                for kind in ("hello", "describe", "forget"):
                    sock.send(wire.pack(kind, {}, request=5))
                sock.send(wire.pack("pair", body, request=6))
                assert await asyncio.to_thread(sock.poll, int(1000 * PATIENCE_S))
                assert wire.unpack(sock.recv()).answers == 6
            assert seen == ["pair", "pair"]

            del inviter.admitted[public]
            with pytest.raises(TrustError, match="does not admit this key"):
                await newcomer.transport.pair(key, (public, secret), LO[0], port, body)
            await newcomer.transport.close()

    run(test)


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "frames",
    [
        [b"\xc1"],
        [b""],
        [wire.pack("leave"), b"a second frame"],
        [b"\x81\xa1k" + b"\x91" * 1000 + b"\x90"],
    ],
    ids=["no msgpack", "empty", "two frames", "deep"],
)
def test_nonsense_of_a_member_costs_that_message_alone(frames: list[bytes]) -> None:
    async def test() -> None:
        async with connected() as (a, b):
            raw = a.transport._peers[b.node_id].outbound
            assert raw is not None
            await raw.send_multipart(frames)
            await ask(a, b)
            assert b.transport.refused_messages == 1
            assert not b.events

    run(test)


def test_a_header_beyond_the_limit_ends_the_connection_and_reaches_nobody() -> None:
    async def test() -> None:
        async with ends("a", "b") as (a, b):
            a.admit(b)
            b.admit(a)
            async with dialled(a, b) as dialling:
                with pytest.raises(ProtocolError, match="to send"):
                    await ask(a, b, {"x": b"\0" * wire.HEADER_BYTES_MAX})
                raw = a.transport._peers[b.node_id].outbound
                assert raw is not None
                await raw.send(b"\0" * (wire.HEADER_BYTES_MAX + 1))
                with pytest.raises(PeerError, match="ended"):
                    await dialling
            assert not b.events
            assert b.transport.refused_messages == 0  # libzmq refused it, before we had a frame
            async with dialled(a, b):
                await ask(a, b)

    run(test)


def test_an_event_that_its_handler_refuses_is_counted_and_the_next_one_is_heard() -> None:
    async def test() -> None:
        async with connected() as (a, b):
            heard = b.transport._handle_event

            def handle(user: str, message: wire.Message) -> None:
                if message.kind == "introduce":
                    raise TrustError("expected a node id of 52 base32 characters")
                heard(user, message)

            b.transport._handle_event = handle
            a.transport.send(b.node_id, "introduce", {"node_id": "nonsense"})
            a.transport.send(b.node_id, "leave")
            await b.heard.wait()
            assert [message.kind for _, message in b.events] == ["leave"]
            assert b.transport.refused_messages == 1

    run(test)


@pytest.mark.parametrize(
    "frames",
    [
        [b"1.0", b"1", b"edged", b"127.0.0.1", b"", b"CURVE", b"k" * 32],
        [b"1.0", b"1", b"edged", b"127.0.0.1", b"", b"NULL", b"k" * 32],
        [b"1.0", b"1", b"other", b"127.0.0.1", b"", b"CURVE", b"k" * 32],
        [b"1.0", b"1", b"edged", b"127.0.0.1", b"", b"CURVE", b"x" * 32],
        [b"1.0", b"1", b"edged", b"127.0.0.1", b"", b"PLAIN", b"user", b"word"],
    ],
)
def test_zap_admits_a_known_curve_key_in_its_domain_alone(frames: list[bytes]) -> None:
    known = {b"k" * 32: "somebody"}
    version, request, status, _, user, _ = transport.answer_zap(frames, known.get)
    is_good = (frames[2], frames[5], frames[6]) == (b"edged", b"CURVE", b"k" * 32) and len(frames) == 7
    assert (version, request) == (b"1.0", b"1")
    assert (status, user) == ((b"200", b"somebody") if is_good else (b"400", b""))


# --- addresses and keys ---------------------------------------------------------------------------


def test_a_taken_port_is_a_mistake_in_the_profile() -> None:
    async def test() -> None:
        async with ends("a") as (a,):
            other = End("b", Identity("b", *new_keys()))
            with pytest.raises(
                ConfigError, match=f"expected a free port in {a.transport.port}-{a.transport.port}"
            ):
                await other.transport.start(LO, a.transport.port)
            await other.transport.close()

    run(test)


def test_a_range_of_ports_is_used_until_it_is_full() -> None:
    with zmq.Context() as context, context.socket(zmq.PAIR) as probe:
        first = transport.bind(probe, LO, range(1))
        socks = [context.socket(zmq.PAIR) for _ in range(2)]
        try:
            taken = transport.bind(socks[0], LO, range(first, first + 20))
            assert first < taken < first + 20
            with pytest.raises(ConfigError, match="expected a free port"):
                transport.bind(socks[1], LO, range(first, first + 1))
        finally:
            for sock in socks:
                sock.close(0)


@pytest.mark.parametrize(
    ("address", "text"),
    [
        ("127.0.0.1", "tcp://127.0.0.1:5"),
        ("::1", "tcp://[::1]:5"),
        ("lo", "tcp://lo:5"),
        ("pi.local", "tcp://pi.local:5"),
    ],
)
def test_an_address_is_written_as_zeromq_reads_it(address: str, text: str) -> None:
    assert transport.endpoint(address, 5) == text


def test_loopback_by_name_or_address_is_found_as_its_address() -> None:
    assert transport.local_addresses(("lo",)) == ("127.0.0.1",)
    assert transport.local_addresses(("127.0.0.1",)) == ("127.0.0.1",)
    assert transport.local_addresses(())


def test_a_public_key_belongs_to_its_secret_one() -> None:
    public, secret = new_keys()
    assert transport.public_of(secret) == public
    transport.check_keys(Identity("a", public, secret))
    with pytest.raises(TrustError, match="altered"):
        transport.check_keys(Identity("a", new_keys()[0], secret))
    assert len(node_id_of(public)) == 52

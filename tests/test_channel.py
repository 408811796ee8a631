"""The data plane between ranks: real sockets with CURVE on loopback, also between processes."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgpack
import pytest
import zmq

from edged import channel as channels
from edged import wire
from edged.channel import End, ZmqChannel
from edged.errors import PeerError, ProtocolError
from edged.transport import endpoint, new_keys, secure_client

LO = ("127.0.0.1",)
ANY = range(1)
PATIENCE_S = 30.0  # a hang, not a slow machine

Ends = dict[int, End]


def channel(rank: int, size: int = 2) -> ZmqChannel:
    return ZmqChannel(rank, size, LO, ANY)


@contextlib.contextmanager
def opened(size: int = 2, relay: Callable[[int], int] = lambda port: port) -> Iterator[list[ZmqChannel]]:
    """All ranks of a plan, connected: the higher rank of each pair dials. `relay`: port -> port."""
    ranks = [channel(rank, size) for rank in range(size)]
    try:
        ports = [found.listen(list(range(rank + 1, size))) for rank, found in enumerate(ranks)]

        def ends_of(rank: int) -> Ends:
            return {
                other: End(
                    ranks[other].public_key,
                    LO[0],
                    relay(ports[other][rank]) if other < rank else 0,
                )
                for other in range(size)
                if other != rank
            }

        with ThreadPoolExecutor(size) as threads:
            list(threads.map(lambda rank: ranks[rank].open("group", ends_of(rank)), range(size)))
        yield ranks
    finally:
        for found in ranks:
            found.close()


# --- messages -------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 3, 4])
def test_every_rank_hears_every_other_one_in_order(size: int) -> None:
    with opened(size) as ranks:
        for number in range(3):
            for a in ranks:
                for b in range(size):
                    if a.rank != b:
                        a.send(b, {"from": a.rank, "n": number}, [bytes([a.rank, b, number])])
        for b in ranks:
            for a in range(size):
                for number in range(3):
                    if a != b.rank:
                        header, [frame] = b.receive(a, PATIENCE_S)
                        assert header == {"from": a, "n": number}
                        assert bytes(frame) == bytes([a, b.rank, number])


FRAMES: list[Sequence[Any]] = [
    [],
    [b""],
    [b"\0\xff" * 40_000],
    [b"a", b"bb", b"ccc"],
    [b"x"] * wire.FRAMES_MAX,
    [bytearray(b"array"), memoryview(b"view")],
]


@pytest.mark.parametrize("frames", FRAMES, ids=lambda frames: f"{len(frames)} frames")
def test_frames_arrive_as_they_were_and_never_through_msgpack(
    frames: Sequence[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened() as (a, b):
        packed: list[Any] = []
        real = msgpack.packb
        monkeypatch.setattr(
            msgpack, "packb", lambda value, **named: packed.append(value) or real(value, **named)
        )
        a.send(1, {"k": "x"}, frames)
        header, received = b.receive(0, PATIENCE_S)
        assert packed == [{"k": "x"}]
        assert header == {"k": "x"}
        assert [bytes(frame) for frame in received] == [bytes(frame) for frame in frames]
        assert all(isinstance(frame, memoryview) and frame.contiguous for frame in received)


def test_a_message_that_waits_is_seen_and_is_not_taken_by_looking() -> None:
    with opened() as (a, b):
        assert not b.poll(0, 0.01)
        a.send(1, {"n": 1})
        assert b.poll(0, PATIENCE_S)
        assert b.poll(0, 0)
        assert b.receive(0, PATIENCE_S)[0] == {"n": 1}
        assert not b.poll(0, 0)


# --- who is missing, who is strange ---------------------------------------------------------------


def test_a_rank_that_says_nothing_is_named() -> None:
    with opened(3) as ranks, pytest.raises(PeerError, match=r"rank 2 sent nothing for 0\.05 s"):
        ranks[0].receive(2, 0.05)


def test_a_rank_that_takes_nothing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channels, "SEND_S", 0.05)
    with opened(3) as ranks:
        endless = (ranks[0].send(2, {}, [b"\0" * 100_000]) for _ in range(10_000))
        with pytest.raises(PeerError, match=r"rank 2 took no message for 0\.05 s"):
            list(endless)
        ranks[0].send(1, {"n": 1})  # the others go on
        assert ranks[1].receive(0, PATIENCE_S)[0] == {"n": 1}


def test_a_rank_that_never_comes_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channels, "OPEN_S", 0.1)
    alone = channel(0)
    try:
        alone.listen([1])
        with pytest.raises(PeerError, match=r"rank 1 took no message for 0\.1 s"):
            alone.open("group", {1: End(new_keys()[0], LO[0], 0)})
    finally:
        alone.close()


@pytest.mark.parametrize(
    "said",
    [
        {"k": "greet", "group": "another", "rank": 1},
        {"k": "greet", "group": "group", "rank": 2},
        {"k": "hello", "group": "group", "rank": 1},
        {"k": "greet", "group": "group", "rank": 1, "more": 1},
        {},
    ],
)
def test_a_rank_that_greets_from_elsewhere_is_not_listened_to(said: dict[str, Any]) -> None:
    listener, other = channel(0), channel(1)
    try:
        [port] = listener.listen([1]).values()
        sock = other._socket()
        secure_client(sock, other._keys, listener.public_key)
        sock.connect(endpoint(LO[0], port))
        other._links[0] = sock
        other.send(0, said)
        with pytest.raises(ProtocolError, match="expected the greeting of rank 1"):
            listener.open("group", {1: End(other.public_key, LO[0], 0)})
    finally:
        listener.close()
        other.close()


@pytest.mark.parametrize(
    "frames",
    [
        [b"\xc1"],
        [msgpack.packb([1, 2])],
        [msgpack.packb({1: 2})],
        [msgpack.packb({}), *[b"x"] * (wire.FRAMES_MAX + 1)],
    ],
    ids=["no msgpack", "no map", "no text", "too many frames"],
)
def test_a_message_that_is_not_one_of_ours_is_a_protocol_error(frames: list[bytes]) -> None:
    with opened() as (a, b):
        a._links[1].send_multipart(frames)
        with pytest.raises(ProtocolError):
            b.receive(0, PATIENCE_S)


@pytest.mark.parametrize("keys", ["a stranger's", "another rank's", "none"])
def test_a_wrong_key_never_gets_in_before_or_after_the_right_one(keys: str) -> None:
    """Somebody who knows port and public key, at each moment: while nobody is admitted, and later."""
    listener, right, third = channel(0, 3), channel(1, 3), channel(2, 3)
    context = zmq.Context()
    sock = context.socket(zmq.PAIR)
    try:
        ports = listener.listen([1, 2])
        third_s = (third._keys[0], third._keys[1])
        if keys != "none":
            secure_client(sock, third_s if keys == "another rank's" else new_keys(), listener.public_key)
        sock.linger = 0
        sock.sndtimeo = 0
        sock.connect(endpoint(LO[0], ports[1]))
        with contextlib.suppress(zmq.Again):
            sock.send(msgpack.packb({"k": "greet", "group": "group", "rank": 1}))

        with ThreadPoolExecutor(3) as threads:
            key = listener.public_key
            opening = [
                threads.submit(
                    listener.open,
                    "group",
                    {1: End(right.public_key, LO[0], 0), 2: End(third.public_key, LO[0], 0)},
                ),
                threads.submit(right.open, "group", {0: End(key, LO[0], ports[1])}),
                threads.submit(third.open, "group", {0: End(key, LO[0], ports[2])}),
            ]
            for future in opening:
                future.result()
        with contextlib.suppress(zmq.Again):
            sock.send(msgpack.packb({"from": "a stranger"}))
        right.send(0, {"from": "rank 1"})
        assert listener.receive(1, PATIENCE_S)[0] == {"from": "rank 1"}
        assert not listener.poll(1, 0.2)
        assert not sock.poll(0)
    finally:
        sock.close()
        context.term()
        for found in (listener, right, third):
            found.close()


def test_a_channel_that_was_knocked_at_and_never_opened_closes_at_once() -> None:
    """The knock waits for the keys of the plan; closing must not wait with it."""
    listener = channel(0)
    [port] = listener.listen([1]).values()
    with zmq.Context() as context, context.socket(zmq.PAIR) as sock:
        secure_client(sock, new_keys(), listener.public_key)
        sock.connect(endpoint(LO[0], port))
        asked = threading.Event()
        real = listener._keys_known.wait

        def wait(timeout: float | None = None) -> bool:
            asked.set()
            return real(timeout)

        listener._keys_known.wait = wait  # type: ignore[method-assign]
        assert asked.wait(PATIENCE_S)
        closing = threading.Thread(target=listener.close)
        closing.start()
        closing.join(channels.OPEN_S / 2)
        was_quick = not closing.is_alive()
        closing.join()
        assert was_quick


# --- two processes --------------------------------------------------------------------------------

ECHO = """
import sys
from edged.channel import End, ZmqChannel
port, key, frames = int(sys.argv[1]), bytes.fromhex(sys.argv[2]), int(sys.argv[3])
channel = ZmqChannel(1, 2, ("127.0.0.1",), range(1))
print(channel.public_key.hex(), flush=True)
channel.open("group", {0: End(key, "127.0.0.1", port)})
for _ in range(frames):
    header, frames = channel.receive(0, 30.0)
    channel.send(0, header, frames)
print(channel.bytes_sent, flush=True)
sys.stdin.read()
channel.close()
"""


@contextlib.contextmanager
def echo_process(here: ZmqChannel, messages: int) -> Iterator[subprocess.Popen[str]]:
    [port] = here.listen([1]).values()
    process = subprocess.Popen(
        [sys.executable, "-c", ECHO, str(port), here.public_key.hex(), str(messages)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout
        here.open("group", {1: End(bytes.fromhex(process.stdout.readline()), LO[0], 0)})
        yield process
    finally:
        process.kill()
        process.communicate()


def test_two_processes_talk_and_count_alike() -> None:
    here = channel(0)
    try:
        with echo_process(here, 20) as process:
            block = bytes(range(256)) * 4096
            for number in range(20):
                here.send(1, {"n": number}, [block])
                header, [frame] = here.receive(1, PATIENCE_S)
                assert (header, bytes(frame)) == ({"n": number}, block)
            assert process.stdout
            assert int(process.stdout.readline()) == here.bytes_sent
    finally:
        here.close()


def test_a_process_that_is_killed_is_a_rank_that_says_nothing() -> None:
    here = channel(0)
    try:
        with echo_process(here, 2) as process:
            process.kill()
            process.wait()
            with pytest.raises(PeerError, match="rank 1"):
                here.receive(1, 0.3)
    finally:
        here.close()


# --- what is counted ------------------------------------------------------------------------------


class Relay:
    """A TCP relay on loopback that counts the bytes of each direction."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._listener = socket.create_server((LO[0], 0))
        self.port: int = self._listener.getsockname()[1]
        self.up = self.down = 0  # towards the listener, and back
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            ours, _ = self._listener.accept()
            theirs = socket.create_connection((LO[0], self._target))
            for source, sink, name in ((ours, theirs, "up"), (theirs, ours, "down")):
                thread = threading.Thread(target=self._pump, args=(source, sink, name))
                self._threads.append(thread)
                thread.start()

    def _pump(self, source: socket.socket, sink: socket.socket, name: str) -> None:
        with contextlib.suppress(OSError):
            while part := source.recv(1 << 16):
                setattr(self, name, getattr(self, name) + len(part))
                sink.sendall(part)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)
        source.close()

    def close(self) -> None:
        self._listener.close()
        for thread in self._threads:
            thread.join()


@pytest.mark.parametrize(
    ("count", "sizes"),
    [(2000, []), (1000, [2304]), (1000, [16, 16, 16]), (100, [1 << 20]), (500, [100, 9216])],
    ids=["headers alone", "a hidden state", "three small", "a megabyte", "small and large"],
)
def test_bytes_sent_are_those_on_the_wire(count: int, sizes: list[int]) -> None:
    """Beside a relay that counts, framing and encryption included; ZeroMQ's own pings are the rest."""
    relays: list[Relay] = []

    def relayed(port: int) -> int:
        relays.append(Relay(port))
        return relays[-1].port

    try:
        with opened(relay=relayed) as (listener, dialler):
            [relay] = relays
            frames = [b"\0" * size for size in sizes]
            up, counted = relay.up, dialler.bytes_sent
            for number in range(count):
                dialler.send(0, {"k": "step", "n": number}, frames)
            for _ in range(count):
                listener.receive(1, PATIENCE_S)
            assert dialler.bytes_sent - counted == pytest.approx(relay.up - up, rel=0.001)
            by_kind = {kind: (to, messages, size) for to, kind, messages, size in dialler.sent}
            assert by_kind["step"] == (0, count, dialler.bytes_sent - counted)
            assert by_kind["greet"] == (0, 1, counted)
            assert len(by_kind) == 2

    finally:
        for relay in relays:
            relay.close()


def test_kinds_without_end_are_counted_as_one() -> None:
    with opened() as (listener, dialler):
        for number in range(2 * channels.KINDS_MAX + 10):
            dialler.send(0, {"k": f"kind{number}"})
            listener.receive(1, PATIENCE_S)
        counted = {kind: messages for _, kind, messages, _ in dialler.sent}
        assert counted[channels.OTHER] == 2 * channels.KINDS_MAX + 10 - (len(counted) - 2)
        assert len(counted) == 2 * channels.KINDS_MAX + 1

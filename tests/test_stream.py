"""TLS streams between ranks: who is let in, what is read, and that nobody waits for ever."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from edged import channel as channels
from edged import meeting, wire, worker
from edged.certificate import Credential, new_credential
from edged.channel import End, ZmqChannel
from edged.errors import PeerError, ProtocolError
from edged.meeting import Meeting, StreamEnd
from edged.stream import PREFIX, Stream, context_for
from edged.streams import Streams

LO = "127.0.0.1"
ANY = range(1)
PATIENCE_S = 30.0  # a hang, not a slow machine
GROUP = "group"


def streams_of(rank: int, group: str = GROUP) -> Streams:
    return Streams(new_credential(group, rank))


@contextlib.contextmanager
def met(size: int = 2, relay: Callable[[int], int] = lambda port: port) -> Iterator[list[Streams]]:
    """Streams between all ranks; the higher rank of each pair dials."""
    ranks = [streams_of(rank) for rank in range(size)]
    try:
        ports = [own.listen(list(range(rank + 1, size)), [LO], ANY) for rank, own in enumerate(ranks)]

        def opened(rank: int) -> set[int]:
            return ranks[rank].open(
                {
                    other: StreamEnd(
                        ranks[other].certificate, LO, relay(ports[other][rank]) if other < rank else 0
                    )
                    for other in range(size)
                    if other != rank
                }
            )

        with ThreadPoolExecutor(size) as threads:
            found = list(threads.map(opened, range(size)))
        assert found == [set(range(size)) - {rank} for rank in range(size)]
        yield ranks
    finally:
        for own in ranks:
            own.close()


def at_once(*work: Callable[[], Any]) -> list[Any]:
    with ThreadPoolExecutor(len(work)) as threads:
        return [future.result(PATIENCE_S) for future in [threads.submit(task) for task in work]]


def swap(own: Streams, other: int, frame: bytes) -> bytes:
    [got] = own.move([(other, memoryview(frame))], [(other, len(frame))], PATIENCE_S)
    return bytes(got)


# --- frames ---------------------------------------------------------------------------------------

SIZES = [0, 1, 8192, 16372, 16373, 16384, 100_000, 1 << 20, 5_000_000]


@pytest.mark.parametrize("spins", [True, False])
def test_both_send_at_once_and_nobody_blocks(spins: bool) -> None:
    with met() as (a, b):
        a.spins = b.spins = spins
        for size in SIZES:
            mine, theirs = os.urandom(size), os.urandom(size)
            assert at_once(lambda m=mine: swap(a, 1, m), lambda t=theirs: swap(b, 0, t)) == [theirs, mine]


def test_a_rank_that_is_a_frame_ahead_is_understood() -> None:
    with met() as (a, b):
        for number in range(5):
            a.move([(1, memoryview(bytes([number])))], [], PATIENCE_S)
        assert [bytes(b.move([], [(0, 1)], PATIENCE_S)[0]) for _ in range(5)] == [
            bytes([n]) for n in range(5)
        ]


def test_frames_go_round_a_ring_of_three() -> None:
    with met(3) as ranks:
        frames = [bytes([rank]) * 3_000_000 for rank in range(3)]

        def pass_on(rank: int) -> bytes:
            before, after = (rank - 1) % 3, (rank + 1) % 3
            sends, takes = [(after, memoryview(frames[rank]))], [(before, 3_000_000)]
            return bytes(ranks[rank].move(sends, takes, PATIENCE_S)[0])

        found = at_once(*(lambda r=r: pass_on(r) for r in range(3)))
        assert found == [frames[2], frames[0], frames[1]]


def test_a_slow_rank_is_slept_for_and_a_quick_one_spun_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sleeping and spinning are told apart by who gives the core away."""
    turns: list[int] = []
    monkeypatch.setattr(os, "sched_yield", lambda: turns.append(threading.get_ident()))
    me = threading.get_ident()
    with met() as (a, b):
        b.spins = False
        for _ in range(2):
            late = threading.Timer(0.05, lambda: swap(b, 0, b"x"))
            late.start()
            turns.clear()
            swap(a, 1, b"x")
            late.join()
            spun = me in turns
        assert not spun  # the second time at once
        for _ in range(20):  # what waits already needs no waiting
            b.move([(0, memoryview(b"x"))], [], PATIENCE_S)
            a.move([], [(1, 1)], PATIENCE_S)
        a._streams[1].wait_s = 0.0
        late = threading.Timer(0.02, lambda: b.move([(0, memoryview(b"x"))], [], PATIENCE_S))
        late.start()
        a.move([], [(1, 1)], PATIENCE_S)
        late.join()
        assert me in turns
        turns.clear()
        a.spins, a._streams[1].wait_s = False, 0.0
        late = threading.Timer(0.02, lambda: b.move([(0, memoryview(b"x"))], [], PATIENCE_S))
        late.start()
        a.move([], [(1, 1)], PATIENCE_S)
        late.join()
        assert me not in turns


# --- out of step, half gone, hostile --------------------------------------------------------------


@pytest.mark.parametrize(("sent", "expected"), [(8, 9), (9, 8), (0, 1), (1 << 20, 8), (8, 1 << 20)])
def test_a_frame_of_another_size_is_out_of_step(sent: int, expected: int) -> None:
    with met() as (a, b):
        b._streams[0].send(memoryview(bytes(sent)))
        with pytest.raises(ProtocolError, match="the ranks are out of step"):
            a.move([], [(1, expected)], PATIENCE_S)


def test_a_frame_with_another_number_is_out_of_step() -> None:
    with met() as (a, b):
        b._streams[0]._numbers[0] = 7
        b._streams[0].send(memoryview(b"x"))
        with pytest.raises(ProtocolError, match="frame 0 of rank 1 with 1 bytes; frame 7"):
            a.move([], [(1, 1)], PATIENCE_S)


def test_a_rank_that_says_nothing_is_named() -> None:
    with met(3) as ranks, pytest.raises(PeerError, match=r"rank 2 sent nothing for 0\.05 s"):
        ranks[0].move([], [(2, 1)], 0.05)


def test_a_rank_that_takes_nothing_is_named() -> None:
    with met() as (a, _), pytest.raises(PeerError, match=r"rank 1 took no frame for 0\.05 s"):
        a.move([(1, memoryview(bytes(64 << 20)))], [], 0.05)


@pytest.mark.parametrize("part", [4, 12, 5000])
def test_a_rank_that_vanishes_in_mid_frame_is_named(part: int) -> None:
    with met() as (a, b):
        stream = b._streams[0]
        stream._tls.write((PREFIX.pack(8192, 0) + bytes(8192))[:part])
        stream._pump()
        stream.close()
        with pytest.raises(PeerError, match="rank 1 is gone"):
            a.move([(1, memoryview(bytes(8192)))], [(1, 8192)], PATIENCE_S)


def test_a_record_that_was_altered_on_its_way_ends_the_stream() -> None:
    with met() as (a, b):
        stream = b._streams[0]
        stream._tls.write(PREFIX.pack(8, 0) + bytes(8))
        record = bytearray(stream._outgoing.read())
        record[-1] ^= 1
        stream._sock.send(record)
        with pytest.raises(ProtocolError, match="expected sound records of rank 1"):
            a.move([], [(1, 8)], PATIENCE_S)


def test_a_rank_that_cannot_be_sent_to_after_a_bad_record_is_named() -> None:
    with met() as (a, b):
        b._streams[0]._sock.send(b"\x17\x03\x03\x00\x08no tls..")
        with pytest.raises(ProtocolError, match="expected sound records of rank 1"):
            a.move([], [(1, 8)], PATIENCE_S)
        for size in (8, 1 << 20):
            with pytest.raises(PeerError, match="rank 1 is gone") as found:
                a.move([(1, memoryview(bytes(size)))], [], PATIENCE_S)
            assert found.value.rank == 1


def knock(port: int, own: Credential | None, server: bytes) -> str:
    """What becomes of a stranger who dials `port`."""
    with socket.create_connection((LO, port), PATIENCE_S) as sock:
        if own is None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        else:
            context = context_for(own, server, is_server=False)
        try:
            with context.wrap_socket(sock) as tls:
                tls.sendall(PREFIX.pack(1, 0) + b"x")
                return "closed" if not tls.recv(1) else "answered"
        except OSError:
            return "refused"


STRANGERS: dict[str, Callable[[list[Streams]], Credential | None]] = {
    "no certificate": lambda ranks: None,
    "a certificate of the same names": lambda ranks: new_credential(GROUP, 1),
    "another rank's": lambda ranks: ranks[2]._meeting._own,
    "another group's": lambda ranks: new_credential("other", 1),
}


@pytest.mark.parametrize("who", STRANGERS)
def test_a_stranger_gets_no_further_than_the_handshake(who: str) -> None:
    ranks = [streams_of(rank) for rank in range(3)]
    listener, right = ranks[0], ranks[1]
    try:
        [port] = listener.listen([1], [LO], ANY).values()
        ends = {1: StreamEnd(right.certificate, "", 0)}

        def come_later() -> set[int]:
            outcome.append(knock(port, STRANGERS[who](ranks), listener.certificate))
            return right.open({0: StreamEnd(listener.certificate, LO, port)})

        outcome: list[str] = []
        assert at_once(lambda: listener.open(ends), come_later) == [{1}, {0}]
        assert outcome[0] in ("refused", "closed")
        assert at_once(lambda: swap(listener, 1, b"a"), lambda: swap(right, 0, b"b")) == [b"b", b"a"]
    finally:
        for own in ranks:
            own.close()


def test_the_right_key_with_another_rank_in_its_certificate_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Daemons hand certificates on; one handed on as another rank's must not pass for it."""
    listener, other = streams_of(0), streams_of(2)
    try:
        [port] = listener.listen([1], [LO], ANY).values()
        end = StreamEnd(listener.certificate, LO, port)
        monkeypatch.setattr(meeting, "OPEN_S", 1.0)
        found = at_once(
            lambda: listener.open({1: StreamEnd(other.certificate, "", 0)}), lambda: other.open({0: end})
        )
        assert found[0] == set()
    finally:
        listener.close()
        other.close()


def test_a_dialler_talks_to_the_right_listener_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "OPEN_S", 1.0)
    right, wrong, dialler = streams_of(0), streams_of(0), streams_of(1)
    try:
        [port] = wrong.listen([1], [LO], ANY).values()
        found = at_once(
            lambda: wrong.open({1: StreamEnd(dialler.certificate, "", 0)}),
            lambda: dialler.open({0: StreamEnd(right.certificate, LO, port)}),
        )
        assert found[1] == set()
    finally:
        for own in (right, wrong, dialler):
            own.close()


def test_strangers_who_say_nothing_hold_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "HANDSHAKE_S", 0.2)
    monkeypatch.setattr(meeting, "PENDING_MAX", 2)
    listener, right = streams_of(0), streams_of(1)
    strangers: list[socket.socket] = []
    try:
        [port] = listener.listen([1], [LO], ANY).values()
        strangers += [socket.create_connection((LO, port)) for _ in range(6)]
        strangers[0].send(b"GET / HTTP/1.1\r\n\r\n")
        found = at_once(
            lambda: listener.open({1: StreamEnd(right.certificate, "", 0)}),
            lambda: right.open({0: StreamEnd(listener.certificate, LO, port)}),
        )
        assert found == [{1}, {0}]
        with pytest.raises(OSError, match="refused"):
            socket.create_connection((LO, port))
    finally:
        for sock in strangers:
            sock.close()
        listener.close()
        right.close()


def reset(sock: socket.socket) -> None:
    """Close with a RST instead of a FIN."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def test_a_stranger_who_resets_its_connection_costs_nothing() -> None:
    """Linux hands out a connection that was reset before it was accepted; it has no peer any more."""
    listener, right = streams_of(0), streams_of(1)
    try:
        [port] = listener.listen([1], [LO], ANY).values()
        for _ in range(meeting.PENDING_MAX // 2):
            reset(socket.create_connection((LO, port)))
        found = at_once(
            lambda: listener.open({1: StreamEnd(right.certificate, "", 0)}),
            lambda: right.open({0: StreamEnd(listener.certificate, LO, port)}),
        )
        assert found == [{1}, {0}]
    finally:
        listener.close()
        right.close()


def test_a_listener_that_resets_us_is_a_rank_without_a_stream() -> None:
    dialler, other = streams_of(1), streams_of(0)
    with socket.create_server((LO, 0)) as server:
        end = StreamEnd(other.certificate, LO, server.getsockname()[1])
        found = at_once(lambda: dialler.open({0: end}), lambda: reset(server.accept()[0]))
    assert found[0] == set()
    other.close()
    dialler.close()


def test_a_stream_over_no_connection_closes_its_socket() -> None:
    own = new_credential(GROUP, 0)
    sock = socket.socket()
    with pytest.raises(OSError, match="not connected"):
        Stream(sock, context_for(own, own.certificate, is_server=True), 1, is_server=True)
    assert sock.fileno() == -1


@contextlib.contextmanager
def black_holes(count: int) -> Iterator[list[int]]:
    """Ports on which a connection is neither taken nor refused: their listeners' queues are full."""
    with contextlib.ExitStack() as held:
        servers = [held.enter_context(socket.create_server((LO, 0), backlog=0)) for _ in range(count)]
        for server in servers:
            for _ in range(4):
                sock = held.enter_context(socket.socket())
                sock.setblocking(False)
                sock.connect_ex(server.getsockname())
        yield [server.getsockname()[1] for server in servers]


def test_ranks_that_cannot_be_reached_take_no_time_from_those_that_can(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One after another they would: the last rank's listener has closed long before its turn."""
    monkeypatch.setattr(meeting, "OPEN_S", 2.0)
    size = 5
    ranks = [streams_of(rank) for rank in range(size)]
    dialler, last = ranks[-1], ranks[-2]
    try:
        [port] = last.listen([size - 1], [LO], ANY).values()
        with black_holes(size - 2) as closed:
            ends = {
                rank: StreamEnd(ranks[rank].certificate, LO, there)
                for rank, there in enumerate([*closed, port])
            }
            found = at_once(
                lambda: dialler.open(ends),
                lambda: last.open({size - 1: StreamEnd(dialler.certificate, "", 0)}),
            )
        assert found == [{size - 2}, {size - 1}]
    finally:
        for own in ranks:
            own.close()


def test_every_address_of_a_name_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    def named(host: str, port: int, **_: Any) -> list[Any]:
        assert host == "board"
        return [(socket.AF_INET, socket.SOCK_STREAM, 0, "", (address, port)) for address in ("127.0.0.2", LO)]

    listener, dialler = streams_of(0), streams_of(1)
    try:
        [port] = listener.listen([1], [LO], ANY).values()
        monkeypatch.setattr(socket, "getaddrinfo", named)
        found = at_once(
            lambda: listener.open({1: StreamEnd(dialler.certificate, "", 0)}),
            lambda: dialler.open({0: StreamEnd(listener.certificate, "board", port)}),
        )
        assert found == [{1}, {0}]
    finally:
        listener.close()
        dialler.close()


@pytest.mark.parametrize("address", ["", "a" * 64 + ".invalid"])
def test_an_address_that_is_none_is_a_rank_without_a_stream(address: str) -> None:
    dialler = streams_of(1)
    try:
        assert dialler.open({0: StreamEnd(streams_of(0).certificate, address, 1)}) == set()
    finally:
        dialler.close()


def test_older_protocols_are_refused() -> None:
    one, other = new_credential(GROUP, 0), new_credential(GROUP, 1)
    server = context_for(one, other.certificate, is_server=True)
    client = context_for(other, one.certificate, is_server=False)
    client.minimum_version = ssl.TLSVersion.TLSv1_2
    client.maximum_version = ssl.TLSVersion.TLSv1_2
    a, b = socket.socketpair()
    with a, b:
        b.settimeout(PATIENCE_S)
        a.settimeout(PATIENCE_S)
        work = ThreadPoolExecutor(1)
        with work:
            failing = work.submit(lambda: client.wrap_socket(b, server_side=False))
            with pytest.raises(ssl.SSLError):
                server.wrap_socket(a, server_side=True)
            with pytest.raises(OSError, match=r"SSL|TLS|reset|EOF"):
                failing.result(PATIENCE_S)


def test_a_key_stays_in_memory_and_out_of_sight() -> None:
    own = new_credential(GROUP, 3)
    assert b"PRIVATE" in own.pem
    assert "PRIVATE" not in repr(own)
    before = set(os.listdir("/proc/self/fd"))
    context_for(own, new_credential(GROUP, 1).certificate, is_server=True)
    assert len(set(os.listdir("/proc/self/fd")) - before) == 0
    assert len(own.certificate) < wire.CERTIFICATE_BYTES_MAX


def test_a_certificate_that_is_too_large_is_a_protocol_error() -> None:
    body = {"public_key": b"k", "ports": {}, "certificate": bytes(wire.CERTIFICATE_BYTES_MAX + 1)}
    with pytest.raises(ProtocolError, match="certificate"):
        wire.read_body(wire.Offered, body)


def test_a_certificate_that_is_none_costs_the_stream_and_not_the_plan(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(meeting, "OPEN_S", 0.2)
    own = streams_of(0)
    try:
        own.listen([1], [LO], ANY)
        assert own.open({1: StreamEnd(b"no certificate", "", 0)}) == set()
    finally:
        own.close()


def missing(name: str, flags: int) -> int:
    raise PermissionError(f"no {name}")  # as a seccomp filter says it


@pytest.mark.parametrize("memfd_create", [None, missing], ids=["not in libc", "not allowed"])
def test_without_files_in_memory_there_are_no_streams(
    memfd_create: Callable[..., int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if memfd_create is None:
        monkeypatch.delattr(os, "memfd_create")
    else:
        monkeypatch.setattr(os, "memfd_create", memfd_create)
    assert worker._streams(GROUP, 0) is None


@pytest.mark.parametrize("port", [-1, 65536, 70000, 2**40])
def test_a_port_that_is_none_is_a_protocol_error(port: int) -> None:
    """No socket takes it: `connect` raises OverflowError."""
    offered = {"public_key": b"k", "ports": {}, "stream_ports": {}}
    peer = {"rank": 1, "node_id": "n", "public_key": b"k", "port": 0, "stream_port": 0}
    for kind, body, name in (
        (wire.Offered, offered | {"ports": {1: port}}, "ports"),
        (wire.Offered, offered | {"stream_ports": {1: port}}, "stream_ports"),
        (wire.PeerEnd, peer | {"port": port}, "port"),
        (wire.PeerEnd, peer | {"stream_port": port}, "stream_port"),
    ):
        with pytest.raises(ProtocolError, match=rf"\$\.{name}\b"):
            wire.read_body(kind, body)


# --- beside ZeroMQ --------------------------------------------------------------------------------


@contextlib.contextmanager
def channels_of(offers: list[bool], hidden: tuple[int, ...] = ()) -> Iterator[list[ZmqChannel]]:
    """Connected channels; `offers`: which rank offers streams; `hidden`: whose stream port is closed."""
    size = len(offers)
    ranks = [
        ZmqChannel(rank, size, [LO], ANY, streams_of(rank) if offer else None)
        for rank, offer in enumerate(offers)
    ]
    try:
        ports = [own.listen(list(range(rank + 1, size))) for rank, own in enumerate(ranks)]

        def end_of(rank: int, other: int) -> End:
            their, dials = ranks[other], other < rank
            port = ports[other][rank] if dials else 0
            stream_port = their.stream_ports.get(rank, 0) if dials else 0
            if other in hidden and stream_port:
                stream_port = 1  # nobody listens there
            return End(their.public_key, LO, port, their.certificate, stream_port)

        def opened(rank: int) -> None:
            ranks[rank].open(GROUP, {o: end_of(rank, o) for o in range(size) if o != rank})

        with ThreadPoolExecutor(size) as threads:
            list(threads.map(opened, range(size)))
        yield ranks
    finally:
        for own in ranks:
            own.close()


@pytest.mark.parametrize(
    ("offers", "hidden", "by_stream"),
    [
        ([True, True], (), {(0, 1)}),
        ([True, False], (), set()),
        ([False, True], (), set()),
        ([False, False], (), set()),
        ([True, True], (0,), set()),
        ([True, True, False], (), {(0, 1)}),
        ([True, True, True], (0,), {(1, 2)}),
    ],
)
def test_a_stream_is_used_where_both_have_it_and_zeromq_everywhere_else(
    offers: list[bool],
    hidden: tuple[int, ...],
    by_stream: set[tuple[int, int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(meeting, "OPEN_S", 1.0)
    with channels_of(offers, hidden) as ranks:
        size = len(ranks)
        found = {
            (a, b)
            for a in range(size)
            for b in range(a + 1, size)
            if all(
                own._streams is not None and o in own._streams for own, o in ((ranks[a], b), (ranks[b], a))
            )
        }
        assert found == by_stream

        def exchanges(rank: int) -> list[list[bytes]]:
            others = [other for other in range(size) if other != rank]
            return [
                [bytes(got) for got in ranks[rank].exchange(others, bytes([rank, n]) * 5000, PATIENCE_S)]
                for n in range(3)
            ]

        seen = at_once(*(lambda r=r: exchanges(r) for r in range(size)))
        for rank in range(size):
            others = [other for other in range(size) if other != rank]
            assert seen[rank] == [[bytes([o, n]) * 5000 for o in others] for n in range(3)]


def test_streams_that_fail_here_are_done_without_on_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `poll` does where a process may open too few files."""
    real = Meeting._poll

    def poll(self: Meeting, *rest: Any) -> set[int]:
        if self._own.rank == 0:
            raise OSError("too many open files")
        return real(self, *rest)

    monkeypatch.setattr(Meeting, "_poll", poll)
    monkeypatch.setattr(meeting, "OPEN_S", 1.0)
    with channels_of([True, True, True]) as ranks:
        assert [rank in (ranks[1]._streams or ()) for rank in (0, 2)] == [False, True]

        def exchange(rank: int) -> list[bytes]:
            others = [other for other in range(3) if other != rank]
            return [bytes(got) for got in ranks[rank].exchange(others, bytes([rank]) * 5000, PATIENCE_S)]

        for rank, seen in enumerate(at_once(*(lambda r=r: exchange(r) for r in range(3)))):
            assert seen == [bytes([other]) * 5000 for other in range(3) if other != rank]
        assert all(own.bytes_sent > 5000 for own in ranks)


@pytest.mark.parametrize("header", [{"k": "frame", "n": 1}, {"k": "other", "n": 0}, {}])
def test_a_frame_over_zeromq_that_is_out_of_step_is_a_protocol_error(header: dict[str, Any]) -> None:
    with channels_of([False, False]) as (a, b):
        b.send(0, header, [b"x"])
        with pytest.raises(ProtocolError, match="out of step"):
            a.move([], [(1, 1)], PATIENCE_S)


def test_a_rank_that_does_not_say_whether_it_has_a_stream_is_not_one_of_ours(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(channels.ZmqChannel, "_open_streams", lambda self, streams, ends: None)
    with channels_of([True, True]) as (a, b):
        monkeypatch.undo()
        monkeypatch.setattr(meeting, "OPEN_S", 0.2)
        b.send(0, {"k": "stream", "met": "yes"})
        ends = {1: End(b.public_key, "", 0, b.certificate)}
        with pytest.raises(ProtocolError, match="whether it has a stream"):
            a._open_streams(a._streams, ends)


class Counter:
    """A TCP relay that counts what goes towards the listener."""

    def __init__(self, port: int) -> None:
        self.target, self.up = port, 0
        self.listener = socket.create_server((LO, 0))
        self.port: int = self.listener.getsockname()[1]
        self.threads = [threading.Thread(target=self.run)]
        self.threads[0].start()

    def run(self) -> None:
        ours, _ = self.listener.accept()
        theirs = socket.create_connection((LO, self.target))
        back = threading.Thread(target=self.pump, args=(theirs, ours, 0))
        back.start()
        self.pump(ours, theirs, 1)
        back.join()

    def pump(self, source: socket.socket, sink: socket.socket, counts: int) -> None:
        with contextlib.suppress(OSError):
            while part := source.recv(1 << 16):
                self.up += counts * len(part)
                sink.sendall(part)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)
        source.close()


@pytest.mark.parametrize(("count", "size"), [(50, 0), (50, 8192), (3, 1 << 20)])
def test_bytes_sent_are_exactly_those_on_the_wire(count: int, size: int) -> None:
    counters: list[Counter] = []

    def counted(port: int) -> int:
        counters.append(Counter(port))
        return counters[-1].port

    with met(relay=counted) as (a, b):
        for _ in range(count):
            at_once(lambda: swap(a, 1, bytes(size)), lambda: swap(b, 0, bytes(size)))
        until = time.monotonic() + PATIENCE_S
        while counters[0].up < b.bytes_sent and time.monotonic() < until:
            time.sleep(0.01)  # the relay's thread has the last bytes yet to count
        sent = b.bytes_sent
    counters[0].listener.close()
    for thread in counters[0].threads:
        thread.join(PATIENCE_S)
    assert counters[0].up == sent


def test_bytes_sent_may_be_asked_for_while_streams_come() -> None:
    """The daemon's `usage` is answered on another thread than the one that opens."""
    own = streams_of(0)

    class Arriving:
        @property
        def bytes_sent(self) -> int:
            own._streams[len(own._streams) + 1] = self  # type: ignore[assignment] - a stand-in
            return 7

    own._streams[1] = Arriving()  # type: ignore[assignment] - a stand-in
    assert own.bytes_sent == 7


def test_a_stream_object_alone_reports_an_end_before_the_handshake() -> None:
    own, peer = new_credential(GROUP, 0), new_credential(GROUP, 1)
    with socket.create_server((LO, 0)) as server:
        sock = socket.create_connection(server.getsockname())
        theirs, _ = server.accept()
        theirs.close()
        stream = Stream(sock, context_for(own, peer.certificate, is_server=True), 1, is_server=True)
        assert select.select([stream], [], [], PATIENCE_S)[0]
        with pytest.raises(PeerError, match="rank 1 is gone"):
            stream.handshake()
        stream.close()

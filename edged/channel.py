"""The data plane between the workers of a plan: one ZeroMQ PAIR with CURVE per pair of ranks, and a
TLS stream beside it where both offer one.

Each worker makes a key pair of its own for the plan; a listening socket admits one key, that of the
rank it waits for. Messages go over ZeroMQ; `exchange` and `move` go over the streams, and over
ZeroMQ to a rank without one. Everything but the ZAP answers runs on the worker's main thread.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import msgpack
import zmq

from . import wire
from .errors import ConfigError, PeerError, ProtocolError
from .meeting import StreamEnd
from .streams import Streams
from .transport import ZAP_ENDPOINT, answer_zap, bind, endpoint, new_keys, secure_client, secure_server

log = logging.getLogger(__name__)
OPEN_S = 20.0  # for all ranks to reach each other
SEND_S = 60.0  # for one message to be taken over by ZeroMQ
QUEUE_MESSAGES = 64  # in flight per link; ranks run in lock-step, so few are
BOX_BYTES = 33  # of a CURVE MESSAGE around a frame (RFC 26)
KINDS_MAX = 64  # of messages that are counted apart; an engine's own code names them, and has a dozen
OTHER, STREAM = "other", "tls"  # kinds that no message has: what is beyond KINDS_MAX, and a stream's bytes
SHORT_BYTES_MAX = 255  # of a ZMTP frame whose head takes 2 bytes; a longer one's takes 9 (RFC 23)


class End(NamedTuple):
    """Where and as whom a rank is reached. Ports are 0 where that rank dials us; no certificate, no
    stream."""

    public_key: bytes
    address: str
    port: int
    certificate: bytes = b""
    stream_port: int = 0


class ZmqChannel:
    """Connections to the other ranks. `listen`, exchange public keys, `open`, then send and receive.

    `streams`: ours to offer; without them everything goes over ZeroMQ.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        interfaces: Sequence[str],
        ports: range,
        streams: Streams | None = None,
    ) -> None:
        self.rank, self.size = rank, size
        self.stream_ports: dict[int, int] = {}
        self._streams = streams
        self._sent: dict[tuple[int, str], tuple[int, int]] = {}  # messages and bytes, by rank and kind
        self._moves: dict[int, list[int]] = {}  # frames moved over ZeroMQ, per rank: out and in
        self._interfaces, self._ports = interfaces, ports
        self._context = zmq.Context()
        self._keys = new_keys()
        self._links: dict[int, zmq.Socket[bytes]] = {}
        self._timeouts: dict[int, float] = {}
        self._admitted: dict[bytes, bytes] = {}  # ZAP domain of a rank -> the one key it admits
        self._keys_known = threading.Event()
        self._zap = threading.Thread(target=self._serve_zap, name="zap", daemon=True)

    @property
    def public_key(self) -> bytes:
        return self._keys[0]

    @property
    def certificate(self) -> bytes:
        """Of our streams, DER; empty where there are none."""
        return self._streams.certificate if self._streams is not None else b""

    @property
    def bytes_sent(self) -> int:
        """Handed to TCP so far, framing and encryption included; of streams, handshakes too. On any
        thread."""
        return sum(size for *_, size in self.sent)

    @property
    def sent(self) -> list[tuple[int, str, int, int]]:
        """Of `bytes_sent`: rank, kind of message, how many, and their bytes. A stream has no messages, and
        its bytes are of kind STREAM. On any thread."""
        # streams are read once: the main thread may do without them meanwhile
        streams, counted = self._streams, list(self._sent.items())
        found = [(rank, kind, messages, size) for (rank, kind), (messages, size) in counted]
        moved = streams.sent if streams is not None else []
        return found + [(rank, STREAM, 0, size) for rank, size in moved if size]

    def listen(self, ranks: Sequence[int]) -> dict[int, int]:
        """Bind a socket for each rank that will dial; rank -> port. `stream_ports` are set with it."""
        if ranks:
            self._zap.start()
        taken = {}
        for rank in ranks:
            sock = self._socket()
            secure_server(sock, self._keys[1])
            sock.zap_domain = _domain(rank)
            taken[rank] = bind(sock, self._interfaces, self._ports)
            self._links[rank] = sock
        if self._streams is not None:
            try:
                self.stream_ports = self._streams.listen(ranks, self._interfaces, self._ports)
            except ConfigError as error:
                self._do_without_streams(self._streams, error)
        return taken

    def open(self, group: str, ends: Mapping[int, End]) -> None:
        """Connect to every rank of `ends`.

        Returns when each link has carried a greeting both ways, and each stream was agreed on;
        PeerError names the rank otherwise.
        """
        self._admitted = {_domain(rank): end.public_key for rank, end in ends.items()}
        self._keys_known.set()
        for rank, end in ends.items():
            if rank in self._links:
                continue
            sock = self._socket()
            secure_client(sock, self._keys, end.public_key)
            sock.connect(endpoint(end.address, end.port))
            self._links[rank] = sock
        self._greet(group, ends)
        if self._streams is not None:
            self._open_streams(self._streams, ends)

    def _greet(self, group: str, ends: Mapping[int, End]) -> None:
        greeting = {"k": "greet", "group": group, "rank": self.rank}
        for rank in ends:
            self._links[rank].sndtimeo = round(OPEN_S * 1000)
            self.send(rank, greeting)
        for rank in ends:
            header, _ = self.receive(rank, OPEN_S)
            self._links[rank].sndtimeo = round(SEND_S * 1000)
            if header != {"k": "greet", "group": group, "rank": rank}:
                raise ProtocolError(f"expected the greeting of rank {rank}")

    def _open_streams(self, streams: Streams, ends: Mapping[int, End]) -> None:
        """Streams to the ranks that offer one. Each side says over ZeroMQ whether it has it: a stream
        that one side alone believes in would be a rank that never answers."""
        offered = {
            rank: StreamEnd(end.certificate, end.address, end.stream_port)
            for rank, end in ends.items()
            if end.certificate and (end.stream_port or rank in self.stream_ports)
        }
        try:
            met = streams.open(offered)
        except OSError as error:
            self._do_without_streams(streams, error)
            met = set()
        for rank in offered:
            self.send(rank, {"k": "stream", "met": rank in met})
        for rank in offered:
            header, _ = self.receive(rank, OPEN_S)
            if header.get("k") != "stream" or not isinstance(header.get("met"), bool):
                raise ProtocolError(f"expected rank {rank} to say whether it has a stream")
            if rank in met and not header["met"]:
                streams.drop(rank)

    def _do_without_streams(self, streams: Streams, reason: Exception) -> None:
        log.info("no streams", extra={"reason": str(reason)})
        streams.close()
        self._streams = None

    def spin(self, allowed: bool) -> None:
        """Whether waiting for a stream may burn the processor for some microseconds first."""
        if self._streams is not None:
            self._streams.spins = allowed

    def exchange(self, ranks: Sequence[int], frame: Any, timeout_s: float) -> list[memoryview]:
        size = memoryview(frame).nbytes
        return self.move([(rank, frame) for rank in ranks], [(rank, size) for rank in ranks], timeout_s)

    def move(
        self, sends: Sequence[tuple[int, Any]], takes: Sequence[tuple[int, int]], timeout_s: float
    ) -> list[memoryview]:
        sends = [(rank, _bytes_of(frame)) for rank, frame in sends]
        streams = self._streams
        if streams is not None and all(rank in streams for rank, _ in (*sends, *takes)):
            return streams.move(sends, takes, timeout_s)
        by_stream = streams if streams is not None else ()
        for rank, frame in sends:
            if rank not in by_stream:
                self._send_frame(rank, frame)
        found: dict[int, memoryview] = {}
        if streams is not None:
            rest = [take for take in takes if take[0] in streams]
            moved = streams.move([send for send in sends if send[0] in streams], rest, timeout_s)
            found = {rank: frame for (rank, _), frame in zip(rest, moved, strict=True)}
        return [
            found[rank] if rank in found else self._take_frame(rank, size, timeout_s) for rank, size in takes
        ]

    def _send_frame(self, to: int, frame: memoryview) -> None:
        """One frame over ZeroMQ: a copy, since libzmq sends it later."""
        numbers = self._moves.setdefault(to, [0, 0])
        self.send(to, {"k": "frame", "n": numbers[0]}, [bytes(frame)])
        numbers[0] += 1

    def _take_frame(self, source: int, size: int, timeout_s: float) -> memoryview:
        numbers = self._moves.setdefault(source, [0, 0])
        header, frames = self.receive(source, timeout_s)
        if header != {"k": "frame", "n": numbers[1]} or [frame.nbytes for frame in frames] != [size]:
            raise ProtocolError(
                f"expected frame {numbers[1]} of rank {source} with {size} bytes: the ranks are out of step"
            )
        numbers[1] += 1
        return frames[0]

    def send(self, to: int, header: Mapping[str, Any], frames: Sequence[Any] = ()) -> None:
        packed, sock = msgpack.packb(header), self._links[to]
        try:
            sock.send_multipart([packed, *frames])
        except zmq.Again as error:
            text = f"rank {to} took no message for {int(sock.sndtimeo) / 1000:g} s"
            raise PeerError(text, rank=to) from error
        size = sum(_on_wire(memoryview(frame).nbytes) for frame in (packed, *frames))
        key = (to, str(header.get("k", OTHER)))
        if key not in self._sent and len(self._sent) >= KINDS_MAX * self.size:
            key = (to, OTHER)
        messages, before = self._sent.get(key, (0, 0))
        self._sent[key] = messages + 1, before + size

    def receive(self, source: int, timeout_s: float) -> tuple[dict[str, Any], list[memoryview]]:
        sock = self._links[source]
        if self._timeouts.get(source) != timeout_s:
            sock.rcvtimeo = max(1, round(timeout_s * 1000))
            self._timeouts[source] = timeout_s
        try:
            frames = sock.recv_multipart(copy=False)
        except zmq.Again as error:
            raise PeerError(f"rank {source} sent nothing for {timeout_s:g} s", rank=source) from error
        if len(frames) > 1 + wire.FRAMES_MAX:
            raise ProtocolError(f"expected at most {wire.FRAMES_MAX} frames; {len(frames) - 1} came")
        return wire.unpack_map(frames[0].buffer), [frame.buffer for frame in frames[1:]]

    def poll(self, source: int, timeout_s: float) -> bool:
        return bool(self._links[source].poll(round(timeout_s * 1000)))

    def takes(self, to: int) -> bool:
        """Would a message to that rank be taken over at once? Not where its process has ended, say."""
        return bool(self._links[to].poll(0, zmq.POLLOUT))

    def close(self) -> None:
        self._keys_known.set()  # whoever knocked before `open` is refused, and not waited for
        for sock in self._links.values():
            sock.close(linger=500)
        self._context.term()
        if self._streams is not None:
            self._streams.close()

    def _socket(self) -> zmq.Socket[bytes]:
        sock = self._context.socket(zmq.PAIR)
        sock.maxmsgsize = wire.FRAME_BYTES_MAX
        sock.sndhwm = sock.rcvhwm = QUEUE_MESSAGES
        return sock

    def _serve_zap(self) -> None:
        """Answer libzmq's questions until the context ends; wait for the keys before the first answer."""
        zap = self._context.socket(zmq.REP)
        zap.linger = 0
        try:
            zap.bind(ZAP_ENDPOINT)
            while True:
                frames = zap.recv_multipart()
                self._keys_known.wait(OPEN_S)
                expected = self._admitted.get(frames[2])
                user = f"rank-{frames[2].decode(errors='replace')}"
                zap.send_multipart(
                    answer_zap(frames, lambda key: user if key == expected else None, frames[2])  # noqa: B023 - called at once
                )
        except zmq.ContextTerminated:
            pass
        finally:
            zap.close()


def _bytes_of(frame: Any) -> memoryview:
    """A contiguous buffer as bytes; an empty one cannot be cast."""
    view = memoryview(frame)
    return view if view.format == "B" and view.ndim == 1 else view.cast("B")


def _on_wire(count: int) -> int:
    """Bytes of a TCP stream that carry one frame of `count` bytes."""
    boxed = count + BOX_BYTES
    return boxed + (2 if boxed <= SHORT_BYTES_MAX else 9)


def _domain(rank: int) -> bytes:
    return f"rank:{rank}".encode()
